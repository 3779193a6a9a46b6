"""The sampler against plain references, its distribution, its seeds, and every refused value."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from soma.engine.errors import RequestError
from soma.engine.sampling import SORT_FIRST, Sampler, SamplingParams, distribution, token_logprob, uniform

V = 50


def logits(seed: int = 0, size: int = V) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def reference(x: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """Temperature, top-k, top-p, min-p by full sort in float64: the probability of every token."""
    p = torch.softmax(x.double() / params.temperature, 0).numpy()
    order = np.argsort(-p, kind="stable")
    keep = np.zeros(len(p), bool)
    keep[order[: params.top_k if params.top_k > 0 else len(p)]] = True
    p = np.where(keep, p, 0) / p[keep].sum()
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    keep[order[before >= params.top_p]] = False
    p = np.where(keep, p, 0)
    p = np.where(p >= params.min_p * p.max(), p, 0)
    return p / p.sum()


def dense(x: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """What `distribution` gives, as the probability of every token."""
    probabilities, ids = distribution(x, params)
    full = torch.zeros(len(x), dtype=torch.float64)
    full[torch.arange(len(x)) if ids is None else ids] = probabilities.double()
    return (full / full.sum()).numpy()


CASES = [
    {}, {"temperature": 0.3}, {"temperature": 2.5}, {"top_k": 7}, {"top_k": 1}, {"top_k": V + 5}, {"top_k": -1},
    {"top_p": 0.5}, {"top_p": 0.95}, {"top_p": 1e-9}, {"min_p": 0.05}, {"min_p": 1.0}, {"top_k": 10, "top_p": 0.6},
    {"top_k": 20, "min_p": 0.1}, {"top_p": 0.8, "min_p": 0.2, "temperature": 1.7},
    {"top_k": 15, "top_p": 0.9, "min_p": 0.02, "temperature": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_filters_match_the_reference(case: dict[str, float]) -> None:
    params = SamplingParams(**case)
    for seed in range(5):
        x = logits(seed)
        np.testing.assert_allclose(dense(x, params), reference(x, params), atol=2e-6)


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_top_p_with_and_without_the_full_sort(scale: float) -> None:
    """A flat distribution needs more than the first tokens, a peaked one does not; both are right."""
    x = logits(1, SORT_FIRST * 4) * scale
    params = SamplingParams(top_p=0.9)
    kept = (dense(x, params) > 0).sum()
    assert (kept > SORT_FIRST) == (scale < 1)
    assert kept == (reference(x, params) > 0).sum()


@pytest.mark.parametrize("case", [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 2.0}], ids=str)
def test_frequencies_follow_the_distribution(case: dict[str, float]) -> None:
    """Chi-square of 20,000 draws against the reference; the same draws fail against a wrong distribution."""
    draws, size = 20_000, 12
    x = logits(3, size) / 2
    sampler = Sampler(SamplingParams(seed=5, **case), [], size)
    counts = np.bincount([sampler(x).id for _ in range(draws)], minlength=size)

    def chi_square(expected: np.ndarray) -> float:
        seen = expected > 0
        return float((((counts - draws * expected)[seen] ** 2) / (draws * expected[seen])).sum())

    right = reference(x, SamplingParams(**case))
    assert counts[right == 0].sum() == 0
    bound = 11 + 5 * math.sqrt(22)  # mean + 5 standard deviations of chi-square with at most 11 degrees of freedom
    assert chi_square(right) < bound
    wrong = reference(x, SamplingParams(**{**case, "temperature": case.get("temperature", 1.0) * 1.15}))
    assert chi_square(wrong) > bound


def test_uniform_has_known_values_and_no_pattern() -> None:
    assert uniform(0, 0) == 0.8833108082136426
    assert uniform(-5, 3) == uniform((1 << 64) - 5, 3)
    grid = np.array([[uniform(seed, place) for place in range(100)] for seed in range(100)])
    assert 0 <= grid.min() < grid.max() < 1
    assert abs(grid.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03


def test_seeds() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed), [], V)
        return [sampler(logits(i)).id for i in range(30)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_greedy_takes_the_likeliest() -> None:
    sampler = Sampler(SamplingParams(temperature=0), [], V)
    for seed in range(5):
        assert sampler(logits(seed)).id == int(logits(seed).argmax())


def test_penalties_match_the_reference() -> None:
    """Repetition counts the prompt too; presence and frequency count only what was made (OpenAI)."""
    params = SamplingParams(temperature=0, presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.3)
    prompt, made = [3, 9], []
    sampler = Sampler(params, prompt, V)
    for step in range(40):
        x = logits(step % 3)
        expected = x.clone()
        for token in {*prompt, *made}:
            expected[token] = x[token] / 1.3 if x[token] > 0 else x[token] * 1.3
        for token in made:
            expected[token] -= 0.4
        for token in set(made):
            expected[token] -= 0.7
        token = sampler(x).id
        assert token == int(expected.argmax()), step
        made.append(token)
    assert len(set(made)) > 3  # without penalties there would be three


def test_bias() -> None:
    x = logits()
    best = int(x.argmax())
    assert Sampler(SamplingParams(temperature=0, logit_bias={best: -100}), [], V)(x).id != best
    assert Sampler(SamplingParams(temperature=1, seed=1, logit_bias={17: 100}), [], V)(x).id == 17


def test_logprobs_are_those_of_the_model() -> None:
    """Whatever the temperature, bias and penalties do."""
    x = logits()
    params = SamplingParams(temperature=0.2, seed=3, logprobs=4, logit_bias={5: 3.0}, top_k=9)
    chosen = Sampler(params, [], V)(x)
    right = torch.log_softmax(x.double(), 0)
    assert chosen.logprob == pytest.approx(float(right[chosen.id]), abs=1e-6)
    assert [token for token, _ in chosen.top] == right.topk(4).indices.tolist()
    assert [value for _, value in chosen.top] == pytest.approx(right.topk(4).values.tolist(), abs=1e-6)
    assert token_logprob(x, 2, 0).top == ()
    assert math.isnan(Sampler(SamplingParams(), [], V)(x).logprob)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_an_error(temperature: float) -> None:
    x = logits()
    x[4] = math.nan
    with pytest.raises(FloatingPointError):
        Sampler(SamplingParams(temperature=temperature), [], V)(x)


def test_masked_tokens_are_never_chosen() -> None:
    x = torch.full((V,), -math.inf)
    x[[4, 11]] = 0.0
    sampler = Sampler(SamplingParams(seed=0), [], V)
    assert {sampler(x).id for _ in range(60)} == {4, 11}


BAD = [
    ("temperature", math.nan), ("temperature", math.inf), ("temperature", -0.1), ("temperature", "1"),
    ("temperature", True), ("top_p", 0.0), ("top_p", 1.5), ("top_p", math.nan), ("top_k", -2), ("top_k", 1.5),
    ("min_p", -0.1), ("min_p", 2), ("max_tokens", 0), ("max_tokens", -4), ("max_tokens", 2.5), ("seed", 1 << 64),
    ("seed", "x"), ("logprobs", -1), ("logprobs", 21), ("prompt_logprobs", 30), ("presence_penalty", 3),
    ("frequency_penalty", -2.5), ("frequency_penalty", math.nan), ("repetition_penalty", 0.0), ("stop", ("",)),
    ("stop", "word"), ("stop", tuple("abcdefghijklmnopqrs")), ("stop_token_ids", (-1,)), ("logit_bias", {-1: 0.0}),
    ("logit_bias", {1: 101}), ("logit_bias", {1: math.nan}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_impossible_values_name_their_field(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_ids_beyond_the_vocabulary() -> None:
    for name, value in (("stop_token_ids", (V,)), ("logit_bias", {V: 1.0})):
        with pytest.raises(RequestError, match="vocabulary") as caught:
            SamplingParams(**{name: value}).check_vocabulary(V)
        assert caught.value.param == name


def test_every_field_is_documented_and_frozen() -> None:
    assert all(SamplingParams.documentation().values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 2.0  # type: ignore[misc]
