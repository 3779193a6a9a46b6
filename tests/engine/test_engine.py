"""The engine: the right tokens, whatever else runs; fair turns; nothing lost and nothing left behind."""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_sampler import PlainSampler

from soma.base.errors import UserError
from soma.engine.batch import Batch
from soma.engine.engine import Engine
from soma.engine.errors import EngineClosedError, QueueFullError, RequestError
from soma.engine.params import SamplingParams, TokenLogprob
from soma.engine.request import Request, TokenEvent
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer

Make = Callable[..., Engine]


def greedy(count: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **more)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, 300) for _ in range(draw.randrange(1, 40))] for _ in range(count)]


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> Transformer:
    return load_model(tiny_folder)


def reference(
    model: Transformer, prompt: list[int], params: SamplingParams, count: int
) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities, the whole text computed anew for every token."""
    ids, values = list(prompt), []
    sampler = PlainSampler(params, prompt)
    for _ in range(count):
        with torch.no_grad():
            last_V = model(torch.tensor([ids]))[0, -1]
        token = sampler(last_V)
        values.append(float(torch.log_softmax(last_V, 0)[token]))
        ids.append(token)
    return ids[len(prompt) :], values


@pytest.mark.parametrize("chunk", [1, 7, 256])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_do_not_depend_on_company_or_chunks(
    make_engine: Make, plain: Transformer, chunk: int, temperature: float
) -> None:
    engine = make_engine(prefill_chunk=chunk, max_running=4)
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=12, ignore_eos=True, logprobs=2) for i in range(9)
    ]
    requests = engine.submit_all(prompts(9), params)
    for prompt, request, each in zip(prompts(9), requests, params, strict=True):
        done = request.result()
        ids, values = reference(plain, prompt, each, 12)
        assert done.ids == ids
        assert [row.logprob for row in done.logprobs] == pytest.approx(values, abs=1e-4)
        assert all(len(row.top) == 2 for row in done.logprobs)
        assert done.finish_reason == "length"


def test_prompt_logprobs(make_engine: Make, plain: Transformer) -> None:
    prompt = prompts(1, seed=4)[0] * 3
    engine = make_engine(prefill_chunk=5)
    done = engine.generate(prompt, greedy(1, prompt_logprobs=3))
    with torch.no_grad():
        right_TV = torch.log_softmax(plain(torch.tensor([prompt]))[0], -1)
    assert done.prompt_logprobs is not None
    assert done.prompt_logprobs[0] is None
    for place, row in enumerate(done.prompt_logprobs[1:], start=1):
        assert row is not None
        assert row.id == prompt[place]
        assert row.logprob == pytest.approx(float(right_TV[place - 1, row.id]), abs=1e-4)
        assert row.top[0][0] == int(right_TV[place - 1].argmax())


def test_text_joins_and_ends(make_engine: Make, tokenizer: Tokenizer, plain: Transformer) -> None:
    """End ids, stop ids, stop strings and ignore_eos, against the text of the tokens made without them."""
    engine = make_engine()
    prompt = tokenizer.encode("hello")
    ids, _ = reference(plain, prompt, greedy(1), 30)
    whole = engine.generate(prompt, greedy(30))
    assert whole.text == tokenizer.decode(ids)

    place = next(i for i in range(5, 30) if ids[i] not in ids[:i])
    by_id = engine.generate(prompt, greedy(30, stop_token_ids=(ids[place],)))
    assert (by_id.finish_reason, by_id.ids) == ("stop", ids[: place + 1])
    assert by_id.text == tokenizer.decode(ids[:place])

    text = whole.text
    stop = text[8:11]
    by_text = engine.generate(prompt, greedy(30, stop=(stop,)))
    assert (by_text.finish_reason, by_text.text) == ("stop", text[: text.index(stop)])
    assert len(by_text.ids) < 30


def test_end_of_text_ends(make_engine: Make, tokenizer: Tokenizer) -> None:
    engine = make_engine()
    prompt = tokenizer.encode("hello")
    end = tokenizer.eos_ids[0]
    bias = {end: 100.0}
    done = engine.generate(prompt, SamplingParams(temperature=0, logit_bias=bias, max_tokens=9))
    assert (done.ids, done.text, done.finish_reason) == ([end], "", "stop")
    done = engine.generate(prompt, SamplingParams(temperature=0, logit_bias=bias, max_tokens=9, ignore_eos=True))
    assert (len(done.ids), done.finish_reason) == (9, "length")


def test_bad_words(make_engine: Make, tokenizer: Tokenizer) -> None:
    """A text is not made, with or without a space before it; a sequence of ids is not, its parts are."""
    engine = make_engine()
    prompt = tokenizer.encode("hello")
    free = engine.generate(prompt, greedy(40))
    first, second = free.ids[10:12]
    held = engine.generate(prompt, greedy(40, bad_words=((first, second),)))
    assert held.ids[:11] == free.ids[:11]
    assert (first, second) in zip(free.ids, free.ids[1:], strict=False)
    assert (first, second) not in zip(held.ids, held.ids[1:], strict=False)
    fox = SamplingParams(temperature=0, max_tokens=5, logit_bias=dict.fromkeys(tokenizer.encode(" fox"), 90.0))
    assert "fox" in engine.generate(prompt, fox).text
    assert "fox" not in engine.generate(prompt, replace(fox, bad_words=("fox",))).text


@pytest.mark.parametrize("fault", ["logits", "state"])
def test_one_request_without_numbers_fails_alone(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """NaN in one row of logits, or a fault while one request's token is drawn."""
    engine = make_engine(prefix_cache=False)
    alone = [engine.generate(prompt, greedy(6)).ids for prompt in prompts(3)]
    real = engine.runner.step

    def step(batch: Batch) -> torch.Tensor:
        logits_RV = real(batch)
        for row, request in enumerate(engine.running):
            if request.prompt_ids == prompts(3)[1] and request.generated == 2:
                if fault == "logits":
                    logits_RV[row] = float("nan")
                else:
                    monkeypatch.setattr(request.sampling, "added", None)
        return logits_RV

    monkeypatch.setattr(engine.runner, "step", step)
    results = [request.result() for request in engine.submit_all(prompts(3), greedy(6))]
    assert [done.finish_reason for done in results] == ["length", "error", "length"]
    assert [results[0].ids, results[2].ids] == [alone[0], alone[2]]
    assert results[1].ids == alone[1][:2]


