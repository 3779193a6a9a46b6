"""The listener of the annotation page: the loopback alone, one person, one file."""

import json
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from soma.base import progress
from soma.base.errors import UserError
from soma.base.locks import Busy, lock
from soma.serve.annotate.session import Decision, Session
from soma.serve.http_server import http_config
from soma.serve.listener import base_url, check_host, listen

LOCAL = ("127.0.0.1", "localhost", "::1")
MAX_BODY = 1 << 22
POLICY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


def create_app(session: Session) -> FastAPI:
    """The page and what it asks."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    page = files("soma.serve.annotate").joinpath("page.html").read_text()

    @app.middleware("http")
    async def local_only(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        """Other sites that the browser has open must not ask, nor names that someone points at this machine."""
        origin = request.headers.get("origin")
        if not _is_local(request.headers.get("host", "")) or (origin and not _same(origin, request)):
            return JSONResponse({"error": "only the page itself, on this machine, may ask"}, 403)
        if request.method == "POST" and request.headers.get("content-type") != "application/json":
            return JSONResponse({"error": "JSON is expected"}, 415)
        if int(request.headers.get("content-length") or 0) > MAX_BODY:
            return JSONResponse({"error": "too long"}, 413)
        response = await proceed(request)
        response.headers.update(POLICY)
        return response

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> dict[str, bool]:
        return {"ok": True}

    @app.get("/api/session")
    async def summary() -> dict[str, Any]:
        return session.summary()

    @app.get("/api/items/{number}")
    async def item(number: int) -> Response:
        if not 0 <= number < len(session.items):
            return JSONResponse({"error": f"there is no item {number}"}, 404)
        return _json(session.item(number))

    @app.post("/api/items/{number}")
    async def decide(number: int, decision: Decision) -> Response:
        if not 0 <= number < len(session.items):
            return JSONResponse({"error": f"there is no item {number}"}, 404)
        try:
            session.decide(number, decision)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        except OSError as error:
            return JSONResponse({"error": f"{session.out.name} could not be written: {error.strerror}"}, 507)
        return JSONResponse({**session.summary(), "next": session.next(number)})

    @app.post("/api/undo")
    async def undo() -> dict[str, Any]:
        back = session.undo()
        return {**session.summary(), "back": back}

    return app


def _json(value: Any) -> Response:
    """JSON in ASCII: half a surrogate pair has no bytes in UTF-8."""
    return Response(json.dumps(value), media_type="application/json")


def _is_local(host: str) -> bool:
    return (urlsplit(f"//{host}").hostname or "") in LOCAL


def _same(origin: str, request: Request) -> bool:
    return urlsplit(origin).netloc == request.headers.get("host")


def serve_annotate(
    session: Session, host: str = "127.0.0.1", port: int = 8100, *, ready: Callable[[str], None] | None = None
) -> None:  # fmt: skip
    """Serve the page until SIGTERM or SIGINT. port 0 takes a free one; `ready` is called with the URL.

    Raises UserError: a host that other machines reach (nobody is asked for a key here), a port in use, a file that
    another such page writes.
    """
    check_host(host, allow_public=False)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(session.out.with_name(f".{session.out.name}.lock"), wait=False))
        except Busy as error:
            raise UserError(f"{session.out} is being written by another page ({error}): one at a time") from None
        listener = listen(host, port)
        stack.callback(listener.close)
        announce = ready or (lambda url: progress.current().note(f"annotate {session.source.name} at {url}"))
        _Server(http_config(create_app(session)), lambda: announce(base_url(listener))).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready()
