"""Models of a repository served without an engine of our own: REST and gRPC, health, keys, and nothing else."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI

from soma.base import progress
from soma.serve import errors
from soma.serve.addresses import TrustedProxies
from soma.serve.calls import Gates
from soma.serve.graphs.trace import Continued
from soma.serve.http_server import GRACE, Server, grpc_maker, http_config
from soma.serve.listener import base_url, check_host, listen
from soma.serve.v2 import rest
from soma.serve.v2.front import Alone, Front
from soma.serve.v2.repository import Repository

if TYPE_CHECKING:
    from soma.serve.keys.door import Guard


def create_app(
    repository: Repository, gates: Gates | None = None, *, allow_control: bool = False, guard: "Guard | None" = None
) -> FastAPI:  # fmt: skip
    """The application. `app.state.service` is its host, `app.state.v2` its front. guard: who asks for keys."""
    app = FastAPI(title="Soma", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = host = Alone(gates)
    app.state.v2 = front = Front(repository, host, allow_control=allow_control)
    if guard is not None:
        from soma.serve.keys.door import Door

        app.add_middleware(Door, guard=guard)
    app.add_middleware(Continued)
    errors.install(app)
    rest.install(app, front)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not front.ready:
            raise errors.ApiError(503, "not ready", retry_after=5)
        return {"status": "ok"}

    return app


def run(
    app: FastAPI, what: str, host: str, port: int, *, grpc_port: int | None = None, allow_public: bool = False,
    guard: "Guard | None" = None, grace: float = GRACE, ready: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT; options as of `soma.serve.options.ServeOptions`. guard: that of the app. Raises
    UserError."""
    check_host(host, allow_public=allow_public or guard is not None)
    listener = listen(host, port)
    try:
        url = base_url(listener)
        announce = ready or (lambda url: progress.current().note(f"{what} is served at {url}"))
        make_grpc = None if grpc_port is None else grpc_maker(app, host, grpc_port, guard, TrustedProxies(), "none")
        Server(http_config(app), app, grace, lambda: announce(url), make_grpc).run(sockets=[listener])
    finally:
        listener.close()
