"""Every family gives the tokens of the plain `Transformer`, however a request runs.

In float32 they are the same tokens. The models are random, so the prompts are chosen: at every step of their answers
the likeliest token leads the next by more than `CLEAR`, far above what the order of additions moves (1e-5).
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from family_models import FAMILIES, V, make
from speculating import Guesses, draft_always

from soma.engine.backends.choose import why_not
from soma.engine.engine import Engine
from soma.engine.params import SamplingParams, TokenLogprob
from soma.engine.request import Completion, Request
from soma.engine.worker import NoText
from soma.model.transformer import Transformer

CLEAR = 2e-3
COUNT = 10  # tokens of an answer
BLOCK = 4
# bfloat16: at the first difference each side's token is in the other's top 5, and there at most so far below the
# likeliest in log-probability. Where a router's close call sends a token to another expert, logits move further.
BF16_BOUND, BF16_BOUND_EXPERTS = 0.25, 1.0


class NoTokenizer:
    """No text, no end."""

    eos_ids: tuple[int, ...] = ()

    def stream_decoder(self) -> NoText:
        return NoText()

    def encode(self, text: str) -> list[int]:
        return []


def greedy(count: int = COUNT, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, **more)


def answer(model: Transformer, prompt: list[int]) -> tuple[list[int], float]:
    """Greedy tokens, the whole text computed anew for each, and the smallest lead of a likeliest token."""
    ids, lead = list(prompt), float("inf")
    for _ in range(COUNT):
        best = model(torch.tensor([ids]))[0, -1].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :], lead


def clear_prompts(model: Transformer, count: int = 6) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 1 to 70 tokens, two of which begin alike, and their answers."""
    draw = random.Random(5)
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    lengths = [70, 1, 3, 33, 12, 50]
    with torch.inference_mode():
        while len(prompts) < count:
            prompt = [draw.randrange(V) for _ in range(lengths[len(prompts)])]
            if len(prompts) == 3:
                prompt[:21] = prompts[0][:21]
            ids, lead = answer(model, prompt)
            if lead > CLEAR:
                prompts.append(prompt)
                answers.append(ids)
    return prompts, answers


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """`start(model, **options)`: an engine of small blocks that is closed after the test."""
    made: list[Engine] = []

    def begin(model: Transformer, **options: Any) -> Engine:
        made.append(Engine(model, NoTokenizer(), **{"block_size": BLOCK, "cache_tokens": 1024, **options}))
        return made[-1]

    yield begin
    for engine in made:
        engine.close()
        assert engine.pool.used == 0
        assert engine.pool.available == engine.pool.num_blocks


def results(requests: list[Request]) -> list[list[int]]:
    return [request.result().ids for request in requests]


def backends_of(family: str) -> list[str]:
    return ["reference"] if why_not("native", make(family)) else ["native", "reference"]


