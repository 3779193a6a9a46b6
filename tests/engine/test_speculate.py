"""Speculation changes how fast tokens come, never which: the same tokens where they are fixed, the same distribution
where they are drawn."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from family_models import make
from speculating import draft_always
from test_every_family import NoTokenizer, preempt_often, results

from soma.engine import speculate
from soma.engine.adjust import Row
from soma.engine.draft import DraftModel
from soma.engine.engine import Engine
from soma.engine.params import SamplingParams, TokenLogprob
from soma.engine.request import Request
from soma.engine.sampling import distribution, uniforms
from soma.engine.speculate import verify
from soma.model.transformer import Transformer

V = 203


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """`start(model, draft, **options)`: an engine that drafts as much as it can, closed after the test.

    draft: "ngram", a Transformer, or None for no speculation.
    """
    made: list[Engine] = []

    def begin(model: Transformer, draft: str | Transformer | None, most: int = 4, **options: Any) -> Engine:
        engine = Engine(model, NoTokenizer(), **{"block_size": 4, "cache_tokens": 2048, **options})
        if draft is not None:
            draft_always(engine, draft, most)
        made.append(engine)
        return engine

    yield begin
    for engine in made:
        engine.close()
        assert engine.pool.used == 0
        assert engine.pool.available == engine.pool.num_blocks


def near(model: Transformer, noise: float) -> Transformer:
    """A draft model that often agrees with `model`."""
    other = make("llama")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs + noise * theirs.std() * torch.randn(mine.shape, generator=generator))
    return other.eval()


def repeating(count: int = 8) -> list[list[int]]:
    """Prompts in which much comes again."""
    draw = random.Random(3)
    found = []
    for _ in range(count):
        motif = [draw.randrange(V) for _ in range(draw.randrange(2, 9))]
        found.append((motif * 9)[: draw.randrange(5, 60)])
    return found


DRAFTS: dict[str, Callable[[], str | Transformer]] = {
    "ngram": lambda: "ngram",
    "same": lambda: make("llama"),
    "near": lambda: near(make("llama"), 0.03),
    "other": lambda: make("llama", seed=9),
}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("kind", ["greedy", "seeded", "penalties"])
def test_the_same_tokens_with_and_without(draft: str, kind: str, start: Callable[..., Engine]) -> None:
    """Greedy or by seed, with penalties, filters, stop ids and limits in the middle of a draft: the same tokens, also
    in small chunks and after preemptions."""
    more: dict[str, Any] = {
        "greedy": {"temperature": 0},
        "seeded": {"temperature": 0.4, "top_p": 0.9},
        "penalties": {"temperature": 0.3, "presence_penalty": 0.6, "repetition_penalty": 1.1, "frequency_penalty": 0.1,
                      "top_k": 20, "logit_bias": {5: 2.0}},
    }[kind]  # fmt: skip
    prompts = repeating()
    params = [
        SamplingParams(
            seed=i, max_tokens=3 + 4 * i, stop_token_ids=(7, 11, 12) if i % 2 else (), logprobs=1,
            prompt_logprobs=1 if i % 3 == 0 else None, **more,
        )
        for i in range(len(prompts))
    ]  # fmt: skip
    plain = [request.result() for request in start(make("llama"), None).submit_all(prompts, params)]
    for options in ({}, {"prefill_chunk": 5, "prefix_cache": False}, {"preempt": True}):
        preempt = options.pop("preempt", False)
        engine = start(make("llama"), DRAFTS[draft](), **options)
        if preempt:
            preempt_often(engine, random.Random(2))
        for mine, other in zip(plain, engine.submit_all(prompts, params), strict=True):
            done = other.result()
            assert done.ids == mine.ids
            assert done.finish_reason == mine.finish_reason
            assert (done.prompt_logprobs is None) == (mine.prompt_logprobs is None)
            for a, b in zip((done.prompt_logprobs or [])[1:], (mine.prompt_logprobs or [])[1:], strict=True):
                assert a is not None
                assert b is not None
                assert (a.id, a.logprob) == (b.id, pytest.approx(b.logprob, abs=1e-4))
            assert [row.logprob for row in done.logprobs] == pytest.approx(
                [row.logprob for row in mine.logprobs], abs=1e-4
            )
        figures = engine.stats()
        assert figures["draft_tokens"] > (20 if draft != "ngram" or kind == "greedy" else 3)
        assert figures["accepted_tokens"] <= figures["draft_tokens"]
        if draft == "same":
            assert figures["accepted_tokens"] >= 0.7 * figures["draft_tokens"]


def test_a_good_draft_saves_steps(start: Callable[..., Engine]) -> None:
    """The model as its own draft, greedy: every draft of four is right, so 41 tokens take 9 steps, not 41."""
    engine = start(make("llama"), make("llama"))
    engine.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=41))
    engine.close(drain=True)
    figures = engine.stats()
    assert figures["accepted_tokens"] == figures["draft_tokens"] == 32
    assert engine.speculator is not None
    assert engine.speculator.costs.steps == 9


# The distribution:

SMALL = 6  # a vocabulary that many draws cover
DRAWS = 4000


def tables(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a model and of a draft model for every text of up to two tokens behind the prompt, (1 + 6 + 36, 6)."""
    generator = torch.Generator().manual_seed(seed)
    rows = 1 + SMALL + SMALL**2
    return tuple(1.5 * torch.randn(rows, SMALL, generator=generator) for _ in range(2))  # type: ignore[return-value]


