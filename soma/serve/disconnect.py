"""A client that leaves before its answer is there."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.requests import Request

AT_ONCE = 0.01  # seconds in which nobody is watched for leaving: most short answers are there
CLIENT_CLOSED_REQUEST = 499  # nginx's name for a client that left; nobody reads it


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, or None if the client left before (then `work` is cancelled)."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watch: asyncio.Future[None] | None = None
    try:
        await asyncio.wait({task}, timeout=AT_ONCE)
        if not task.done():
            watch = asyncio.ensure_future(left())
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        task.cancel()
        if watch is not None:
            watch.cancel()
