"""A gateway in a process of its own, and upstreams that do as they are told."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

CODE = (
    "import sys, logging; from pathlib import Path; from soma.serve.upstreams.server import serve_gateway; "
    "logging.basicConfig(level=logging.WARNING); "
    "serve_gateway(Path(sys.argv[1]), port=int(sys.argv[2]), ready=lambda url: print(url, flush=True))"
)


class RunningGateway:
    """Its process and its base URL."""

    def __init__(self, file: Path, port: int = 0) -> None:
        self.file = file
        self.process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(file), str(port)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        assert self.url, "the gateway did not come up"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def running_gateway(folder: Path, config: dict[str, Any]) -> Iterator[RunningGateway]:
    file = folder / "gateway.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    gateway = RunningGateway(file)
    try:
        yield gateway
    finally:
        gateway.end()


class Scripted:
    """An OpenAI-like upstream in a thread; by default it says `tokens` tokens, `pause` apart."""

    def __init__(self, tokens: int = 3, pause: float = 0.0, name: str = "u") -> None:
        self.tokens, self.pause, self.name = tokens, pause, name
        self.seen: list[dict[str, Any]] = []  # bodies
        self.headers: list[Any] = []
        self.open = self.cancelled = 0
        self.answer: Callable[[web.Request, dict[str, Any]], Any] = self.say
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.port = 0
        self.runner: web.AppRunner | None = None

    def __enter__(self) -> "Scripted":
        self.thread.start()
        self.start()
        return self

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(120)

    def stop(self) -> None:
        """Nobody listens at its address any more."""
        if self.runner is not None:
            asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(120)
            self.runner = None

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/{tail:.*}", self._handle)
        app.router.add_get("/v1/models", self._models)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": []})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        value = await request.json()
        self.seen.append(value)
        self.headers.append(request.headers)
        self.open += 1
        try:
            return await self.answer(request, value)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise
        finally:
            self.open -= 1

    async def say(self, request: web.Request, value: dict[str, Any]) -> web.StreamResponse:
        """An answer of `tokens` tokens."""
        usage = {"prompt_tokens": 7, "completion_tokens": self.tokens, "total_tokens": 7 + self.tokens}
        if not value.get("stream"):
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.name}}
            return web.json_response({"id": "x", "object": "chat.completion", "created": 1, "model": "there",
                                      "choices": [choice], "usage": usage})  # fmt: skip
        wants = (value.get("stream_options") or {}).get("include_usage")
        stream = await self.begin(request)
        for number in range(self.tokens):
            await self.event(stream, self.chunk(f"{self.name}{number} ", usage=None if wants else ...))
            if self.pause:
                await asyncio.sleep(self.pause)
        await self.event(stream, self.chunk(None, reason="stop", usage=None if wants else ...))
        if wants:
            await self.event(stream, {**self.chunk(None, usage=usage), "choices": []})
        await stream.write(b"data: [DONE]\n\n")
        await stream.write_eof()
        return stream

    @staticmethod
    async def begin(request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        return stream

    @staticmethod
    async def event(stream: web.StreamResponse, value: dict[str, Any]) -> None:
        await stream.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    @staticmethod
    def chunk(text: str | None, reason: str | None = None, usage: Any = ...) -> dict[str, Any]:
        choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": reason}
        more = {} if usage is ... else {"usage": usage}
        return {
            "id": "x",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "there",
            "choices": [choice],
            **more,
        }

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait for it; fails if it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
