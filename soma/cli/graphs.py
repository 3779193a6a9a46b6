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
    limits: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML: rate limits beside those of the nodes.")
    ] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Admin API and page on this port as well; with --keys.", min=0)
    ] = None,
    admin_host: Annotated[str, typer.Option(help="Address of the admin port.")] = "127.0.0.1",
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
            allow_control=allow_model_control, limits=limits, admin_port=admin_port, admin_host=admin_host,
        )  # fmt: skip


@graph_app.command()
def show(
    graph: Annotated[str, typer.Argument(metavar="FILE|URL", help="A file with graphs, or a service that runs some.")],
    url: Annotated[str | None, typer.Option(help="With a file: a service that runs its graphs.")] = None,
    key: Annotated[str | None, typer.Option(help="The service's key.", envvar="SOMA_API_KEY")] = None,
) -> None:
    """Draw graphs; those of a service with the latency of each node."""
    from rich.console import Console

    from soma.serve.graphs.config import GraphsFile
    from soma.serve.graphs.show import all_live, draw, draw_described, live
    from soma.serve.yaml_file import read_as

    console = Console(highlight=False)
    if graph.startswith(("http://", "https://")):
        for described in all_live(graph, key):
            console.print(draw_described(described))
        return
    for name, config in read_as(GraphsFile, Path(graph)).graphs.items():
        console.print(draw(name, config, live(url, name, key) if url else None))


@graph_app.command()
def deploy(
    url: Annotated[str, typer.Argument(help="A service of graphs that was started with --allow-model-control.")],
    node: Annotated[str, typer.Argument(metavar="GRAPH.NODE", help="The node, or a model of the file.")],
    key: Annotated[str | None, typer.Option(help="The service's key.", envvar="SOMA_API_KEY")] = None,
) -> None:
    """Take one node anew from the file; streams that run end on the old one."""
    from urllib.parse import quote

    from soma.serve.graphs.show import ask

    ask(url, f"/v2/repository/models/{quote(node, safe='')}/load", key, "POST")
    typer.echo(f"{node} is deployed")
