"""Clients that stream from `soma serve`, for `benchmarks/engine.py`: all in this one process, see `worker.py`."""

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp
from worker import answer_requests


async def stream(session: aiohttp.ClientSession, url: str, prompt: list[int], count: int) -> int:
    """Tokens of one streamed answer, as its usage says; each event is parsed, as a client does."""
    body = {
        "model": "bench", "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    tokens = 0
    async with session.post(url, json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                usage = json.loads(line[6:]).get("usage")
                tokens = usage["completion_tokens"] if usage else tokens
    return tokens


async def stream_all(url: str, prompts: list[list[int]], count: int) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        start, cpu = time.perf_counter(), time.process_time()
        tokens = await asyncio.gather(*(stream(session, url, prompt, count) for prompt in prompts))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert tokens == [count] * len(prompts), tokens
    return {"seconds": seconds, "client_cpu_seconds": cpu}


def main() -> None:
    url = sys.argv[1]
    answer_requests({"stream": lambda prompts, count: asyncio.run(stream_all(url, prompts, count))})


if __name__ == "__main__":
    main()
