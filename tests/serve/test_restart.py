"""kill -9 of the engine process under load: every client is told, and service resumes by itself."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from http_tools import JSON, LONG, call, metric, post, wait_for
from prometheus_client.parser import text_string_to_metric_families

from soma.serve.running import running_service

STREAMS = 50
SHORT = {**LONG, "max_tokens": 3}


@pytest.fixture(scope="module")
def url(tiny_folder: Path) -> Iterator[str]:
    with running_service(tiny_folder, max_running=64) as url:
        yield url


def engine_of(url: str) -> psutil.Process:
    """The engine process of the service at `url`: the child of whoever listens there."""
    port = urlsplit(url).port
    for process in psutil.Process().children():
        if any(link.status == "LISTEN" and link.laddr.port == port for link in process.net_connections()):
            (engine,) = process.children()
            return engine
    raise AssertionError("nobody listens there")


async def stream(url: str, started: asyncio.Semaphore, stream: bool = True, **changes: Any) -> bytes:
    """All that one client gets, head and body."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 24)
    body = json.dumps({**LONG, "stream": stream, **changes}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"  # noqa: E501
    writer.write(head.encode() + body)
    first = await reader.readuntil(b"data: ") if stream else b""
    started.release()
    rest = await reader.read()
    writer.close()
    return first + rest


def test_every_client_is_told_and_service_resumes(url: str) -> None:
    errors = metric(url, "vllm:request_success_total", finished_reason="error")
    engine = engine_of(url)

    async def run() -> tuple[list[bytes], bytes]:
        started = asyncio.Semaphore(0)
        clients = [asyncio.create_task(stream(url, started)) for _ in range(STREAMS)]
        whole = asyncio.create_task(stream(url, started, stream=False))
        for _ in range(STREAMS + 1):
            await started.acquire()
        running = "vllm:num_requests_running"  # what is not streamed too
        assert await asyncio.to_thread(wait_for, lambda: metric(url, running) == STREAMS + 1)
        engine.kill()
        return await asyncio.gather(*clients), await whole

    answers, whole = asyncio.run(run())
    refused, headers, data = call(url, "POST", "/v1/completions", json.dumps(SHORT), JSON)
    assert refused == 503
    assert 1 <= int(headers["retry-after"]) < 600  # as long as the engine took to load
    assert json.loads(data)["error"]["code"] == "engine_restarting"
    assert call(url, "GET", "/health")[0] == 503
    assert call(url, "GET", "/metrics")[0] == 200
    assert post(url, "/tokenize", {"prompt": "hello"})[0] == 200
    for answer in answers:
        events = [line for line in answer.decode().splitlines() if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        error = json.loads(events[-2][6:])["error"]
        assert error["type"] == "service_unavailable_error"
        assert "send the request again" in error["message"]
        assert not any('"error"' in event for event in events[:-2])
    assert whole.startswith(b"HTTP/1.1 503")
    assert b"retry-after" in whole.lower()
    assert metric(url, "vllm:request_success_total", finished_reason="error") == errors + STREAMS + 1
    assert wait_for(lambda: call(url, "GET", "/health")[0] == 200)
    assert engine_of(url).pid != engine.pid
    assert post(url, "/v1/completions", SHORT)[0] == 200
    assert metric(url, "vllm:num_requests_running") == 0


def test_a_client_that_does_as_it_is_told_notices_a_pause_only(url: str) -> None:
    """The openai client reads Retry-After: one call, killed engine, and an answer."""
    import openai

    os.kill(engine_of(url).pid, signal.SIGKILL)
    assert wait_for(lambda: call(url, "GET", "/health")[0] == 503)
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=100)
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=3).choices[0].finish_reason


def families(url: str) -> dict[str, Any]:
    text = call(url, "GET", "/metrics")[2].decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_the_names_that_dashboards_read(url: str) -> None:
    assert wait_for(lambda: call(url, "GET", "/health")[0] == 200)
    assert post(url, "/v1/completions", {**SHORT, "n": 2})[0] == 200
    found = families(url)
    kinds = {
        "num_requests_running": "gauge", "num_requests_waiting": "gauge", "kv_cache_usage_perc": "gauge",
        "time_to_first_token_seconds": "histogram", "inter_token_latency_seconds": "histogram",
        "e2e_request_latency_seconds": "histogram", "prompt_tokens": "counter", "generation_tokens": "counter",
        "request_success": "counter", "prefix_cache_queries": "counter", "prefix_cache_hits": "counter",
        "num_preemptions": "counter", "request_queue_time_seconds": "histogram",
        "request_prefill_time_seconds": "histogram", "request_decode_time_seconds": "histogram",
    }  # fmt: skip
    for name, kind in kinds.items():
        family = found[f"vllm:{name}"]
        assert family.type == kind
        samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        assert samples
        for sample in samples:
            assert sample.labels["model_name"] == "tiny"
            if kind == "counter":
                assert sample.name == f"vllm:{name}_total"
    reasons = {sample.labels.get("finished_reason") for sample in found["vllm:request_success"].samples}
    assert reasons >= {"stop", "length", "abort", "error"}


def test_cache_use_shows_while_requests_run(url: str) -> None:
    def usage() -> float:
        return float(families(url)["vllm:kv_cache_usage_perc"].samples[0].value)

    assert usage() == 0

    async def run() -> float:
        task = asyncio.create_task(stream(url, asyncio.Semaphore(0)))
        deadline, seen = time.monotonic() + 120, 0.0
        while not seen and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            seen = await asyncio.to_thread(usage)
        task.cancel()
        return seen

    assert 0 < asyncio.run(run()) <= 1
    assert wait_for(lambda: usage() == 0)


def test_an_engine_in_the_same_process(tiny_folder: Path) -> None:
    with running_service(tiny_folder, in_process=True) as url:
        with pytest.raises(ValueError, match="not enough values"):
            engine_of(url)
        assert post(url, "/v1/completions", SHORT)[0] == 200
        status, value = post(url, "/v1/embeddings", {"model": "tiny", "input": "hello"})
        assert (status, len(value["data"][0]["embedding"])) == (200, 64)
        assert families(url)["vllm:num_requests_running"].samples[0].value == 0