def row_of(text: list[int]) -> int:
    return 0 if not text else 1 + text[0] if len(text) == 1 else 1 + SMALL + SMALL * text[0] + text[1]


def one_step(params: SamplingParams, drafted: int, many: int = DRAWS) -> list[tuple[int, ...]]:
    """What a step with a draft of so many tokens gives each of many requests."""
    target_RV, draft_RV = tables(4)
    requests, chosen = [], []
    for number in range(many):
        request = Request([1], params, NoTokenizer(), 10)
        request.sampling.seed = number
        shadow = Request([1], params, NoTokenizer(), 10).sampling
        shadow.seed = number + speculate.DRAFT_STREAM
        requests.append((request, shadow))
    for _ in range(drafted):
        rows = [Row(shadow, tuple(request.draft)) for request, shadow in requests]
        logits_RV = draft_RV[[row_of(request.draft) for request, _ in requests]]
        q_RV = distribution(logits_RV, rows)
        for (request, _), token, q_V in zip(requests, speculate.sample(logits_RV, rows), q_RV, strict=True):
            assert token is not None
            request.draft.append(token.id)
            request.proposed = torch.cat([*([] if request.proposed is None else [request.proposed]), q_V[None]])
    rows_RV = target_RV[[row_of(request.draft[:i]) for request, _ in requests for i in range(drafted + 1)]]
    for tokens in verify([request for request, _ in requests], rows_RV):
        chosen.append(tuple(token.id for token in tokens if token is not None))
    return chosen


def p_value(counts: dict[int, int], expected_V: torch.Tensor) -> float:
    """Of Pearson's chi-square test; rare tokens (under 5 expected) go together, and where they are under 5 even so with
    the least of the others: below that the test is far from its distribution."""
    total = sum(counts.values())
    pairs = [(counts.get(token, 0), total * float(share)) for token, share in enumerate(expected_V)]
    common = [pair for pair in pairs if pair[1] >= 5]
    rare = sum(seen for seen, wanted in pairs if wanted < 5), sum(wanted for _, wanted in pairs if wanted < 5)
    if rare[1] >= 5 or (rare[1] > 0 and len(common) == 1):
        common.append(rare)
    elif rare[1] > 0:
        least = min(common, key=lambda pair: pair[1])
        common[common.index(least)] = least[0] + rare[0], least[1] + rare[1]
    else:
        assert rare[0] == 0, "a token of probability 0"
    statistic = sum((seen - wanted) ** 2 / max(wanted, 1e-9) for seen, wanted in common)
    degrees = torch.tensor((len(common) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))


def tally(texts: list[tuple[int, ...]], place: int, before: tuple[int, ...] = ()) -> dict[int, int]:
    found: dict[int, int] = {}
    for text in texts:
        if len(text) > place and text[:place] == before:
            found[text[place]] = found.get(text[place], 0) + 1
    return found


FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 4},
    {"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 1.3, "min_p": 0.1, "logit_bias": {2: -1.0}},
]


@pytest.mark.parametrize("more", FILTERS)
def test_rejection_sampling_gives_the_models_distribution(more: dict[str, Any]) -> None:
    """4,000 requests of seeds 0 to 3,999, drafts of two tokens: the first tokens, and the second behind each first one,
    are distributed as the model says (chi-square; none of about six tests below p = 1e-4)."""
    params = SamplingParams(max_tokens=9, **more)
    texts = one_step(params, drafted=2)
    target_RV, _ = tables(4)
    state = Request([1], params, NoTokenizer(), 10).sampling
    assert p_value(tally(texts, 0), distribution(target_RV[:1], [Row(state)])[0]) > 1e-4
    accepted = [text for text in texts if len(text) > 1]
    assert 0.1 * DRAWS < len(accepted) < 0.95 * DRAWS
    for first in range(SMALL):
        counts = tally(texts, 1, (first,))
        if sum(counts.values()) >= 40:
            expected_V = distribution(target_RV[[row_of([first])]], [Row(state, (first,))])[0]
            assert p_value(counts, expected_V) > 1e-4


