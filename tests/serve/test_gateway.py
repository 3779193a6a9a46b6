"""`soma gateway` before scripted upstreams: what clients and upstreams see of it, in good times and bad."""

import asyncio
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from aiohttp import web
from gateway_tools import RunningGateway, Scripted, running_gateway, until
from http_tools import metric

from soma.base.errors import UserError
from soma.serve.upstreams.config import Breaker, UpstreamConfig, read_config
from soma.serve.upstreams.pool import Budget, Upstream

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def first() -> Iterator[Scripted]:
    with Scripted(name="a") as made:
        yield made


@pytest.fixture(scope="module")
def second() -> Iterator[Scripted]:
    with Scripted(name="b") as made:
        yield made


@pytest.fixture(scope="module")
def config(first: Scripted, second: Scripted) -> dict[str, Any]:
    # On a slow machine a pause is over with each request, and each needs a retry.
    quick = {"breaker": {"failures": 2, "pause": "200ms"}, "health": None, "retry": {"budget": 1}}
    return {
        "models": {
            "m": {"upstreams": [{"url": first.url, "model": "there", "key_env": "UPSTREAM_KEY"}], **quick},
            "two": {"upstreams": [{"url": first.url, "weight": 3}, {"url": second.url}], **quick},
            "cheap": {"upstreams": [{"url": first.url, "cost": 2}, {"url": second.url, "cost": 1}], "routing": "cost",
                      **quick},
            "prefix": {"upstreams": [{"url": first.url}, {"url": second.url}], "routing": "prefix", **quick},
            "falls": {"upstreams": [{"url": "http://127.0.0.1:9/v1"}], "fallback": ["only-b"], **quick},
            "only-b": {"upstreams": [{"url": second.url}], **quick},
            "busy": {"upstreams": [{"url": second.url}], **quick},
            "slow-first": {"upstreams": [{"url": first.url}], **quick, "retry": {"attempts": 1},
                           "timeouts": {"first_token": "1s", "between_tokens": "60s"}},
            "slow-between": {"upstreams": [{"url": first.url}], **quick, "retry": {"attempts": 1},
                             "timeouts": {"first_token": "60s", "between_tokens": "300ms"}},
        },
        "limits": {"rules": [{"name": "tpm", "limit": 1_000_000, "window": "1d", "unit": "tokens",
                              "algorithm": "sliding_window_log"}]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def gateway(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPSTREAM_KEY", "sk-upstream")
        with running_gateway(tmp_path_factory.mktemp("gateway"), config) as made:
            yield made


@pytest.fixture(autouse=True)
def _fresh(first: Scripted, second: Scripted) -> None:
    for upstream in (first, second):
        upstream.seen, upstream.headers, upstream.cancelled, upstream.answer = [], [], 0, upstream.say
        upstream.tokens, upstream.pause = 3, 0.0


def ask(gateway: RunningGateway, path: str = "/v1/chat/completions", **changes: Any) -> httpx.Response:
    headers = {"Authorization": "Bearer sk-client"}
    return httpx.post(gateway.url + path, json={**CHAT, **changes}, headers=headers, timeout=60, trust_env=False)


def events(answer: httpx.Response) -> list[Any]:
    found = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert found[-1] == "[DONE]"
    return [json.loads(each) for each in found[:-1]]


def hold(upstream: Scripted) -> threading.Event:
    """Its next stream goes on until the event is set."""
    release = threading.Event()

    async def held(request: web.Request, value: dict[str, Any]) -> web.StreamResponse:
        made = await upstream.begin(request)
        while not release.is_set():
            await upstream.event(made, upstream.chunk("on "))
            await asyncio.sleep(0.05)
        await made.write(b"data: [DONE]\n\n")
        await made.write_eof()
        return made

    upstream.answer = held
    return release


def left(gateway: RunningGateway) -> int:
    """Tokens that the limit has left, without this request's own."""
    answer = ask(gateway, max_tokens=1)
    size = len(answer.request.content) // 4 + 1
    return int(answer.headers["x-ratelimit-remaining-tokens"]) + size


def test_the_openai_client(gateway: RunningGateway, first: Scripted) -> None:
    client = openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0)
    assert client.chat.completions.create(**CHAT).choices[0].message.content == "a"  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**CHAT, stream=True))  # type: ignore[call-overload]
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == "a0 a1 a2 "
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert chunks[-1].usage.completion_tokens == 3
    assert chunks[-1].choices == []
    assert [each.id for each in client.models.list()][:2] == ["m", "two"]
    assert [value["model"] for value in first.seen] == ["there"] * 3