def preempt_often(engine: Engine, draw: random.Random) -> None:
    """Before every third step or so, up to thirty times, a random request loses all it has computed."""
    scheduler, schedule = engine.scheduler, engine.scheduler.schedule

    def disturbed(now: float = 0.0) -> list[Any]:
        if scheduler.running and scheduler.preemptions < 30 and draw.random() < 0.4:
            scheduler.preempt(draw.choice(scheduler.running))
        return schedule(now)

    scheduler.schedule = disturbed  # type: ignore[method-assign]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_however_it_runs(family: str, start: Callable[..., Engine]) -> None:
    """Alone, batched with random others, in chunks of any size, on a prefix hit, after preemption, speculated (guesses,
    some of them wrong, and the model as its own draft model); in C and torch."""
    prompts, expected = clear_prompts(make(family))
    draw = random.Random(6)
    others = [[draw.randrange(V) for _ in range(draw.randrange(1, 60))] for _ in range(4)]
    for backend in backends_of(family):
        engine = start(make(family), prefix_cache=False, backend=backend)
        assert engine.runner.name == backend
        assert [engine.generate(prompt, greedy()).ids for prompt in prompts] == expected, "alone"
        company = [*prompts, *others]
        draw.shuffle(company)
        got = results(engine.submit_all(company, greedy()))
        assert [got[company.index(prompt)] for prompt in prompts] == expected, "batched"
        for chunk in (1, 3, draw.randrange(4, 40)):
            engine = start(make(family), prefill_chunk=chunk, backend=backend)
            assert results(engine.submit_all(prompts, greedy())) == expected, f"chunks of {chunk}"
        hits = engine.stats()["prefix_cache_hits"]
        assert results(engine.submit_all(prompts, greedy())) == expected, "prefix hit"
        assert engine.stats()["prefix_cache_hits"] >= hits + 100
        for prefix_cache in (True, False):
            engine = start(make(family), prefill_chunk=20, prefix_cache=prefix_cache, backend=backend)
            preempt_often(engine, draw)
            assert results(engine.submit_all(prompts, greedy())) == expected, "after preemption"
            assert engine.stats()["preemptions"] >= 3
        guesses = Guesses(dict(zip(map(tuple, prompts), expected, strict=True)), V)
        for draft in (guesses, make(family)):
            engine = start(make(family), prefill_chunk=20, backend=backend)
            draft_always(engine, draft, most=3)
            assert results(engine.submit_all(prompts, greedy())) == expected, "speculated"
            drafted, accepted = engine.stats()["draft_tokens"], engine.stats()["accepted_tokens"]
            if draft is guesses:
                assert 0.3 * drafted < accepted < 0.95 * drafted
            else:  # where blocks left the window before the draft model saw them, it misses what they told
                assert accepted > (0.3 if engine.scheduler.window else 0.95) * drafted


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_differs_in_close_calls_only(family: str, start: Callable[..., Engine]) -> None:
    """In bfloat16, batched and in chunks against alone: where the tokens part, both had the other's as a close call."""
    draw = random.Random(8)
    bound = BF16_BOUND_EXPERTS if make(family).config.num_experts else BF16_BOUND
    prompts = [[draw.randrange(V) for _ in range(draw.randrange(1, 60))] for _ in range(8)]
    for backend in backends_of(family):
        one = start(make(family, dtype=torch.bfloat16), prefix_cache=False, backend=backend)
        alone = [one.generate(prompt, greedy(logprobs=5)) for prompt in prompts]
        other = start(make(family, dtype=torch.bfloat16), prefill_chunk=7, backend=backend)
        for mine, request in zip(alone, other.submit_all(prompts, greedy(logprobs=5)), strict=True):
            assert_close_call(mine, request.result(), bound)


def assert_close_call(one: Completion, other: Completion, bound: float) -> None:
    assert len(one.ids) == len(other.ids)
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        if a.id != b.id:
            assert dict(b.top).get(a.id, -1e9) >= b.logprob - bound
            assert dict(a.top).get(b.id, -1e9) >= a.logprob - bound
            return


def test_a_wide_difference_is_no_close_call() -> None:
    """The negative control of the rule for bfloat16."""
    top = ((1, -0.5), (2, -0.6), (3, -2.0))
    mine = Completion([1], logprobs=[TokenLogprob(1, -0.5, top)])
    assert_close_call(mine, Completion([2], logprobs=[TokenLogprob(2, -0.5, ((2, -0.5), (1, -0.6)))]), 0.25)
    for token in (3, 4):
        with pytest.raises(AssertionError):
            assert_close_call(mine, Completion([token], logprobs=[TokenLogprob(token, -0.5, ((token, -0.5),))]), 0.25)


def test_prompts_are_needed(start: Callable[..., Engine]) -> None:
    """The negative control: the same tokens behind a prompt that differs in its first token are others."""
    prompts, expected = clear_prompts(make("llama"))
    engine = start(make("llama"))
    spoiled = [[(prompt[0] + 1) % V, *prompt[1:]] for prompt in prompts]
    got = results(engine.submit_all(spoiled, greedy()))
    assert sum(one != other for one, other in zip(got, expected, strict=True)) >= 4