@pytest.mark.parametrize("fault", ["accept all", "draw anew", "one random number"])
def test_a_broken_rule_fails_the_test(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: every draft accepted; a rejected token replaced by one of p instead of max(p - q, 0); the
    same random number for the draft and for its acceptance."""
    if fault == "accept all":
        monkeypatch.setattr(speculate, "uniforms", lambda seeds, positions: uniforms(seeds, positions) * 0)
    elif fault == "draw anew":
        real = speculate.residual
        monkeypatch.setattr(speculate, "residual", lambda p_NV, q_NV, u_N: real(p_NV, torch.zeros_like(q_NV), u_N))
    else:
        monkeypatch.setattr(speculate, "ACCEPT_STREAM", speculate.DRAFT_STREAM)
    texts = one_step(SamplingParams(temperature=1.0, max_tokens=9), drafted=2)
    target_RV, _ = tables(4)
    assert p_value(tally(texts, 0), torch.softmax(target_RV[0], 0)) < 1e-4


def test_the_random_numbers_are_those_of_the_place() -> None:
    """The same seeds give the same tokens, alone or with others."""
    params = SamplingParams(temperature=1.0, max_tokens=9)
    assert one_step(params, 2, many=40) == one_step(params, 2, many=400)[:40]


def test_rejection_by_hand() -> None:
    """p = (0.5, 0.5), q = (1, 0): the draft 0 is accepted with probability 0.5, else token 1 comes."""
    p_1V, q_1V = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    assert speculate.residual(p_1V, q_1V, torch.tensor([0.3])) == [1]
    params = SamplingParams(temperature=1.0, max_tokens=9, logprobs=2)
    seen = []
    for seed in range(200):
        request = Request([1], params, NoTokenizer(), 10)
        request.sampling.seed, request.draft, request.proposed = seed, [0], q_1V
        [tokens] = verify([request], torch.zeros(2, 2))
        assert all(token is not None and token.logprob == pytest.approx(math.log(0.5)) for token in tokens)
        seen.append([token.id for token in tokens if token is not None])
        u = uniforms([seed + speculate.ACCEPT_STREAM], [0])[0]
        assert (len(seen[-1]) == 2) == (u < 0.5)
    assert all(ids[0] == (0 if len(ids) == 2 else 1) for ids in seen)
    assert 70 < sum(len(ids) == 2 for ids in seen) < 130


def test_an_engine_with_a_draft_model_keeps_the_distribution(start: Callable[..., Engine]) -> None:
    """1,500 requests without a seed through the engine, a draft model beside it: the third tokens, behind the two
    likeliest ones, are distributed as the model says; drafts are accepted in part. What is below p = 1e-4 has to be so
    for 1,500 others too: of about eight tests that is once in ten million runs."""
    model = make("llama")
    bias = dict.fromkeys(range(8, V), -100.0)  # eight tokens are left
    params = SamplingParams(temperature=1.0, max_tokens=4, logit_bias=bias)
    engine = start(make("llama"), near(make("llama"), 0.15), max_waiting=2000, max_running=100)

    def answers() -> list[tuple[int, ...]]:
        return [tuple(ids) for ids in results(engine.submit_all([[5, 6, 7]] * 1500, params))]

    def misfits(texts: list[tuple[int, ...]], beginnings: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        found = []
        for before in beginnings:
            with torch.inference_mode():
                logits_V = model(torch.tensor([[5, 6, 7, *before]]))[0, -1, :8]
            if p_value(tally(texts, len(before), before), torch.softmax(logits_V, 0)) <= 1e-4:
                found.append(before)
        return found

    texts = answers()
    figures = engine.stats()
    assert 0.2 < figures["accepted_tokens"] / figures["draft_tokens"] < 0.98
    beginnings = sorted({text[:place] for text in texts for place in (0, 1, 2)})
    beginnings = [before for before in beginnings if sum(tally(texts, len(before), before).values()) >= 150]
    assert len(beginnings) >= 3
    if doubtful := misfits(texts, beginnings):
        assert not misfits(answers(), doubtful)


def test_nan_in_the_draft_or_the_model() -> None:
    """A model that gives NaN gives no token, in either rule."""
    params = SamplingParams(temperature=1.0, max_tokens=9)
    for proposed in (None, torch.full((1, 4), 0.25)):
        request = Request([1], params, NoTokenizer(), 10)
        request.draft, request.proposed = [0], proposed
        assert verify([request], torch.full((2, 4), float("nan"))) == [[None]]


def test_a_failing_draft_is_no_draft(start: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(make("llama"), make("llama"))
    expected = engine.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=9)).ids
    monkeypatch.setattr(DraftModel, "_forward", lambda self, active: [][0])
    assert engine.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=9)).ids == expected


def test_agreed() -> None:
    tokens = [TokenLogprob(id, 0.0) for id in (4, 5, 6)]
    assert speculate.agreed([4, 5], tokens) == tokens
    assert speculate.agreed([4, 9], tokens) == tokens[:2]
    assert speculate.agreed([9, 5], tokens) == tokens[:1]
    assert speculate.agreed([], tokens[:1]) == tokens[:1]
    assert speculate.agreed([4, 5], [tokens[0], None, tokens[2]]) == [tokens[0], None]
