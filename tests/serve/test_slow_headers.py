"""Who sends headers too slowly is hung up on; who is merely slow in other ways is not."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import soma.serve
from soma.serve import slow_headers
from soma.serve.http_server import http_config
from soma.serve.slow_headers import HeaderTimeout, LimitsHeaders

WHOLE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body, waits longer than headers may take, answers."""
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(2.5)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.asynccontextmanager
async def served(base: type) -> AsyncIterator[int]:
    kind: Any = type("Limited", (LimitsHeaders, base), {})
    config = uvicorn.Config(app, log_level="warning", lifespan="off", http=kind, port=0, timeout_keep_alive=30)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = server.force_exit = True
    await task


async def until_closed(port: int, *parts: bytes, answers: int = 0) -> bytes:
    """What comes back for these bytes until the service hangs up. answers: so many are awaited before the last part."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    with contextlib.suppress(ConnectionError):
        for place, part in enumerate(parts):
            while place == len(parts) - 1 and got.count(b"\r\n\r\nok") < answers:
                got += await reader.read(1000)
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)
        got += await asyncio.wait_for(reader.read(), 60)
        writer.close()
    return got


@pytest.mark.parametrize("base", [HttpToolsProtocol, pytest.param(H11Protocol, marks=pytest.mark.slow)])
def test_slow_headers_and_what_is_merely_slow(base: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, half a line, lines without an end, half of a second request: 408. An answer that takes longer than the
    limit, and headers in two parts, are left alone."""
    monkeypatch.setattr(slow_headers, "HEADER_SECONDS", 2.0)
    close = WHOLE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    async def run() -> None:
        async with served(base) as port:
            *slow, second, one, two = await asyncio.gather(
                until_closed(port), until_closed(port, b"GET / HTT"),
                until_closed(port, b"GET / HTTP/1.1\r\n", b"X: 1\r\n", b"Y: 2\r\n"),
                until_closed(port, WHOLE, b"GET / HTT", answers=1),
                until_closed(port, close), until_closed(port, close[:9], close[9:]),
            )  # fmt: skip
            assert all(each.startswith(b"HTTP/1.1 408") for each in slow)
            assert second.startswith(b"HTTP/1.1 200")
            assert second.endswith(slow_headers.ANSWER)
            assert [each.startswith(b"HTTP/1.1 200") and each.endswith(b"ok") for each in (one, two)] == [True, True]

    asyncio.run(run())


def test_without_the_limit_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: uvicorn's own class waits on."""
    monkeypatch.setattr(slow_headers, "HEADER_SECONDS", 0.05)
    monkeypatch.setattr(LimitsHeaders, "_wait_for_headers", lambda self: None)

    async def run() -> None:
        async with served(HttpToolsProtocol) as port:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(until_closed(port, b"GET / HTT"), 1)

    asyncio.run(run())


def test_every_listener_has_it() -> None:
    assert issubclass(HeaderTimeout, LimitsHeaders)
    assert http_config(FastAPI()).http is HeaderTimeout
    files = Path(soma.serve.__file__).parent.rglob("*.py")
    assert [path.name for path in files if "uvicorn.Config(" in path.read_text()] == ["http_server.py"]
