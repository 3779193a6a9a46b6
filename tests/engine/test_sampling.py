"""The sampler of whole batches against the plain one of single requests; its distribution, its seeds, its refusals."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_sampler import PlainSampler
from plain_sampler import uniform as plain_uniform

from soma.engine.adjust import Row, SamplingState, bad_sequences
from soma.engine.errors import RequestError
from soma.engine.params import SamplingParams, TokenLogprob
from soma.engine.sampling import WIDTHS, distribution, sample, token_logprobs, uniform, uniforms

V = 50
CLOSE = 2e-6  # float32 probabilities against float64 ones


def logits(seed: int = 0, size: int = V) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def state(**params: Any) -> SamplingState:
    return SamplingState(SamplingParams(**params))


def draw(x_V: torch.Tensor, one: SamplingState) -> TokenLogprob:
    """One request alone; the token counts as made."""
    chosen = sample(x_V[None], [Row(one)])[0]
    assert chosen is not None
    one.take(chosen.id)
    return chosen


def ids_of(chosen: list[TokenLogprob | None]) -> list[int]:
    assert None not in chosen
    return [one.id for one in chosen if one]


def fits(token: int, x_V: torch.Tensor, plain: PlainSampler) -> bool:
    """Whether a token is the one at the plain sampler's quantile, up to rounding at the borders of both filters."""
    u = plain_uniform(plain.params.seed or 0, len(plain.made))

    def is_there(p: np.ndarray, order: np.ndarray) -> bool:
        cumulative = np.cumsum(p[order])
        place = int(np.flatnonzero(order == token)[0])
        return bool(cumulative[place] - p[token] - CLOSE <= u <= cumulative[place] + CLOSE)

    return any(is_there(*plain.filtered(x_V, moved)) for moved in (0.0, -CLOSE, CLOSE))


def is_spread(p_V: np.ndarray, x_V: torch.Tensor, plain: PlainSampler) -> bool:
    """Whether these are the plain sampler's probabilities, whichever side a token on a border of a filter falls."""
    return any(np.allclose(p_V, plain.filtered(x_V, moved)[0], rtol=1e-7, atol=CLOSE) for moved in (0.0, -CLOSE, CLOSE))


# Against the plain sampler:

bias = st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5, width=32), max_size=4)
words = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=3).map(tuple), max_size=4).map(tuple)
some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.4, 1.0, 1.7]), top_k=st.sampled_from([0, -1, 1, 3, 9, V + 7]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]), min_p=st.sampled_from([0.0, 0.03, 0.5]), seed=st.integers(0, 99),
    logprobs=st.sampled_from([None, 0, 3]), presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.3]), repetition_penalty=st.sampled_from([1.0, 1.0, 1.4]),
    logit_bias=bias, bad_words=words,
)  # fmt: skip
prompts = st.lists(st.integers(0, V - 1), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(some_params, prompts), min_size=1, max_size=6), st.integers(0, 1000))
def test_mixed_batches_match_the_plain_sampler(cases: list[tuple[SamplingParams, list[int]]], seed: int) -> None:
    """Tokens, log-probabilities and the whole distribution, over several steps with growing histories."""
    states = [SamplingState(one, prompt, bad_sequences(one, lambda _: [])) for one, prompt in cases]
    plains = [PlainSampler(one, prompt, one.bad_words) for one, prompt in cases]
    for step in range(4):
        x_RV = torch.stack([logits(seed + 10 * step + i) for i in range(len(cases))])
        before_RV = x_RV.clone()
        chosen = sample(x_RV, [Row(one) for one in states])
        spread_RV = distribution(x_RV, [Row(one) for one in states])
        assert torch.equal(x_RV, before_RV)
        for i, plain in enumerate(plains):
            token = chosen[i]
            assert token is not None
            assert fits(token.id, x_RV[i], plain)
            assert is_spread(spread_RV[i].numpy(), x_RV[i], plain)
            check_logprobs(token, x_RV[i], plain.params.logprobs)
            plain.made.append(token.id)
            states[i].take(token.id)


