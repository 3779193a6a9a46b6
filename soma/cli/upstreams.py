"""`soma gateway`."""

from pathlib import Path
from typing import Annotated

import typer

from soma.base import progress


def gateway(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML: models, upstreams, limits, keys.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080,
    allow_public: Annotated[
        bool, typer.Option("--allow-public", help="Let other machines reach the gateway though it has no keys.")
    ] = False,
) -> None:
    """One front before many services: keys, limits, routing, retries. SIGHUP reads the file anew."""
    from soma.serve.upstreams.server import serve_gateway

    with progress.use(progress.choose()):
        serve_gateway(config, host, port, allow_public=allow_public)
