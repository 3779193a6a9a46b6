"""Running the gateway: SIGHUP takes the file anew, SIGTERM lets running answers end."""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from soma.base import progress
from soma.base.errors import UserError
from soma.serve.admin.beside import Beside
from soma.serve.http_server import Server, http_config
from soma.serve.listener import base_url, check_host, listen
from soma.serve.upstreams.app import Front, create_gateway_app
from soma.serve.upstreams.config import read_config

log = logging.getLogger("soma.serve")
# What a reload leaves as it is.
FIXED = ("keys", "prices", "durability", "admin_port", "admin_host", "trusted_proxies", "request_log")


class GatewayServer(Server):
    """`Server` with connections to upstreams, and a file that may change."""

    path: Path
    front: Front

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.front = self.service
        await self.front.start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: asyncio.ensure_future(self.reload()))
        gc.collect()
        gc.freeze()  # what is there now stays: the collector need not walk it at every turn
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        await self.front.close()

    async def reload(self) -> None:
        """Take the file anew. One that makes no sense changes nothing, and the log says why."""
        try:
            config = read_config(self.path)
            if changed := [name for name in FIXED if getattr(config, name) != getattr(self.front.config, name)]:
                raise UserError(f"{self.path}: {changed[0]} needs a restart")
            await self.front.replace(config)
        except UserError as error:
            log.error("the configuration stays as it was: %s", error)
            return
        self.grace = config.drain
        log.warning("%s was read anew: %d models", self.path, len(config.models))


def serve_gateway(
    path: Path, host: str = "127.0.0.1", port: int = 8080, *, allow_public: bool = False,
    ready: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve what a file says until SIGTERM or SIGINT.

    port 0 takes a free one. `ready` is called with the base URL once requests are answered; without it a note says so.
    Raises UserError: a file that makes no sense, a public host without keys or `allow_public`, a port in use.
    """
    config = read_config(path)
    check_host(host, allow_public=allow_public or config.keys is not None)
    listener, gateway = listen(host, port), None
    try:
        if config.keys is not None:
            from soma.serve.gateway import Gateway

            gateway = Gateway(config.keys, config.prices, config.durability)
            gateway.check_models(config.models)
        elif config.prices is not None or config.admin_port is not None:
            raise UserError(f"{path}: prices and admin_port go with the database of keys: say which (keys)")
        app, url = create_gateway_app(config, gateway), base_url(listener)
        announce = ready or (lambda url: progress.current().note(f"the gateway answers at {url}"))
        server = GatewayServer(http_config(app, server_header=False), app, config.drain, lambda: announce(url))
        server.path = path
        if gateway is not None and config.admin_port is not None:
            front = app.state.service
            beside = Beside(front.limits, front.request_log, chat_url=url)
            admin = gateway.start_admin(config.admin_host, config.admin_port, beside)
            progress.current().note(f"the admin page is at {admin}")
        server.run(sockets=[listener])
    finally:
        if gateway is not None:
            gateway.close()
        listener.close()