def check_logprobs(token: TokenLogprob, x_V: torch.Tensor, alternatives: int | None) -> None:
    """Those of the model, whatever temperature, bias, penalties and filters do."""
    if alternatives is None:
        assert math.isnan(token.logprob)
        assert token.top == ()
        return
    right = torch.log_softmax(x_V.double(), 0)
    assert token.logprob == pytest.approx(float(right[token.id]), abs=1e-5)
    assert [id for id, _ in token.top] == right.topk(alternatives).indices.tolist()
    assert [value for _, value in token.top] == pytest.approx(right.topk(alternatives).values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 1.3}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.3}, {"seed": 12}, {"presence_penalty": 0.0},
        {"frequency_penalty": 0.0}, {"repetition_penalty": 1.0}, {"logit_bias": {}}, {"bad_words": ()},
    ],
    ids=str,
)  # fmt: skip
def test_the_check_sees_a_wrong_parameter(wrong: dict[str, Any]) -> None:
    """Negative control: whichever parameter the plain sampler has differently, it does not fit any more."""
    right: dict[str, Any] = {
        "temperature": 0.9, "seed": 11, "presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.3,
        "logit_bias": {3: 4.0, 9: 2.0}, "bad_words": ((5,), (7,), (30,)),
    }  # fmt: skip

    def misfits(plain_params: SamplingParams) -> int:
        params = SamplingParams(**right)
        one, plain = SamplingState(params, [3, 4], params.bad_words), PlainSampler(plain_params, [3, 4])  # type: ignore[arg-type]
        plain.bad = [list(word) for word in plain_params.bad_words]
        found = 0
        for step in range(60):
            x_V = logits(step) / 3
            token = draw(x_V, one).id
            found += not fits(token, x_V, plain)
            plain.made.append(token)
        return found

    assert misfits(SamplingParams(**right)) == 0
    assert misfits(SamplingParams(**{**right, **wrong})) > 0


@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
@pytest.mark.parametrize(
    "case", [{"top_p": 0.9}, {"top_k": 700}, {"top_k": 60, "top_p": 0.97}, {"min_p": 0.01}], ids=str
)
def test_large_vocabularies(scale: float, case: dict[str, float]) -> None:
    """A flat distribution needs more than the first likeliest tokens, a peaked one does not; all widths are right."""
    x_RV = torch.stack([logits(i, WIDTHS[-1] * 4 + 3) for i in range(3)]) * scale
    rows = [Row(state(seed=i, **case)) for i in range(3)]
    spread_RV, chosen = distribution(x_RV, rows), sample(x_RV, rows)
    for i in range(3):
        plain = PlainSampler(rows[i].state.params)
        expected = plain.filtered(x_RV[i])[0]
        differs = np.flatnonzero((spread_RV[i].numpy() > 0) != (expected > 0))
        assert len(differs) <= 1  # a token at the very border of top-p in float32
        np.testing.assert_allclose(spread_RV[i].numpy(), expected, atol=CLOSE + expected.max() * len(differs))
        assert fits(chosen[i].id, x_RV[i], plain)  # type: ignore[union-attr]


