"""The HTTP server that every service of ours runs on: uvicorn, ended without breaking off answers, with gRPC beside."""

import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from soma.base.errors import UserError
from soma.serve.addresses import TrustedProxies
from soma.serve.slow_headers import HeaderTimeout
from soma.serve.v2.repository import Repository

if TYPE_CHECKING:
    from soma.serve.keys.door import Guard
    from soma.serve.v2.grpc_server import GrpcServer

GRACE = 30.0  # seconds that running answers get after SIGTERM


def http_config(app: FastAPI, **more: Any) -> uvicorn.Config:
    """uvicorn's settings for an application; `more`: further ones."""
    return uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, lifespan="off", http=HeaderTimeout,
        **more,
    )  # fmt: skip


class Server(uvicorn.Server):
    """uvicorn, but SIGTERM first lets running answers end while new requests get 503; a second signal ends it all."""

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, grace: float, ready: Callable[[], None],
        make_grpc: "Callable[[], GrpcServer] | None" = None,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.make_grpc = make_grpc
        self.repository: Repository | None = app.state.v2.repository if hasattr(app.state, "v2") else None
        self.grpc: GrpcServer | None = None
        self.service, self.grace, self.ready = app.state.service, grace, ready
        self.deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.make_grpc is not None:
            self.grpc = self.make_grpc()
            await self.grpc.start()
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.grpc is not None:
            await self.grpc.stop(0)  # who still runs has had its time
        if self.repository is not None:
            self.repository.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            self.should_exit = self.force_exit = True
        self.service.draining = True
        self.deadline = time.monotonic() + self.grace

    async def on_tick(self, counter: int) -> bool:
        if self.service.draining and (self.service.open == 0 or time.monotonic() > (self.deadline or 0)):
            self.should_exit = True
        return await super().on_tick(counter)


def grpc_maker(
    app: FastAPI, host: str, port: int, guard: "Guard | None", proxies: TrustedProxies, compression: str
) -> "Callable[[], GrpcServer]":  # fmt: skip
    """What makes the gRPC listener, inside the event loop. Raises UserError where gRPC is not installed."""
    try:
        from soma.serve.v2.grpc_server import GrpcServer
    except ImportError as error:
        raise UserError(f"gRPC needs more packages ({error}): pip install 'somacube[gateway]'") from error
    return lambda: GrpcServer(app.state.v2, host, port, guard=guard, proxies=proxies, compression=compression)
