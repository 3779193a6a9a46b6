"""Two engines behind one front: prompts go where their beginnings are, and one that dies takes nobody else along."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from http_tools import JSON, LONG, call, metric, post, wait_for
from test_restart import stream

from soma.base.errors import UserError
from soma.engine.replicas import Replicas
from soma.serve.options import ServeOptions
from soma.serve.running import running_service
from soma.serve.server import serve

SHORT = {**LONG, "max_tokens": 3}


@pytest.fixture(scope="module")
def url(tiny_folder: Path) -> Iterator[str]:
    with running_service(tiny_folder, replicas=2, max_running=8, max_waiting=4) as url:
        yield url


def engines_of(url: str) -> list[psutil.Process]:
    port = urlsplit(url).port
    for process in psutil.Process().children():
        if any(link.status == "LISTEN" and link.laddr.port == port for link in process.net_connections()):
            return sorted(process.children(), key=lambda each: each.create_time())
    raise AssertionError("nobody listens there")


def each(url: str, name: str, **labels: str) -> list[float]:
    """A metric of both engines."""
    return [metric(url, name, engine=number, **labels) for number in "01"]


def idle(url: str) -> bool:
    return metric(url, "vllm:num_requests_running") + metric(url, "vllm:num_requests_waiting") == 0


def test_a_conversation_stays_where_its_beginning_is(url: str) -> None:
    """Also for the part of it that the engine made itself."""
    made = each(url, "vllm:generation_tokens_total")
    talks = [[5 + start] * 20 for start in range(4)]
    for turn in range(3):
        for talk in talks:
            body = {**LONG, "prompt": talk, "max_tokens": 100, "temperature": 0, "logprobs": 0}
            status, value = post(url, "/v1/completions", body)
            assert status == 200
            assert value["usage"]["completion_tokens"] == 100
            text = value["choices"][0]["text"]
            talk += post(url, "/tokenize", {"prompt": text})[1]["tokens"] + [7 + turn] * 3
    now = each(url, "vllm:generation_tokens_total")
    assert [after - before for before, after in zip(made, now, strict=True)] == [600, 600]
    hits, asked = (metric(url, f"vllm:prefix_cache_{name}_total") for name in ("hits", "queries"))
    assert hits > 0.3 * asked, (hits, asked)


def test_load_is_spread_and_the_bound_is_that_of_all(url: str) -> None:
    """24 requests fit into both engines; prompts without a common beginning go to the idler one."""
    body = {**LONG, "prompt": [[number] for number in range(4, 28)], "stream": True}

    async def run() -> None:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await reader.readuntil(b"data: ")
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        assert await asyncio.to_thread(wait_for, lambda: [each(url, name) for name in names] == [[8, 8], [4, 4]])
        status, headers, answer = await asyncio.to_thread(call, url, "POST", "/v1/completions", json.dumps(SHORT), JSON)
        assert status == 429
        assert json.loads(answer)["error"]["code"] == "queue_full"
        assert int(headers["retry-after"]) >= 1
        writer.transport.abort()

    asyncio.run(run())
    assert wait_for(lambda: idle(url))


def test_one_engine_killed_under_streams(url: str) -> None:
    """Its streams end with an error event; those of the other, and requests that had no answer yet, notice nothing."""
    errors = metric(url, "vllm:request_success_total", finished_reason="error")
    victim, other = engines_of(url)

    async def run() -> list[bytes]:
        started = asyncio.Semaphore(0)
        changes = [{"prompt": [5 + number] * 3, "max_tokens": 600} for number in range(10)]
        clients = [asyncio.create_task(stream(url, started, **change)) for change in changes]
        for _ in clients:
            await started.acquire()
        victim.suspend()  # what it is given from now on waits in it, and is lost with it
        given = metric(url, "vllm:prompt_tokens_total")
        body = {**LONG, "max_tokens": 200}  # long enough to be there together, so that both engines get some
        posts = [asyncio.create_task(asyncio.to_thread(post, url, "/v1/completions", body)) for _ in range(4)]
        arrived = await asyncio.to_thread(wait_for, lambda: metric(url, "vllm:prompt_tokens_total") >= given + 4)
        assert arrived
        assert not all(task.done() for task in posts)
        vector = asyncio.create_task(asyncio.to_thread(post, url, "/v1/embeddings", {"model": "tiny", "input": [9]}))
        victim.kill()
        meanwhile: list[tuple[int, Any]] = []
        while not all(client.done() for client in clients):
            meanwhile.append(await asyncio.to_thread(post, url, "/v1/completions", SHORT))
        moved = await asyncio.gather(*posts)
        assert {status for status, _ in meanwhile + moved} == {200}
        assert {value["usage"]["completion_tokens"] for _, value in moved} == {200}
        assert (await vector)[0] == 200
        return await asyncio.gather(*clients)

    answers = asyncio.run(run())
    assert call(url, "GET", "/health")[0] == 200
    ends = []
    for answer in answers:
        events = [line[6:] for line in answer.decode().splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        last = json.loads(events[-2])
        if "error" in last:
            assert (last["error"]["code"], last["error"]["type"]) == ("engine_restarting", "service_unavailable_error")
            assert "send the request again" in last["error"]["message"]
        else:
            assert last["choices"][0]["finish_reason"] == "length"
        ends.append("error" in last)
    assert sorted(ends) == [False] * 5 + [True] * 5
    assert metric(url, "vllm:request_success_total", finished_reason="error") == errors + 5
    assert wait_for(lambda: len(engines_of(url)) == 2 and engines_of(url)[0].pid == other.pid)

    def is_used_again() -> bool:  # of equally idle engines the one with the emptier cache
        made = metric(url, "vllm:generation_tokens_total", engine="0")
        assert post(url, "/v1/completions", SHORT)[0] == 200
        return metric(url, "vllm:generation_tokens_total", engine="0") > made

    assert wait_for(is_used_again, 30)


@pytest.mark.slow
def test_none_left_is_a_503_until_one_is_back(url: str) -> None:
    for engine in engines_of(url):
        engine.kill()
    assert wait_for(lambda: call(url, "GET", "/health")[0] == 503)
    status, headers, data = call(url, "POST", "/v1/completions", json.dumps(SHORT), JSON)
    assert status == 503
    assert 1 <= int(headers["retry-after"]) < 600  # as long as an engine took to load
    assert json.loads(data)["error"]["code"] == "engine_restarting"
    assert wait_for(lambda: call(url, "GET", "/health")[0] == 200)
    assert post(url, "/v1/completions", SHORT)[0] == 200
    status, value = post(url, "/v1/embeddings", {"model": "tiny", "input": ["hello", "you"]})
    assert (status, len(value["data"])) == (200, 2)


def test_wrong_numbers(tiny_folder: Path) -> None:
    for options in ({"replicas": 0}, {"replicas": 2, "in_process": True}):
        with pytest.raises(UserError, match="replicas"):
            serve(tiny_folder, ServeOptions(**options))  # type: ignore[arg-type]


def test_one_that_cannot_start_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Started:
        def __init__(self, model_ref: str, *, launched: int, **options: Any) -> None:
            if launched == 2:
                raise UserError("the disk is full")
            self.number = launched

        def close(self) -> None:
            closed.append(self.number)

    monkeypatch.setattr("soma.engine.replicas.EngineProcess", Started)
    with pytest.raises(UserError, match="the disk is full"):
        Replicas("model", [1, 2, 3])  # type: ignore[list-item]
    assert closed == [1, 3]
