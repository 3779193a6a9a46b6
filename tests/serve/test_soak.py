"""Many short requests, some cut off at a random moment: afterwards everything is as it was."""

import asyncio
import json
import random
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from http_tools import metric, wait_for
from tiny import make_model

from soma.serve.running import running_service

AT_ONCE = 24
GROWTH = 24 << 20  # bytes that a process may have gained after its warm-up: allocators keep some


async def one(host: str, port: int, draw: random.Random) -> str:
    """One request; of three clients one leaves at a random moment. What came of it."""
    chat = draw.random() < 0.5
    body: dict[str, object] = {
        "model": "tiny", "stream": draw.random() < 0.7, "max_tokens": draw.randrange(1, 24), "n": draw.choice([1, 2]),
        "stop": draw.choice([None, "e", ["the", "fox"]]), "logprobs": None,
    }  # fmt: skip
    words = "the quick brown fox " * draw.randrange(1, 12)
    body |= {"messages": [{"role": "user", "content": words}]} if chat else {"prompt": words}
    data = json.dumps(body).encode()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        if draw.random() < 0.33:
            try:
                await asyncio.wait_for(reader.read(), draw.random() * 0.08)
            except TimeoutError:
                return "left"
        answer = await reader.read()
        return answer.split(b" ", 2)[1].decode() if answer else "left"
    finally:
        writer.transport.abort()


async def soak(url: str, count: int, seed: int) -> dict[str, int]:
    """`count` requests, `AT_ONCE` at a time; how often each end came."""
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    draw, ends, left = random.Random(seed), {}, iter(range(count))

    async def client() -> None:
        for _ in left:
            end = await one(str(parts.hostname), int(parts.port or 0), draw)
            ends[end] = ends.get(end, 0) + 1

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return ends


def check(folder: Path, count: int) -> None:
    with running_service(folder, max_running=8, max_waiting=64) as url:
        port = urlsplit(url).port
        (front,) = [
            process
            for process in psutil.Process().children()
            if any(link.laddr.port == port and link.status == "LISTEN" for link in process.net_connections())
        ]
        processes = [front, *front.children()]
        assert len(processes) == 2

        def at_rest() -> bool:
            gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            return all(metric(url, f"vllm:{name}") == 0 for name in gauges)

        def state() -> list[tuple[int, int, int]]:
            assert wait_for(at_rest)
            assert wait_for(lambda: len(front.net_connections()) <= 2)  # the listener, perhaps a closing one
            return [(each.num_fds(), each.num_threads(), each.memory_info().rss) for each in processes]

        asyncio.run(soak(url, min(1000, max(100, count // 4)), 1))  # warm: caches, allocators, thread pools
        before = state()
        ends = asyncio.run(soak(url, count, 2))
        after = state()
        print(f"{count} requests: {ends}; descriptors, threads, resident bytes: {before} before, {after} after")
        assert set(ends) == {"200", "left"}, ends
        assert ends["200"] > count / 3
        assert ends["left"] > count / 20
        for (fds, threads, memory), (fds_now, threads_now, memory_now) in zip(before, after, strict=True):
            assert abs(fds_now - fds) <= 2
            assert threads_now <= threads + 4  # a pool may have grown
            assert memory_now <= memory + GROWTH
        assert [each.pid for each in front.children()] == [processes[1].pid]  # nothing was restarted


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers: most of the time goes into the service, which is what is tried here."""
    return make_model(tmp_path_factory.mktemp("small"))


def test_a_short_soak(small_folder: Path) -> None:
    check(small_folder, 200)


@pytest.mark.slow
def test_a_soak(small_folder: Path) -> None:
    check(small_folder, 10_000)
