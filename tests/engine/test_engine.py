"""The engine: the right tokens, whatever else runs; fair turns; nothing lost and nothing left behind."""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soma.engine.engine import CachePool, Engine
from soma.engine.errors import EngineClosedError, QueueFullError, RequestError
from soma.engine.request import Request, TokenEvent
from soma.engine.sampling import Sampler, SamplingParams
from soma.model.cache import KVCache
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
    sampler = Sampler(params, prompt, model.config.vocab_size)
    for _ in range(count):
        with torch.no_grad():
            last_V = model(torch.tensor([ids]))[0, -1]
        token = sampler(last_V).id
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


def test_streaming_is_safe_for_utf8(make_engine: Make, tokenizer: Tokenizer) -> None:
    """Bytes of one character come as one piece; the last, half character shows when the text ends."""
    engine = make_engine()
    wanted = tokenizer.encode("日本")
    for count in (1, 2, len(wanted)):
        texts = []
        for step in range(count):
            bias = {wanted[step]: 100.0}
            texts.append(bias)
        request = Request(
            [1], greedy(count), tokenizer, engine.config.vocab_size, count, engine.device, deliver=lambda _: None
        )
        pieces = [request.accept(Sampler(greedy(1, logit_bias=bias), [], 400)(torch.zeros(400))) for bias in texts]
        assert "".join(piece.text for piece in pieces) == tokenizer.decode(wanted[:count])
        assert all("\ufffd" not in piece.text for piece in pieces[:-1])


def test_fair_turns(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two chunks of a long prompt every decoding request gets a step; two long prompts take turns."""
    engine = make_engine(prefill_chunk=8)
    log: list[tuple[str, int]] = []
    started = threading.Event()
    prefill, decode = engine.runner.prefill, engine.runner.decode

    def slow_prefill(ids: list[int], cache: KVCache) -> torch.Tensor:
        log.append(("prefill", id(cache)))
        return prefill(ids, cache)

    def slow_decode(token: int, cache: KVCache) -> torch.Tensor:
        log.append(("decode", id(cache)))
        started.set()
        return decode(token, cache)

    monkeypatch.setattr(engine.runner, "prefill", slow_prefill)
    monkeypatch.setattr(engine.runner, "decode", slow_decode)
    decoding = [engine.submit([5, 6], greedy(2000)) for _ in range(2)]
    assert started.wait(10)
    long = [engine.submit([7] * 400, greedy(1)) for _ in range(2)]
    for request in long:
        request.result()
    for request in decoding:
        request.cancel()
        request.result()
    chunks = [place for place, (kind, _) in enumerate(log) if kind == "prefill"][4:-2]
    assert len(chunks) > 80
    for before, after in itertools.pairwise(chunks):
        between = [who for kind, who in log[before + 1 : after] if kind == "decode"]
        assert len(between) == len(set(between)) == 2
        assert log[before][1] != log[after][1]


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
    assert sum(cache.capacity for cache in engine.pool.free) <= 2048
    assert all(cache.length == 0 for cache in engine.pool.free)


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
    decode = engine.runner.decode

    def broken(token: int, cache: KVCache) -> torch.Tensor:
        if cache.length >= 20:
            raise RuntimeError("secret inside")
        return decode(token, cache)

    monkeypatch.setattr(engine.runner, "decode", broken)
    good, bad = engine.submit([5], greedy(10)), engine.submit([6] * 18, greedy(10))
    assert good.result().finish_reason == "length"
    done = bad.result()
    assert done.finish_reason == "error"
    assert done.error is not None
    assert "secret" not in done.error
    assert len(done.ids) == 3
    assert engine.pool.used == 0
    assert engine.alive


def test_no_memory_for_a_cache(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()

    def none(capacity: int) -> KVCache:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.pool, "make", none)
    assert engine.generate([5], greedy(3)).finish_reason == "error"
    monkeypatch.undo()
    assert engine.generate([5], greedy(3)).finish_reason == "length"


def test_a_dead_thread_leaves_nobody_waiting(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    monkeypatch.setattr(engine, "_round", lambda: [][0])
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
    deadline = time.monotonic() + 5
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


def test_asyncio_stream_and_leaving_it(make_engine: Make) -> None:
    engine = make_engine()

    async def run() -> list[int | None]:
        whole = [event.id async for event in engine.stream([5], greedy(8))]
        stream = engine.stream([5], greedy(4000))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        return whole

    assert asyncio.run(run()) == engine.generate([5], greedy(8)).ids
    deadline = time.monotonic() + 5
    while not engine.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.idle


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


def test_cache_pool_reuses_and_respects_its_budget(tiny_folder: Path) -> None:
    config = load_model(tiny_folder).config
    pool = CachePool(lambda capacity: KVCache(config, 1, capacity), budget=1024, longest=700)
    assert [pool.size(tokens) for tokens in (1, 256, 257, 600)] == [256, 256, 512, 700]
    first, second = pool.take(200), pool.take(600)
    assert first is not None
    assert second is not None
    assert pool.take(100) is None  # 256 + 700 + 256 are too many
    pool.give(first)
    assert pool.take(10) is first
    pool.give(second)
    third = pool.take(500)  # the free cache of 700 makes room
    assert third is not None
    assert third.capacity == 512
    assert pool.used == 256 + 512
    assert pool.free == []
