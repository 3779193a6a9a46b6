"""Serving the graphs of a file: every graph and every node that computes is a model of the Open Inference Protocol."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request

from soma.base.errors import UserError
from soma.serve.calls import Gates, check_allowed
from soma.serve.errors import ApiError
from soma.serve.graphs.config import GraphsFile, Node, read_graphs
from soma.serve.graphs.graph import Graph, model_of
from soma.serve.graphs.kinds import Place, build
from soma.serve.graphs.remote import OpenAI, RemoteV2
from soma.serve.v2.alone import create_app, run
from soma.serve.v2.config import ModelsFile, add_models
from soma.serve.v2.front import Front
from soma.serve.v2.model import V2Model
from soma.serve.v2.repository import Repository

if TYPE_CHECKING:
    from soma.serve.keys.door import Guard


def graphs_app(
    path: Path, gates: Gates | None = None, *, allow_control: bool = False, guard: "Guard | None" = None
) -> FastAPI:  # fmt: skip
    """The application of a file with graphs. guard: who asks for keys. Raises UserError for what is wrong in it."""
    file = read_graphs(path)
    repository = Repository()
    if file.models:
        add_models(repository, ModelsFile(models=file.models), path.parent)
    app = create_app(repository, gates, allow_control=allow_control, guard=guard)
    app.state.graphs = add_graphs(app.state.v2, file, path.parent)

    @app.get("/graphs/{name}")
    async def graph(request: Request, name: str) -> dict[str, Any]:
        check_allowed(request, name)
        if name not in app.state.graphs:
            raise ApiError(404, f"there is no graph `{name}`", code="graph_not_found")
        described: dict[str, Any] = app.state.graphs[name].described()
        return described

    return app


def add_graphs(front: Front, file: GraphsFile, folder: Path) -> dict[str, Graph]:
    """Put graphs and their nodes into the repository of `front`. Raises UserError."""
    graphs: dict[str, Graph] = {}
    for name, config in file.graphs.items():
        for node_name, node in config.nodes.items():
            if node.kind in ("v2", "openai"):
                front.repository.add(model_of(name, node_name, node), remote(node))
            elif node.further is not None:
                make = partial(build, node.further, Place(name, node_name, folder, front))
                front.repository.add(model_of(name, node_name, node), make).put(make())
        graphs[name] = Graph(name, config, front, folder)
        front.repository.add(name, graphs[name])
    return graphs


def remote(node: Node) -> V2Model:
    """The model that a remote node is."""
    if node.openai is not None:
        return OpenAI(node.openai, str(node.model), node.key_env)
    return RemoteV2(str(node.v2), str(node.model), node.version, node.key_env)


def serve_graphs(
    path: Path, host: str = "127.0.0.1", port: int = 8080, *, grpc_port: int | None = None, keys: str | None = None,
    prices: str | None = None, allow_public: bool = False, allow_control: bool = False,
    ready: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve the graphs of a file until SIGTERM or SIGINT. keys, prices: as of `soma.serve.server.serve`. Raises
    UserError."""
    gateway = None
    if keys is not None:
        from soma.serve.gateway import Gateway

        gateway = Gateway(keys, prices)
    elif prices is not None:
        raise UserError("prices go with the database of keys; say which (--keys DATABASE)")
    guard = gateway.guard if gateway else None
    try:
        gates = Gates(gateway.gates() if gateway else ())
        app = graphs_app(path, gates, allow_control=allow_control, guard=guard)
        if gateway is not None:
            gateway.check_models(entry.name for entry in app.state.v2.repository)
        what = ", ".join(app.state.graphs)
        run(app, what, host, port, grpc_port=grpc_port, allow_public=allow_public, guard=guard, ready=ready)
    finally:
        if gateway is not None:
            gateway.close()