@pytest.mark.parametrize("case", [{"top_k": 40}, {"top_p": 0.7}, {"top_k": 64}, {"top_p": 0.99, "top_k": 600}], ids=str)
def test_equal_logits_do_not_depend_on_the_batch(case: dict[str, float]) -> None:
    """Logits of few different values, as bf16 makes them: ties are ordered by id, alone and beside wider searches."""
    x_RV = torch.stack([logits(i, 3000).mul(2).round().div(4) for i in range(6)])
    rows = [Row(state(seed=i, **case)) for i in range(6)]
    together = sample(x_RV, rows)
    wider = sample(torch.cat((x_RV, x_RV)), [*rows, *[Row(state(seed=9, top_p=0.999)) for _ in rows]])[:6]
    alone = [sample(x_RV[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    ids = ids_of(together)
    assert ids == ids_of(alone) == ids_of(wider)
    assert all(fits(token, x_RV[i], PlainSampler(rows[i].state.params)) for i, token in enumerate(ids))


def test_a_seed_gives_the_same_tokens_beside_random_others() -> None:
    def run(others: int) -> list[int]:
        one, made = SamplingState(SamplingParams(seed=3, top_p=0.9, presence_penalty=0.4), [1, 2]), []
        kinds: list[dict[str, Any]] = [
            {"temperature": 0}, {"top_k": 5}, {"min_p": 0.1}, {"logit_bias": {1: 5.0}, "logprobs": 2}, {"top_p": 0.5},
        ]  # fmt: skip
        beside = [state(seed=i, **kinds[i % len(kinds)]) for i in range(others)]
        for step in range(30):
            x_RV = torch.stack([logits(step), *(logits(100 + step + i) for i in range(others))])
            order = torch.randperm(others + 1, generator=torch.Generator().manual_seed(step)).tolist()
            states = [one, *beside]
            chosen = sample(x_RV[order], [Row(states[i]) for i in order])
            token = chosen[order.index(0)]
            assert token is not None
            one.take(token.id)
            made.append(token.id)
        return made

    alone = run(0)
    assert len(set(alone)) > 5
    assert run(7) == alone
    assert run(40) == alone


def test_a_draft_gets_the_tokens_that_would_have_come_anyway() -> None:
    """Rows with tokens ahead give what the request gives step by step, with penalties, bans and seed."""
    params = SamplingParams(
        seed=8,
        top_k=49,
        repetition_penalty=1.2,
        frequency_penalty=0.4,
        presence_penalty=0.2,
        bad_words=((4, 9), (2,)),
    )
    words = bad_sequences(params, lambda _: [])
    one = SamplingState(params, [3, 4], words)
    for token in (4, 9, 9):
        one.take(token)
    draft = (9, 7, 30, 30, 4)
    x_RV = torch.stack([logits(i) / 2 for i in range(len(draft) + 1)])
    rows = [Row(one, draft[:i]) for i in range(len(draft) + 1)]
    ahead, spread_RV = sample(x_RV, rows), distribution(x_RV, rows)
    assert one.position == 3
    for i, token in enumerate([*draft, 0]):
        np.testing.assert_array_equal(distribution(x_RV[i : i + 1], [Row(one)])[0], spread_RV[i])
        assert ids_of(sample(x_RV[i : i + 1], [Row(one)])) == ids_of(ahead[i : i + 1])
        one.take(token)
    assert spread_RV[5, 9] == 0  # 4 9 is banned after the draft's 4
    assert spread_RV[4, 9] > 0


# Statistics:


@pytest.mark.parametrize("case", [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 2.0}], ids=str)
def test_frequencies_follow_the_distribution(case: dict[str, float]) -> None:
    """Chi-square of 20,000 draws against the plain distribution; the same draws fail against a wrong one."""
    draws, size = 20_000, 12
    x_V = logits(3, size) / 2
    rows = [Row(state(seed=seed, **case)) for seed in range(draws)]
    counts = np.bincount([one.id for one in sample(x_V.expand(draws, -1), rows) if one], minlength=size)

    def chi_square(expected: np.ndarray) -> float:
        seen = expected > 0
        return float((((counts - draws * expected)[seen] ** 2) / (draws * expected[seen])).sum())

    right = PlainSampler(SamplingParams(**case)).filtered(x_V)[0]
    assert counts[right == 0].sum() == 0
    bound = 11 + 5 * math.sqrt(22)  # mean + 5 standard deviations of chi-square with at most 11 degrees of freedom
    assert chi_square(right) < bound
    warmer = SamplingParams(**{**case, "temperature": case.get("temperature", 1.0) * 1.15})
    assert chi_square(PlainSampler(warmer).filtered(x_V)[0]) > bound


def test_uniform_has_known_values_and_no_pattern() -> None:
    assert uniform(0, 0) == 0.8833108082136426
    assert uniform(-5, 3) == uniform((1 << 64) - 5, 3)
    seeds, places = np.divmod(np.arange(10_000), 100)
    grid = uniforms(seeds.tolist(), places.tolist()).reshape(100, 100)
    assert grid[17, 41] == uniform(17, 41) == plain_uniform(17, 41)
    assert 0 <= grid.min() < grid.max() < 1
    assert abs(grid.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03


# Single properties:


def test_seeds() -> None:
    def ids(seed: int | None) -> list[int]:
        one = state(seed=seed)
        return [draw(logits(i), one).id for i in range(30)]

    assert ids(7) == ids(7)
    assert ids(7) != ids(8)
    assert ids(None) != ids(None)


def test_bad_words_name_texts_and_ids() -> None:
    params = SamplingParams(bad_words=(" ab", (7, 8), "c"))
    assert bad_sequences(params, lambda text: [ord(letter) for letter in text]) == [
        (97, 98), (32, 97, 98), (7, 8), (99,), (32, 99),
    ]  # fmt: skip
    one = SamplingState(SamplingParams(temperature=0), [5], [(5, 6), (6, 7, 8), (9,)])
    x_V = torch.zeros(V)
    x_V[9], x_V[6], x_V[8] = 5.0, 4.0, 3.0
    assert draw(x_V, one).id == 6  # 9 is banned; 5 6 is not: the 5 is the prompt's
    one.take(7)
    assert draw(x_V, one).id == 6  # 6 7 8 would end here, but 8 is not the likeliest
    one.take(7)
    x_V[6] = 0
    assert draw(x_V, one).id != 8
    one.take(7)
    assert draw(x_V, one).id == 8  # 7 8 without the 6


def test_rows_that_cannot_be_drawn_spoil_no_other() -> None:
    """NaN, infinity, and nothing left to choose; greedy and not."""
    cases: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_p": 0.5}, {"logprobs": 1}, {"presence_penalty": 0.3}]
    for bad in (math.nan, math.inf, -math.inf):
        for case in cases:
            x_RV = torch.stack([logits(i) for i in range(3)])
            if bad == -math.inf:
                x_RV[1] = bad
            else:
                x_RV[1, 4] = bad
            rows = [Row(state(seed=i, **case)) for i in range(3)]
            chosen = sample(x_RV, rows)
            assert chosen[1] is None
            for i in (0, 2):
                assert ids_of([chosen[i]]) == ids_of(sample(x_RV[i : i + 1], rows[i : i + 1]))
            assert distribution(x_RV, rows).isnan().all(-1).tolist() == [False, True, False]


def test_token_logprobs() -> None:
    x_NV = torch.stack([logits(i) for i in range(4)])
    for alternatives in (0, 3):
        for row, x_V, token in zip(token_logprobs(x_NV, [1, 2, 3, 4], alternatives), x_NV, [1, 2, 3, 4], strict=True):
            assert row.id == token
            check_logprobs(row, x_V, alternatives)
    assert token_logprobs(x_NV[:0], [], 2) == []


def test_half_precision_logits() -> None:
    x_RV = torch.stack([logits(i) for i in range(3)]).bfloat16()
    rows = [Row(state(seed=i, top_k=5)) for i in range(3)]
    assert ids_of(sample(x_RV, rows)) == ids_of(sample(x_RV.float(), rows))


def test_masked_tokens_are_never_chosen() -> None:
    x_V = torch.full((1000,), -math.inf)
    x_V[[4, 11, 999]] = 0.0
    for case in ({}, {"top_k": 100}, {"top_p": 0.99}):
        chosen = sample(x_V.expand(60, -1), [Row(state(seed=i, **case)) for i in range(60)])
        assert {one.id for one in chosen if one} == {4, 11, 999}


BAD = [
    ("temperature", math.nan), ("temperature", math.inf), ("temperature", -0.1), ("temperature", "1"),
    ("temperature", True), ("top_p", 0.0), ("top_p", 1.5), ("top_p", math.nan), ("top_k", -2), ("top_k", 1.5),
    ("min_p", -0.1), ("min_p", 2), ("max_tokens", 0), ("max_tokens", -4), ("max_tokens", 2.5), ("seed", 1 << 64),
    ("seed", "x"), ("logprobs", -1), ("logprobs", 21), ("prompt_logprobs", 30), ("presence_penalty", 3),
    ("frequency_penalty", -2.5), ("frequency_penalty", math.nan), ("repetition_penalty", 0.0), ("stop", ("",)),
    ("stop", "word"), ("stop", tuple("abcdefghijklmnopqrs")), ("stop_token_ids", (-1,)), ("logit_bias", {-1: 0.0}),
    ("logit_bias", {1: 101}), ("logit_bias", {1: math.nan}), ("bad_words", "word"), ("bad_words", ("",)),
    ("bad_words", ((),)), ("bad_words", ((1, -1),)), ("bad_words", (3,)), ("bad_words", ("a",) * 1001),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_impossible_values_name_their_field(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_ids_beyond_the_vocabulary() -> None:
    for name, value in (("stop_token_ids", (V,)), ("logit_bias", {V: 1.0}), ("bad_words", ((1, V),))):
        with pytest.raises(RequestError, match="vocabulary") as caught:
            SamplingParams(**{name: value}).check_vocabulary(V)
        assert caught.value.param == name


def test_every_field_is_documented_and_frozen() -> None:
    assert all(SamplingParams.documentation().values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 2.0  # type: ignore[misc]