def test_streaming_is_safe_for_utf8(tokenizer: Tokenizer) -> None:
    """Bytes of one character come as one piece; the last, half character shows when the text ends."""
    wanted = tokenizer.encode("日本")
    for count in (1, 2, len(wanted)):
        request = Request([1], greedy(count), tokenizer, count, deliver=lambda _: None)
        pieces = [request.accept(TokenLogprob(token, 0.0)) for token in wanted[:count]]
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(wanted[:count])
        assert all("\ufffd" not in piece.text for piece in pieces[:-1])


def test_fair_turns(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step with a chunk of a long prompt also holds a token of each decoding request; prompts share the steps."""
    engine = make_engine(prefill_chunk=8)
    log: list[list[int]] = []
    started, asked = threading.Event(), threading.Event()
    step = engine.runner.step

    def logged(batch: Batch) -> torch.Tensor:
        log.append(batch.query_starts_S1.diff().tolist())
        if len(log) > 3:
            started.set()
            assert asked.wait(120)
        return step(batch)

    monkeypatch.setattr(engine.runner, "step", logged)
    decoding = engine.submit_all([[5, 6], [8, 9]], greedy(2000))
    assert started.wait(120)
    long = engine.submit_all([[7] * 400, [10] * 400], greedy(1))
    asked.set()
    for request in long:
        request.result()
    for request in decoding:
        request.cancel()
        request.result()
    chunks = [counts for counts in log[2:] if max(counts) > 1]
    assert len(chunks) >= 50
    assert all(counts.count(1) == 2 for counts in chunks)
    assert all(sorted(counts) == [1, 1, 8, 8] for counts in chunks[1:-2])


def test_random_arrivals_and_cancellations(make_engine: Make) -> None:
    """Every request ends once, and at the end every place and every token of cache is free."""
    engine = make_engine(max_running=3, max_waiting=200, prefill_chunk=16, cache_tokens=2048)
    draw = random.Random(1)
    live: list[Request] = []
    used: list[int] = []
    for _ in range(120):
        action = draw.random()
        if action < 0.6:
            prompt = [draw.randrange(4, 300) for _ in range(draw.randrange(1, 120))]
            live.append(engine.submit(prompt, SamplingParams(max_tokens=draw.randrange(1, 60), seed=3)))
        elif live:
            draw.choice(live).cancel()
        used.append(engine.pool.used)
        if draw.random() < 0.3:
            time.sleep(draw.random() * 0.01)
    for request in live:
        events = list(request)
        reasons = [event.finish_reason for event in events if event.finish_reason]
        assert len(reasons) == 1
        assert reasons[0] in ("stop", "length", "abort")
        assert request.events.empty()
    assert engine.idle
    assert engine.pool.used == 0
    assert max(used) <= 2048


def test_cancelled_in_the_queue(make_engine: Make) -> None:
    engine = make_engine(max_running=1)
    first, second = engine.submit([5], greedy(3000)), engine.submit([6], greedy(5))
    second.cancel()
    assert [event.finish_reason for event in second] == ["abort"]
    first.cancel()
    assert first.result().finish_reason == "abort"


def test_the_queue_is_bounded(make_engine: Make) -> None:
    engine = make_engine(max_running=1, max_waiting=2)
    requests = engine.submit_all([[5]] * 3, greedy(3000))
    with pytest.raises(QueueFullError) as caught:
        engine.submit([5], greedy(3))
    assert caught.value.retry_after >= 1
    for request in requests:
        request.cancel()
    assert [request.result().finish_reason for request in requests] == ["abort"] * 3
    assert engine.generate([5], greedy(3)).finish_reason == "length"


def test_all_or_none(make_engine: Make) -> None:
    engine = make_engine(max_running=1, max_waiting=1)
    with pytest.raises(QueueFullError):
        engine.submit_all([[5]] * 3, greedy(3))
    assert engine.idle


def test_one_failing_request_fails_alone(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    step = engine.runner.step

    def broken(batch: Batch) -> torch.Tensor:
        if batch.longest > 20:
            raise RuntimeError("secret inside")
        return step(batch)

    monkeypatch.setattr(engine.runner, "step", broken)
    good, bad = engine.submit([5], greedy(10)), engine.submit([6] * 18, greedy(10))
    assert good.result().finish_reason == "length"
    done = bad.result()
    assert done.finish_reason == "error"
    assert done.error is not None
    assert "secret" not in done.error
    assert len(done.ids) == 3
    assert engine.pool.used == 0
    assert engine.alive


def test_a_dead_thread_leaves_nobody_waiting(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    monkeypatch.setattr(engine, "_step", lambda: [][0])
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    assert engine.generate([5], greedy(3)).finish_reason == "error"
    assert not engine.alive
    with pytest.raises(EngineClosedError):
        engine.submit([5])


def test_a_failing_listener_is_cut_off(make_engine: Make) -> None:
    engine = make_engine()

    def fail(event: TokenEvent) -> None:
        raise ValueError("gone")

    engine.submit([5], greedy(50), fail)
    assert engine.generate([6], greedy(5)).finish_reason == "length"
    deadline = time.monotonic() + 120
    while not engine.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.pool.used == 0


def test_closing(make_engine: Make) -> None:
    engine = make_engine()
    request = engine.submit([5], greedy(60))
    engine.close(drain=True)
    assert request.result().finish_reason == "length"
    with pytest.raises(EngineClosedError):
        engine.submit([5])
    engine = make_engine()
    request = engine.submit([5], greedy(4000))
    engine.close()
    assert request.result().finish_reason == "abort"


def test_asyncio_stream_and_leaving_it(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, steps = make_engine(), []
    step = engine.runner.step
    monkeypatch.setattr(engine.runner, "step", lambda batch: steps.append(batch) or step(batch))

    async def run() -> list[int | None]:
        whole = [event.id async for event in engine.stream([5], greedy(8))]
        stream = engine.stream([5], greedy(4000))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        return whole

    assert asyncio.run(run()) == engine.generate([5], greedy(8)).ids
    deadline = time.monotonic() + 120
    while not engine.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.idle
    assert len(steps) < 4000  # of what was left behind


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([100_000], {}, "prompt"),
        ([5] * 64, {}, "prompt"),
        ([5] * 60, {"max_tokens": 5}, "max_tokens"),
        ([5], {"stop_token_ids": (5000,)}, "stop_token_ids"),
        ([5], {"logit_bias": {5000: 1.0}}, "logit_bias"),
    ],
)  # fmt: skip
def test_impossible_requests_name_the_field(
    make_engine: Make, prompt: list[int], params: dict[str, object], param: str
) -> None:
    engine = make_engine(max_length=64)
    with pytest.raises(RequestError) as caught:
        engine.submit(prompt, SamplingParams(**params))
    assert caught.value.param == param
    assert engine.idle


def test_the_answer_ends_where_the_context_does(make_engine: Make) -> None:
    engine = make_engine(max_length=64)
    done = engine.generate([5] * 60, SamplingParams(temperature=0, ignore_eos=True))
    assert (len(done.ids), done.finish_reason) == (4, "length")


def alone(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    return [engine.generate(prompt, greedy(count)).ids for prompt in prompts]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_same_tokens_however_it_runs(make_engine: Make, backend: str) -> None:
    """Alone, batched with others, in chunks of 5, behind a cached prefix, after preemption: the same greedy tokens."""
    draw = random.Random(7)
    prompts = [[draw.randrange(4, 300) for _ in range(draw.randrange(1, 90))] for _ in range(12)]
    plain = make_engine(prefix_cache=False, backend=backend)
    expected = alone(plain, prompts, 24)
    batched = [request.result().ids for request in plain.submit_all(prompts, greedy(24))]
    assert batched == expected
    chunked = make_engine(prefill_chunk=5, backend=backend)
    assert [request.result().ids for request in chunked.submit_all(prompts, greedy(24))] == expected
    hits = chunked.stats()["prefix_cache_hits"]
    assert [request.result().ids for request in chunked.submit_all(prompts, greedy(24))] == expected
    assert chunked.stats()["prefix_cache_hits"] > hits
    tight = make_engine(cache_tokens=160, max_running=6, backend=backend)
    assert [request.result().ids for request in tight.submit_all(prompts, greedy(24))] == expected
    assert tight.stats()["preemptions"] > 0
    assert tight.pool.used == chunked.pool.used == 0


def test_equal_prompts_share_blocks(make_engine: Make) -> None:
    """Eight answers to one prompt of 96 tokens: its full blocks are computed and held once."""
    engine = make_engine()
    prompt = [5 + place % 90 for place in range(96)]
    used: list[int] = []
    requests = engine.submit_all([prompt] * 8, greedy(20), [lambda event: used.append(engine.pool.used)] * 8)
    while any(request.ended is None for request in requests):
        time.sleep(0.01)
    assert engine.stats()["prefix_cache_hits"] == 7 * 80  # the sixth block holds the last token, which is computed
    assert max(used) <= 5 + 8 * 3


def test_the_prompts_logprobs_survive_preemption(make_engine: Make) -> None:
    draw = random.Random(3)
    prompts = [[draw.randrange(4, 300) for _ in range(60)] for _ in range(4)]
    params = greedy(30, prompt_logprobs=2)
    roomy, tight = make_engine(), make_engine(cache_tokens=160, prefill_chunk=16)
    expected = [roomy.generate(prompt, params) for prompt in prompts]
    found = [request.result() for request in tight.submit_all(prompts, params)]
    for one, other in zip(expected, found, strict=True):
        assert one.ids == other.ids
        assert one.prompt_logprobs is not None
        assert other.prompt_logprobs is not None
        assert len(one.prompt_logprobs) == len(other.prompt_logprobs) == 60
        for a, b in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert a is not None
            assert b is not None
            assert (a.id, a.logprob) == (b.id, pytest.approx(b.logprob, abs=1e-4))


def test_a_request_that_is_late_ends(make_engine: Make) -> None:
    engine = make_engine()
    [request] = engine.submit_all([[5]], greedy(3000), timeout=0.05)
    done = request.result()
    assert (done.finish_reason, done.error) == ("error", "the request was not done in time")
    assert engine.pool.used == 0


def test_rounded_weights(tiny_folder: Path) -> None:
    """int8 and int4 run; what is neither is refused."""
    for weights in ("int8", "int4"):
        engine = Engine(load_model(tiny_folder), Tokenizer.load(tiny_folder), cache_tokens=1024, weights=weights)
        assert len(engine.generate([5, 6, 7], greedy(8)).ids) == 8
        engine.close()
    with pytest.raises(UserError, match="int3"):
        Engine(load_model(tiny_folder), Tokenizer.load(tiny_folder), weights="int3")