def test_what_the_upstream_sees(gateway: RunningGateway, first: Scripted) -> None:
    """Its own key and not the client's, the name that the model has there, our id, and the wish for usage."""
    answer = ask(gateway, stream=True)
    (headers,) = first.headers
    assert headers["Authorization"] == "Bearer sk-upstream"
    assert headers["X-Request-Id"] == answer.headers["x-request-id"]
    assert first.seen[0]["stream_options"] == {"include_usage": True}
    assert not any("usage" in each or not each["choices"] for each in events(answer))
    wanted = ask(gateway, stream=True, stream_options={"include_usage": True})
    assert wanted.text.count('"usage": null') == 4  # as the upstream wrote it
    assert events(wanted)[-1]["usage"]["prompt_tokens"] == 7


def test_reserved_and_settled(gateway: RunningGateway) -> None:
    """What the upstream says was used, streamed or not: 7 for the prompt and 3 made."""
    before = left(gateway)
    ask(gateway)
    ask(gateway, stream=True)
    assert before - left(gateway) == 10 + 20


def test_without_usage_it_is_an_estimate(gateway: RunningGateway, first: Scripted) -> None:
    async def silent(request: web.Request, value: dict[str, Any]) -> web.StreamResponse:
        return await first.say(request, {**value, "stream_options": None})

    before = left(gateway)
    first.answer = silent
    answer = ask(gateway, stream=True)
    assert len(events(answer)) == 4
    first.answer = first.say
    used = before - left(gateway) - 10
    assert used == len(answer.request.content) // 4 + 4  # a token for four bytes of prompt and one for each event


@pytest.mark.parametrize("status", [400, 401, 422])
def test_the_clients_own_mistakes_are_not_tried_twice(gateway: RunningGateway, first: Scripted, status: int) -> None:
    async def refuse(request: web.Request, value: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"message": "no"}}, status=status)

    before = left(gateway)
    first.seen, first.answer = [], refuse
    answer = ask(gateway)
    assert (answer.status_code, answer.json()) == (status, {"error": {"message": "no"}})
    assert len(first.seen) == 1
    first.answer = first.say
    assert before - left(gateway) == 10


@pytest.mark.parametrize("kind", ["status", "cut before a word", "no answer"])
@pytest.mark.parametrize("stream", [False, True])
def test_another_replica_answers(
    gateway: RunningGateway, first: Scripted, second: Scripted, kind: str, stream: bool
) -> None:
    async def fail(request: web.Request, value: dict[str, Any]) -> web.StreamResponse:
        if kind == "status":
            return web.Response(status=500)
        if kind == "cut before a word" and stream:
            made = await first.begin(request)
        assert request.transport
        request.transport.abort()
        return made if kind == "cut before a word" and stream else web.Response()

    until(lambda: ask(gateway, model="two").json()["choices"][0]["message"]["content"] == "a")
    first.seen, first.answer = [], fail
    for _ in range(3):
        answer = ask(gateway, model="two", stream=stream)
        assert answer.status_code == 200
        assert "b0" in answer.text if stream else answer.json()["choices"][0]["message"]["content"] == "b"
    assert 1 <= len(first.seen) <= 3


def test_the_breaker() -> None:
    """Two failures in a row: left alone, then one request on trial, and after each that fails a longer pause."""
    now = 100.0
    config = UpstreamConfig(url="http://127.0.0.1:9/v1")
    upstream = Upstream(config, Breaker(failures=2, pause=5), lambda: now)  # type: ignore[arg-type]
    upstream.failed()
    upstream.succeeded()
    upstream.failed()
    assert upstream.is_open
    upstream.failed()
    assert not upstream.is_open
    now += 5
    assert upstream.is_open
    upstream.begin()
    assert not upstream.is_open  # one on trial
    upstream.failed()
    upstream.end()
    now += 9.9
    assert not upstream.is_open
    now += 0.1
    assert upstream.is_open
    upstream.succeeded()
    upstream.begin()
    assert upstream.is_open
    upstream.checked(False)
    assert upstream.is_open
    upstream.checked(False)
    assert not upstream.is_open
    upstream.checked(True)
    assert upstream.is_open


def test_it_comes_back(gateway: RunningGateway, first: Scripted, second: Scripted) -> None:
    async def fail(request: web.Request, value: dict[str, Any]) -> web.Response:
        return web.Response(status=502)

    first.answer = fail
    for _ in range(8):
        assert ask(gateway, model="two").status_code == 200
    first.answer = first.say
    until(lambda: ask(gateway, model="two").json()["choices"][0]["message"]["content"] == "a")


