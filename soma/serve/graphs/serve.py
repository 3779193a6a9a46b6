"""Serving the graphs of a file: every graph and every node that computes is a model of the Open Inference Protocol."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from soma.base import progress
from soma.base.errors import UserError
from soma.serve.admin.beside import Beside
from soma.serve.calls import Gates, check_allowed, may_use
from soma.serve.errors import ApiError
from soma.serve.graphs.config import EDGES, GraphsFile, Node, rules_of
from soma.serve.graphs.graph import Graph, model_of
from soma.serve.graphs.kinds import Place, build
from soma.serve.graphs.metrics import GraphMetrics, Together
from soma.serve.graphs.remote import OpenAI, RemoteV2
from soma.serve.limits.config import LimitsConfig, read_limits
from soma.serve.limits.gate import LimitsGate
from soma.serve.v2.alone import create_app, run
from soma.serve.v2.config import ModelsFile, add_models
from soma.serve.v2.front import Front
from soma.serve.v2.model import V2Model
from soma.serve.v2.repository import Repository
from soma.serve.yaml_file import read_as

if TYPE_CHECKING:
    from soma.serve.keys.door import Guard


def graphs_app(
    path: Path, gates: Gates | None = None, *, allow_control: bool = False, guard: "Guard | None" = None,
    limits: LimitsConfig | None = None,
) -> FastAPI:  # fmt: skip
    """The application of a file with graphs. guard: who asks for keys. limits: beside those of the nodes, before
    `gates`. Raises UserError for what is wrong in it."""
    file = read_as(GraphsFile, path)
    repository = Repository()
    if file.models:
        add_models(repository, ModelsFile(models=file.models), path.parent)
    limiter = limiter_of(file, limits)
    both = Gates([*([limiter] if limiter else []), *(gates.gates if gates else [])])
    app = create_app(repository, both, allow_control=allow_control, guard=guard)
    app.state.limiter, app.state.metrics = limiter, GraphMetrics()
    if limiter is not None:
        limiter.register(app.state.metrics.registry)
    app.state.graphs = add_graphs(app.state.v2, file, path, app.state.metrics)
    install_views(app)
    return app


def limiter_of(file: GraphsFile, limits: LimitsConfig | None) -> LimitsGate | None:
    """One gate for the limits of the nodes and those of a file. Raises UserError for a name that both have."""
    own, given = rules_of(file), limits or LimitsConfig()
    if twice := {rule.name for rule in own} & {rule.name for rule in given.rules}:
        raise UserError(f"limits: {min(twice)!r} is the name of a node's rule as well")
    rules = [*given.rules, *own]
    return LimitsGate(given.model_copy(update={"rules": rules})) if rules else None


def install_views(app: FastAPI) -> None:
    """What the graphs are and do: for people, and for Prometheus."""

    @app.get("/graphs")
    async def graphs(request: Request) -> dict[str, Any]:
        found = [graph.described() for name, graph in app.state.graphs.items() if may_use(request, name)]
        return {"object": "list", "data": found}

    @app.get("/graphs/{name}")
    async def graph(request: Request, name: str) -> dict[str, Any]:
        check_allowed(request, name)
        if name not in app.state.graphs:
            raise ApiError(404, f"there is no graph `{name}`", code="graph_not_found")
        described: dict[str, Any] = app.state.graphs[name].described()
        return described

    def registries() -> list[CollectorRegistry]:
        models = (entry.loaded.model for entry in app.state.v2.repository if entry.loaded is not None)
        owned = [registry for model in models if (registry := getattr(model, "registry", None)) is not None]
        return [app.state.metrics.registry, *owned]

    together = Together(registries)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(generate_latest, together), media_type=CONTENT_TYPE_LATEST)


def add_graphs(front: Front, file: GraphsFile, path: Path, metrics: GraphMetrics) -> dict[str, Graph]:
    """Put graphs and their nodes into the repository of `front`. A node that is loaded anew is read from the file anew,
    so what changed in it there holds from then on. Raises UserError."""
    graphs: dict[str, Graph] = {}
    for name, config in file.graphs.items():
        for node_name, node in config.nodes.items():
            if node.kind not in EDGES and node.kind != "model":
                place = Place(name, node_name, path.parent, front)
                number = node.version if node.version.isdigit() else "1"
                make = partial(made_anew, path, place)
                entry = front.repository.add(model_of(name, node_name, node), make, number)
                entry.put(made(node, place))
        graphs[name] = Graph(name, config, front, path.parent, metrics)
        front.repository.add(name, graphs[name])
    return graphs


def made_anew(path: Path, place: Place) -> V2Model:
    """The model that a node is by the file as it is now. Raises UserError."""
    node = getattr(read_as(GraphsFile, path).graphs.get(place.graph), "nodes", {}).get(place.node)
    if node is None or node.kind in EDGES or node.kind == "model":
        raise UserError(f"{path}: {place.where} is no node of its own any more; that needs a restart")
    return made(node, place)


def made(node: Node, place: Place) -> V2Model:
    """The model that a node is which has one of its own."""
    return build(node.further, place) if node.further is not None else remote(node)


def remote(node: Node) -> V2Model:
    """The model that a remote node is."""
    if node.openai is not None:
        return OpenAI(node.openai, str(node.model), node.key_env)
    return RemoteV2(str(node.v2), str(node.model), node.version, node.key_env)


def serve_graphs(
    path: Path, host: str = "127.0.0.1", port: int = 8080, *, grpc_port: int | None = None, keys: str | None = None,
    prices: str | None = None, allow_public: bool = False, allow_control: bool = False, limits: Path | None = None,
    admin_port: int | None = None, admin_host: str = "127.0.0.1", ready: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Serve the graphs of a file until SIGTERM or SIGINT. keys, prices, limits, admin_port, admin_host: as of
    `soma.serve.options.ServeOptions`. Raises UserError."""
    gateway = None
    if keys is not None:
        from soma.serve.gateway import Gateway

        gateway = Gateway(keys, prices)
    elif prices is not None or admin_port is not None:
        raise UserError("prices and the admin API go with the database of keys; say which (--keys DATABASE)")
    guard = gateway.guard if gateway else None
    try:
        gates = Gates(gateway.gates() if gateway else ())
        rules = None if limits is None else read_limits(limits)
        app = graphs_app(path, gates, allow_control=allow_control, guard=guard, limits=rules)
        if gateway is not None:
            gateway.check_models(entry.name for entry in app.state.v2.repository)
        if gateway is not None and admin_port is not None:
            beside = Beside(app.state.limiter, graphs=app.state.graphs)
            progress.current().note(f"the admin page is at {gateway.start_admin(admin_host, admin_port, beside)}")
        what = ", ".join(app.state.graphs)
        run(app, what, host, port, grpc_port=grpc_port, allow_public=allow_public, guard=guard, ready=ready)
    finally:
        if gateway is not None:
            gateway.close()
