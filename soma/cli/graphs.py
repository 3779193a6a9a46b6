"""`soma graph`: inference graphs."""

from pathlib import Path
from typing import Annotated

import typer

from soma.base import progress

graph_app = typer.Typer(no_args_is_help=True, help="Serve and show inference graphs.")
File = Annotated[Path, typer.Argument(metavar="FILE", help="YAML file with `graphs` and `models`.")]


@graph_app.command()
def serve(
    file: File,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080,
    grpc_port: Annotated[int | None, typer.Option(help="The same over gRPC on this port.")] = None,
    allow_model_control: Annotated[
        bool, typer.Option("--allow-model-control", help="Let clients load and unload the models of the file.")
    ] = False,
    keys: Annotated[
        str | None, typer.Option(metavar="DATABASE", help="Ask for keys: a file or postgresql://… of `soma keys`.")
    ] = None,
    prices: Annotated[str | None, typer.Option(metavar="FILE", help="What tokens cost, for the ledger.")] = None,
    allow_public: Annotated[
        bool,
        typer.Option("--allow-public", help="Let other machines reach the service though it asks nobody for a key."),
    ] = False,
) -> None:
    """Serve the graphs of a file: each graph and node is a model under /v2."""
    from soma.serve.graphs.serve import serve_graphs

    with progress.use(progress.choose()):
        serve_graphs(
            file, host, port, grpc_port=grpc_port, keys=keys, prices=prices, allow_public=allow_public,
            allow_control=allow_model_control,
        )  # fmt: skip


@graph_app.command()
def show(
    file: File,
    url: Annotated[str | None, typer.Option(help="A service that runs these graphs: shows its latencies.")] = None,
    key: Annotated[str | None, typer.Option(help="Its key.", envvar="SOMA_API_KEY")] = None,
) -> None:
    """Draw the graphs of a file."""
    from rich.console import Console

    from soma.serve.graphs.config import read_graphs
    from soma.serve.graphs.show import draw, live

    for name, graph in read_graphs(file).graphs.items():
        Console(highlight=False).print(draw(name, graph, live(url, name, key) if url else None))
