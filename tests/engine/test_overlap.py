"""Tokens read one step late: the same answers as without, whoever joins, ends, is cancelled or loses its blocks."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from soma.engine import overlap
from soma.engine.batch import Batch
from soma.engine.engine import Engine
from soma.engine.overlap import NOTHING, UNSETTLED, Flight, can_overlap, draw
from soma.engine.params import SamplingParams
from soma.engine.request import Request
from soma.engine.sampling import Row, sample
from soma.model.tokenizer import Tokenizer

Make = Callable[..., Engine]


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, 300) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def settings(count: int, *, plain: bool) -> list[SamplingParams]:
    """All kinds of requests; with `plain` such as can be overlapped."""
    kinds = [
        {}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.3, "min_p": 0.05, "seed": 6},
        {"temperature": 1.0, "top_p": 0.8, "seed": 7}, {"temperature": 1.5, "top_k": 9, "seed": 8},
    ]  # fmt: skip
    if not plain:
        kinds += [{"repetition_penalty": 1.2}, {"logprobs": 2}]
    return [
        SamplingParams(**{"temperature": 0.0, "max_tokens": 1 + 17 * i % 45, **kinds[i % len(kinds)]}, ignore_eos=True)
        for i in range(count)
    ]  # fmt: skip


def answers(engine: Engine, texts: list[list[int]], params: list[SamplingParams]) -> list[tuple[list[int], str]]:
    done = [request.result() for request in engine.submit_all(texts, params)]
    assert engine.pool.used == 0
    return [(one.ids, one.finish_reason) for one in done]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk": 7, "max_running": 3}, {"cache_tokens": 112, "max_running": 8}]
)
def test_the_same_answers(make_engine: Make, plain: bool, options: dict) -> None:
    texts, params = prompts(24), settings(24, plain=plain)
    expected = answers(make_engine(), texts, params)
    engine = make_engine(overlap=True, **options)
    assert answers(engine, texts, params) == expected
    assert answers(engine, texts, params) == expected  # behind cached prefixes
    if "cache_tokens" in options:
        assert engine.stats()["preemptions"] > 0


@pytest.mark.parametrize("options", [{"max_running": 4}, {"cache_tokens": 112, "max_running": 8}])
def test_what_is_not_settled_on_the_device(make_engine: Make, monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    """Where the two likeliest tokens are too few, the host draws, and what the next step computed is dropped.

    Now and then a request that cannot overlap joins for two tokens.
    """
    texts, params = prompts(20), settings(20, plain=True)
    for place in range(5, 20, 5):
        params[place] = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=1)
    expected = answers(make_engine(), texts, params)
    monkeypatch.setattr(overlap, "WIDTH", 2)
    seen: list[int] = []
    read = Flight.read
    monkeypatch.setattr(Flight, "read", lambda self: seen.extend(found := read(self)) or found)
    engine = make_engine(overlap=True, **options)
    assert answers(engine, texts, params) == expected
    assert seen.count(UNSETTLED) > 30
    assert answers(engine, texts, params) == expected  # behind cached prefixes


def test_it_does_overlap(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps begin while the tokens before them are unread; one step too many for a stop, none for a limit."""
    engine = make_engine(overlap=True)
    step, unread, rows = engine.runner.step, [], []

    def counted(batch: Batch) -> torch.Tensor:
        unread.append(engine.flight is not None)
        rows.append(batch.num_tokens)
        return step(batch)

    monkeypatch.setattr(engine.runner, "step", counted)
    whole = engine.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)).ids
    assert unread == [False] + [True] * 11
    assert rows == [3] + [1] * 11
    rows.clear()
    place = next(i for i in range(2, 12) if whole[i] not in whole[:i])
    stopped = engine.generate(
        [5, 6, 7], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(whole[place],))
    )
    assert (stopped.ids, stopped.finish_reason) == (whole[: place + 1], "stop")
    assert len(rows) == place + 2
    rows.clear()
    engine.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0))
    assert unread[-2:] == [False, False]  # log-probabilities are not for this