def test_the_budget_of_retries() -> None:
    budget = Budget(0.5)
    assert [budget.spend() for _ in range(11)] == [True] * 10 + [False]
    budget.earn()
    assert not budget.spend()
    budget.earn()
    assert budget.spend()


def test_retry_after_is_obeyed_and_passed_on(gateway: RunningGateway, second: Scripted) -> None:
    async def busy(request: web.Request, value: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"message": "busy"}}, status=429, headers={"Retry-After": "60"})

    second.answer = busy
    answer = ask(gateway, model="busy")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
    again = ask(gateway, model="busy")
    assert again.status_code == 503
    assert 1 <= int(again.headers["retry-after"]) <= 60
    assert len(second.seen) == 1


def test_fallback(gateway: RunningGateway, second: Scripted) -> None:
    until(lambda: ask(gateway, model="only-b").status_code == 200)
    assert ask(gateway, model="falls").json()["choices"][0]["message"]["content"] == "b"


def test_weights_cost_and_prefix(gateway: RunningGateway, first: Scripted, second: Scripted) -> None:
    until(lambda: ask(gateway, model="two").json()["choices"][0]["message"]["content"] == "a")
    first.seen, second.seen = [], []
    for _ in range(16):
        ask(gateway, model="two")
    assert abs(len(first.seen) - 12) <= 2
    for _ in range(3):
        assert ask(gateway, model="cheap").json()["choices"][0]["message"]["content"] == "b"
    long = [[{"role": "user", "content": letter * 2000}] for letter in "xyzw"]
    homes = [ask(gateway, model="prefix", messages=each).json()["choices"][0]["message"]["content"] for each in long]
    assert set(homes) == {"a", "b"}
    for _ in range(2):
        for each, home in zip(long, homes, strict=True):
            answer = ask(gateway, model="prefix", messages=[*each, {"role": "user", "content": "more"}])
            assert answer.json()["choices"][0]["message"]["content"] == home


def test_a_stream_that_breaks_off(gateway: RunningGateway, first: Scripted) -> None:
    """The client has seen something: an error event, [DONE], and what was seen is counted."""

    async def cut(request: web.Request, value: dict[str, Any]) -> web.StreamResponse:
        made = await first.begin(request)
        await first.event(made, first.chunk("one "))
        await asyncio.sleep(0.1)
        assert request.transport
        request.transport.abort()
        return made

    first.answer = cut
    found = events(ask(gateway, stream=True))
    assert found[0]["choices"][0]["delta"]["content"] == "one "
    assert found[1]["error"]["code"] == "upstream_failed"
    assert len(first.seen) == 1


@pytest.mark.parametrize("when", ["first", "between"])
def test_timeouts(gateway: RunningGateway, first: Scripted, when: str) -> None:
    async def hang(request: web.Request, value: dict[str, Any]) -> web.StreamResponse:
        made = await first.begin(request)
        if when == "between":
            await first.event(made, first.chunk("one "))
        await asyncio.sleep(60)
        return made

    first.answer = hang
    answer = ask(gateway, model=f"slow-{when}", stream=True)
    if when == "first":
        assert answer.status_code == 503
    else:
        assert events(answer)[-1]["error"]["code"] == "upstream_failed"
    until(lambda: first.cancelled == 1)


def test_the_client_leaves(gateway: RunningGateway, first: Scripted) -> None:
    """The upstream's request is cancelled, and the reservation comes back."""
    before = left(gateway)
    first.tokens, first.pause = 10_000, 0.01
    with httpx.stream("POST", gateway.url + "/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 9000},
                      timeout=60, trust_env=False) as answer:  # fmt: skip
        next(answer.iter_lines())
    until(lambda: first.cancelled == 1)
    first.tokens, first.pause = 3, 0.0
    until(lambda: left(gateway) > before - 2000)
    until(lambda: metric(gateway.url, "soma:gateway_calls_total", outcome="abort") >= 1)


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [({"model": "none"}, 404, "model"), ({"model": 3}, 400, "model"), ({"max_tokens": -1}, 400, "max_tokens"),
     ({"n": "2"}, 400, "n")],
)  # fmt: skip
def test_bad_requests(
    gateway: RunningGateway, first: Scripted, changes: dict[str, Any], status: int, param: str
) -> None:
    answer = ask(gateway, **changes)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param
    assert first.seen == []


