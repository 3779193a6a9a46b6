"""The playground of the admin page: chats with the service beside it, by a key of that service.

An admin key opens no model. A person gives one that does, and the chat goes to the service's own listener as anybody's
would: door, scopes, limits and ledger see it under that key, and nothing leads around them. Where it goes was fixed at
the start; nothing in a request changes it. To rules that count by address these calls come from this machine.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from soma.serve.admin.bodies import PlaygroundChat, ServiceKey
from soma.serve.disconnect import CLIENT_CLOSED_REQUEST, unless_disconnected
from soma.serve.errors import ApiError
from soma.serve.tokens import read_as

MAX_CHAT = 1 << 20  # bytes of a request
MAX_REFUSAL = 1 << 16  # bytes that are read of a refusal
CONNECT = 5.0  # seconds
BROKE_OFF = b'\n\ndata: {"error": {"message": "the service broke off"}}\n\n'


def install(app: FastAPI, url: str | None) -> None:
    """The routes. url: of the service, None: it answers no chats."""

    def where() -> str:
        if url is None:
            raise ApiError(404, "this service answers no chats", code="no_chat")
        return url

    @app.post("/api/playground/models")
    async def models(request: Request) -> dict[str, Any]:
        base, body = where(), await read_as(request, ServiceKey, MAX_CHAT)
        async with connected(body.key) as session:
            found = await (await ask(session, "GET", f"{base}/v1/models")).json()
        return {"data": [each["id"] for each in found["data"]]}

    @app.post("/api/playground/chat")
    async def chat(request: Request) -> Response:
        base, body = where(), await read_as(request, PlaygroundChat, MAX_CHAT)
        value = body.model_dump(exclude={"key"}) | {"stream": True, "stream_options": {"include_usage": True}}
        session = connected(body.key)
        try:
            work = ask(session, "POST", f"{base}/v1/chat/completions", value)
            answer: aiohttp.ClientResponse | None = await unless_disconnected(request, work)
        except BaseException:
            await session.close()
            raise
        if answer is None:
            await session.close()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return Forwarded(session, answer)


def connected(key: str) -> aiohttp.ClientSession:
    """For requests with that key; through no proxy, whatever the environment names."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT)
    return aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}, timeout=timeout, trust_env=False)


async def ask(
    session: aiohttp.ClientSession, method: str, url: str, value: dict[str, Any] | None = None
) -> aiohttp.ClientResponse:
    """The service's answer. Raises ApiError 502, whatever the service refuses with: the page's own key is good."""
    try:
        answer = await session.request(method, url, json=value, allow_redirects=False)
        if answer.status == 200:
            return answer
        said = await answer.content.read(MAX_REFUSAL)
    except aiohttp.ClientError:
        raise ApiError(502, "the service does not answer", code="service_away") from None
    try:
        words = f": {json.loads(said)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        words = ""
    raise ApiError(502, f"the service answers {answer.status}{words}", code="service_refused")


class Forwarded(StreamingResponse):
    """A stream of the service; when who reads it goes, the service sees that."""

    def __init__(self, session: aiohttp.ClientSession, answer: aiohttp.ClientResponse) -> None:
        super().__init__(pieces(answer), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.session = session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.session.close()


async def pieces(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """As they come."""
    try:
        async for piece in answer.content.iter_any():
            yield piece
    except aiohttp.ClientError:
        yield BROKE_OFF