def test_a_token_fed_to_the_wrong_place_is_noticed(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, params = prompts(6), settings(6, plain=True)
    expected = answers(make_engine(), texts, params)
    feed = Flight.feed
    monkeypatch.setattr(
        Flight, "feed", lambda self, tokens_T, requests, places: feed(self, tokens_T, requests[::-1], places)
    )
    assert answers(make_engine(overlap=True), texts, params) != expected


def test_cancelled_in_flight(make_engine: Make) -> None:
    engine = make_engine(overlap=True, cache_tokens=512)
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    texts = prompts(6, seed=3, longest=20)
    expected = make_engine().generate(texts[0], replace(params, max_tokens=40)).ids
    chosen = random.Random(1)
    seen: list[int] = []

    def stop(event) -> None:
        seen.append(event.id)
        if len(seen) == 9:
            for request in requests[1:]:
                request.cancel()

    lock = engine.changed
    with lock:  # nothing is delivered before `requests` is known
        requests = engine.submit_all(
            texts, [replace(params, max_tokens=40), *[params] * 5], [stop, *[lambda event: None] * 5]
        )
    while any(request.ended is None for request in requests):
        chosen.random()
    assert seen == expected
    assert {request.finish_reason for request in requests[1:]} == {"abort"}
    assert engine.generate(texts[0], replace(params, max_tokens=40)).ids == expected
    assert engine.pool.used == 0


def test_one_with_broken_logits_ends_alone(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, params = prompts(4, seed=8), SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    expected = [ids for ids, _ in answers(make_engine(), texts, [params] * 4)]
    engine = make_engine(overlap=True)
    step, count = engine.runner.step, 0

    def broken(batch: Batch) -> torch.Tensor:
        nonlocal count
        count += 1
        logits_RV = step(batch)
        if count == 4:
            logits_RV[2] = torch.nan
        return logits_RV

    monkeypatch.setattr(engine.runner, "step", broken)
    done = [request.result() for request in engine.submit_all(texts, params)]
    failed = [one for one in done if one.finish_reason == "error"]
    assert len(failed) == 1
    assert "FloatingPointError" in (failed[0].error or "")
    for one, ids in zip(done, expected, strict=True):
        assert one.ids == ids[: len(one.ids)]
        assert len(one.ids) in ((3,) if one in failed else (10,))


def test_a_step_that_fails_takes_only_those_at_fault(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, params = prompts(4, seed=8), SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    expected = [ids for ids, _ in answers(make_engine(), texts, [params] * 4)]
    engine = make_engine(overlap=True)
    step, count = engine.runner.step, 0

    def failing(batch: Batch) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 5 or (count > 5 and batch.num_sequences == 1 and batch.longest == len(texts[1]) + 4):
            raise RuntimeError("broken")
        return step(batch)

    monkeypatch.setattr(engine.runner, "step", failing)
    done = [request.result() for request in engine.submit_all(texts, params)]
    assert [one.finish_reason for one in done].count("error") >= 1
    for one, ids in zip(done, expected, strict=True):
        assert one.ids == ids[: len(one.ids)]
        assert len(one.ids) == (4 if one.finish_reason == "error" else 10)


def test_draws_are_the_samplers(tokenizer: Tokenizer) -> None:
    """Fresh logits, greedy and random rows, with and without a token that is still unread."""
    logits_RV = torch.randn(30, 400) * 3
    logits_RV[7] = torch.nan
    params = [one for one in settings(30, plain=True) if can_overlap(one)]
    requests = [Request([1, 2], one, tokenizer, 9) for one in params]
    assert len(requests) == 30
    assert not any(can_overlap(one) for one in settings(30, plain=False)[5::7])
    for pending in (0, 1):
        for request in requests:
            request.pending = pending
        rows = [Row(request.sampling, (0,) * pending) for request in requests]
        expected = [NOTHING if token is None else token.id for token in sample(logits_RV, rows)]
        assert draw(logits_RV, requests).tolist() == expected