def test_reload_without_dropping_a_stream(
    config: dict[str, Any], tmp_path: Path, first: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sk-upstream")
    with running_gateway(tmp_path, config) as gateway:
        release = hold(first)
        with httpx.stream("POST", gateway.url + "/v1/chat/completions", json={**CHAT, "stream": True}, timeout=60,
                          trust_env=False) as answer:  # fmt: skip
            lines = answer.iter_lines()
            next(lines)
            models = {"new": config["models"]["only-b"]}
            gateway.file.write_text(yaml.safe_dump({"models": {"broken": {}}}))
            gateway.process.send_signal(signal.SIGHUP)
            gateway.file.write_text(yaml.safe_dump({**config, "models": models}))
            until(
                lambda: bool(gateway.process.send_signal(signal.SIGHUP)) or ask(gateway, model="new").status_code == 200
            )
            assert ask(gateway).status_code == 404
            release.set()
            assert list(lines)[-2] == "data: [DONE]"


def test_drain(config: dict[str, Any], tmp_path: Path, first: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM: not ready, new requests get 503, the stream that runs ends whole, and then the process."""
    monkeypatch.setenv("UPSTREAM_KEY", "sk-upstream")
    with running_gateway(tmp_path, config) as gateway:
        assert httpx.get(gateway.url + "/health/ready", timeout=60, trust_env=False).status_code == 200
        release = hold(first)
        with httpx.stream("POST", gateway.url + "/v1/chat/completions", json={**CHAT, "stream": True}, timeout=60,
                          trust_env=False) as answer:  # fmt: skip
            lines = answer.iter_lines()
            next(lines)
            gateway.process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(gateway.url + "/health/ready", timeout=60, trust_env=False).status_code == 503)
            assert httpx.get(gateway.url + "/health/live", timeout=60, trust_env=False).status_code == 200
            refused = ask(gateway)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["retry-after"] == "1"
            release.set()
            assert list(lines)[-2] == "data: [DONE]"
        assert gateway.process.wait(120) == 0


def calls_in(gateway: RunningGateway) -> float:
    text = httpx.get(gateway.url + "/metrics", timeout=60, trust_env=False).text
    return float(next(line for line in text.splitlines() if line.startswith("soma:gateway_running ")).split()[1])


def test_a_model_that_sleeps(config: dict[str, Any], tmp_path: Path) -> None:
    """Requests wait with heartbeats until an upstream is there; one more than may wait is refused."""
    with Scripted(name="s") as sleeper:
        sleeper.stop()
        model = {"upstreams": [{"url": sleeper.url}], "health": {"every": "100ms"},
                 "wake": {"waiting": 2, "heartbeat": "50ms"}}  # fmt: skip
        with running_gateway(tmp_path, {"models": {"m": model}}) as gateway:

            async def run() -> tuple[str, Any, int]:
                async with httpx.AsyncClient(base_url=gateway.url, timeout=60, trust_env=False) as client:

                    async def whole() -> Any:
                        return (await client.post("/v1/chat/completions", json=CHAT)).json()

                    async def stream() -> str:
                        nonlocal heard
                        text = ""
                        async with client.stream(
                            "POST", "/v1/chat/completions", json={**CHAT, "stream": True}
                        ) as answer:
                            async for part in answer.aiter_text():
                                text += part
                                heard = text.count(": waking")
                        return text

                    async def hear(more: int) -> None:
                        wanted = heard + more
                        while heard < wanted:
                            await asyncio.sleep(0.01)

                    heard = 0
                    tasks = asyncio.create_task(stream()), asyncio.create_task(whole())
                    while calls_in(gateway) < 2:
                        await asyncio.sleep(0.02)
                    await hear(3)  # by then both wait
                    third = await client.post("/v1/chat/completions", json=CHAT)
                    await asyncio.to_thread(sleeper.start)
                    return await tasks[0], await tasks[1], third.status_code

            text, value, third = asyncio.run(run())
            assert text.startswith(": waking\n\n")
            assert "s0 " in text
            assert text.endswith("data: [DONE]\n\n")
            assert value["choices"][0]["message"]["content"] == "s"
            assert third == 503


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: {}", "models: Dictionary should have at least 1"),
        ("models: {m: {upstreams: [{url: 'ftp://x'}]}}", "models.m.upstreams.0.url: expected as http://"),
        ("models: {m: {upstreams: [{url: 'http://u:p@x/v1'}]}}", "without user, password"),
        ("models: {m: {upstreams: [{url: 'http://x/v1'}], fallback: [n]}}", "models.m.fallback: 'n' is no other model"),
        ("models: {m: {upstreams: [{url: 'http://x/v1', key_env: NO_SUCH_KEY}]}}", "NO_SUCH_KEY is not set"),
        ("models: {m: {upstreams: [{url: 'http://x/v1'}]}}\nlimit: {}", "limit: Extra inputs"),
    ],
)
def test_a_file_that_makes_no_sense(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_config(file)
    assert words in str(caught.value)
