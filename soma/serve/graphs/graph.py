"""A graph as a model: requests walk from node to node; every node that computes passes the gates under its own name.

An edge is a function from a board of tensors to one answer or, streamed, to many: a sequence streams what its last node
streams, a switch and a splitter what the node streams that they chose. See `config.py` for the form of a graph.
"""

import asyncio
import hashlib
import logging
import random
import statistics
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from soma.base.errors import UserError
from soma.serve.calls import Usage
from soma.serve.errors import ApiError, as_api_error
from soma.serve.graphs.config import EDGES, GraphConfig, Node
from soma.serve.graphs.kinds import Place
from soma.serve.graphs.metrics import GraphMetrics
from soma.serve.graphs.trace import span
from soma.serve.guards.checks import judge, judged
from soma.serve.guards.node import asking, passages_of, texts_of
from soma.serve.v2.callables import find
from soma.serve.v2.datatypes import Tensors, as_objects
from soma.serve.v2.front import Front, InferRequest, present
from soma.serve.v2.model import Job, Options, Origin, V2Model

log = logging.getLogger("soma.serve")

REMEMBERED = 512  # latencies of a node
SHADOWS = 32  # requests of a graph that run in shadows at once; more are not copied


@dataclass
class Seen:
    """What a node has done: latencies in seconds of its last requests, how many there were, how many failed."""

    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    count: int = 0
    failed: int = 0

    def described(self) -> dict[str, Any]:
        """As JSON, milliseconds."""
        known = sorted(self.latencies)
        p50 = statistics.median(known) * 1e3 if known else None
        p95 = known[int(0.95 * (len(known) - 1))] * 1e3 if known else None
        return {"count": self.count, "failed": self.failed, "p50_ms": p50, "p95_ms": p95}


class Graph(V2Model):
    """A graph whose models are those of `front`. `folder`: where combiners are looked for. Raises UserError."""

    platform = "soma_graph"
    decoupled = True

    def __init__(
        self, name: str, config: GraphConfig, front: Front, folder: Any, metrics: GraphMetrics | None = None
    ) -> None:
        self.name, self.config, self.front, self.folder, self.metrics = name, config, front, folder, metrics
        self.inputs = [tensor.spec for tensor in config.inputs]
        self.outputs = [tensor.spec for tensor in config.outputs]
        self.seen = {node: Seen() for node in config.nodes}
        self.random = random.Random()
        self.shadows: set[asyncio.Task[None]] = set()
        self.combiners: dict[str, Any] = {}
        for node, described in config.nodes.items():
            if described.combine is not None:
                self.combiners[node] = find(described.combine, folder)
                if not callable(self.combiners[node]):
                    raise UserError(f"graphs.{name}.nodes.{node}: {described.combine!r} is no function")

    @property
    def ready(self) -> bool:
        return all(self.front.repository.get(each).ready for each in self.models)

    @property
    def models(self) -> list[str]:
        """Names of the models that it needs."""
        return [model_of(self.name, name, node) for name, node in self.config.nodes.items() if is_model(node)]

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """The one answer."""
        job = await self.job(tensors, Options(parameters))
        return await anext(job.answers())

    async def job(self, tensors: Tensors, options: Options) -> Job:
        return GraphJob(self, tensors, options)

    def described(self) -> dict[str, Any]:
        """Nodes, where they lead, and what they have done, as JSON."""
        from soma.serve.graphs.show import describe

        made = describe(self.name, self.config)
        for name, node in made["nodes"].items():
            node |= self.seen[name].described()
        return made


def is_model(node: Node) -> bool:
    """Whether it computes."""
    return node.kind not in EDGES


def model_of(graph: str, name: str, node: Node) -> str:
    """The V2 model that a node is: those that are not of the file's models are `GRAPH.NODE`."""
    return str(node.model) if node.kind == "model" else f"{graph}.{name}"


class GraphJob(Job):
    """A request on its way through a graph. Its tokens are counted at its nodes, not here."""

    def __init__(self, graph: Graph, tensors: Tensors, options: Options) -> None:
        self.graph, self.board, self.options = graph, dict(tensors), options
        self.deadline = None if options.timeout is None else time.monotonic() + options.timeout

    async def answers(self) -> AsyncGenerator[Tensors, None]:
        names = {spec.name for spec in self.graph.outputs}
        with span("graph", graph=self.graph.name):
            whole = self.run(self.graph.config.start, self.board, streamed=self.options.stream)
            async with aclosing(whole) as boards:
                async for board in boards:
                    yield {name: array for name, array in board.items() if name in names}

    def end(self, outcome: str) -> Usage:
        return Usage(outcome=outcome)

    async def run(self, name: str, board: Tensors, *, streamed: bool) -> AsyncGenerator[Tensors, None]:
        """Boards behind a node: one, or one for every piece of a stream."""
        node, seen = self.graph.config.nodes[name], self.graph.seen[name]
        ways = {"sequence": self.sequence, "switch": self.switch, "ensemble": self.ensemble,
                "splitter": self.splitter, "guarded": self.guarded}  # fmt: skip
        started, ok = time.monotonic(), False
        try:
            with span(f"node {name}", graph=self.graph.name, node=name, kind=node.kind):
                way = ways.get(node.kind, self.compute)
                async with aclosing(way(name, node, board, streamed)) as boards:
                    async for made in boards:
                        yield made
            ok = True
        except (asyncio.CancelledError, GeneratorExit):
            ok = True  # nobody wants it any more: no fault of the node
            raise
        finally:
            seen.count += 1
            seen.failed += not ok
            seen.latencies.append(took := time.monotonic() - started)
            if self.graph.metrics is not None:
                self.graph.metrics.observe(self.graph.name, name, took, ok=ok)

    async def one(self, name: str, board: Tensors) -> Tensors:
        """The board behind a node that must give one answer."""
        async with aclosing(self.run(name, board, streamed=False)) as boards:
            found = [made async for made in boards]
        if len(found) != 1:
            raise ApiError(500, f"node {name} of the graph gave {len(found)} answers where one is needed")
        return found[0]

    async def sequence(
        self, name: str, node: Node, board: Tensors, streamed: bool
    ) -> AsyncGenerator[Tensors, None]:  # fmt: skip
        *before, last = node.sequence
        for each in before:
            board = await self.one(each, board)
        async with aclosing(self.run(last, board, streamed=streamed)) as boards:
            async for made in boards:
                yield made

    async def switch(self, name: str, node: Node, board: Tensors, streamed: bool) -> AsyncGenerator[Tensors, None]:
        for branch in node.switch:
            if all(holds(board, tensor, wanted) for tensor, wanted in branch.when.items()):
                async with aclosing(self.run(branch.node, board, streamed=streamed)) as boards:
                    async for made in boards:
                        yield made
                return
        yield board

    async def ensemble(
        self, name: str, node: Node, board: Tensors, streamed: bool
    ) -> AsyncGenerator[Tensors, None]:  # fmt: skip
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.caught(each, board)) for each in node.ensemble]
        results = [task.result() for task in tasks]
        for result in results:
            if isinstance(result, ApiError):
                raise result
        fresh = {
            each: {key: array for key, array in result.items() if board.get(key) is not array}
            for each, result in zip(node.ensemble, results, strict=True)
            if not isinstance(result, ApiError)
        }
        if (combine := self.graph.combiners.get(name)) is not None:
            yield board | dict(await asyncio.to_thread(combine, fresh))
            return
        merged = dict(board)
        for each, outputs in fresh.items():
            if twice := merged.keys() & outputs.keys() - board.keys():
                raise ApiError(500, f"nodes of the ensemble {name} give {', '.join(sorted(twice))} twice; rename one "
                               f"(`outputs` of {each}), or combine them")  # fmt: skip
            merged |= outputs
        yield merged

    async def caught(self, name: str, board: Tensors) -> Tensors | ApiError:
        """An error as a value, so that a task group gives it as it is."""
        try:
            return await self.one(name, board)
        except Exception as error:  # noqa: BLE001  (raised by who asked)
            return as_api_error(error)

    async def splitter(
        self, name: str, node: Node, board: Tensors, streamed: bool
    ) -> AsyncGenerator[Tensors, None]:  # fmt: skip
        shares = [share for share in node.splitter if share.weight]
        place = self.draw(node) * sum(share.weight for share in shares)
        for share in shares:
            if (place := place - share.weight) < 0:
                break
        for shadow in node.splitter:
            if shadow.shadow and len(self.graph.shadows) < SHADOWS:
                task = asyncio.create_task(self.in_shadow(shadow.node, dict(board)))
                self.graph.shadows.add(task)
                task.add_done_callback(self.graph.shadows.discard)
        async with aclosing(self.run(share.node, board, streamed=streamed)) as boards:
            async for made in boards:
                yield made

    async def guarded(self, name: str, node: Node, board: Tensors, streamed: bool) -> AsyncGenerator[Tensors, None]:
        options = node.guarded
        assert options is not None
        passages = passages_of(board.get(options.passages), options.passages)
        origin = self.origin(name)
        place = Place(self.graph.name, name, self.graph.folder, self.graph.front)
        ask = asking(place, Options(timeout=origin.timeout, origin=origin))
        if not streamed:
            board = await self.one(options.node, board)
            given = texts_of(board.get(options.tensor), options.tensor)
            found = [(await judge(options.checks, text, passages, ask))[0] for text in given]
            yield board | {options.tensor: as_objects([text.encode() for text in found], (len(found),))}
            return
        latest = board

        async def pieces() -> AsyncGenerator[str, None]:
            nonlocal latest
            async with aclosing(self.run(options.node, board, streamed=True)) as boards:
                async for latest in boards:
                    yield "".join(texts_of(latest.get(options.tensor), options.tensor))

        async with aclosing(pieces()) as said, aclosing(judged(options, said, passages, ask)) as checked:
            async for text in checked:
                yield latest | {options.tensor: as_objects([text.encode()], (1,))}

    def draw(self, node: Node) -> float:
        """A number from 0 to 1, the same for equal values of the parameter `by`."""
        value = self.options.parameters.get(node.by) if node.by else None
        if value is None:
            return self.graph.random.random()
        return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8]) / (1 << 64)

    async def in_shadow(self, name: str, board: Tensors) -> None:
        """Run a copy of the request; what becomes of it is seen in the node's figures alone."""
        try:
            await self.one(name, board)
        except Exception as error:  # noqa: BLE001  (nobody waits for it)
            log.info("the shadow %s of graph %s failed: %s", name, self.graph.name, type(error).__name__)

    async def compute(self, name: str, node: Node, board: Tensors, streamed: bool) -> AsyncGenerator[Tensors, None]:
        """A model: through the gates, as `GRAPH/NODE`, for whoever asked the graph."""
        model = model_of(self.graph.name, name, node)
        version = node.version if node.kind == "model" else ""
        loaded = present(self.graph.front.repository.get(model, version))
        await loaded.prepare()
        specs = {spec.name: spec for spec in loaded.inputs}
        sources = {key: node.inputs.get(key, key) for key in specs}
        given = {key: board[source] for key, source in sources.items() if source in board}
        if "stream" in specs and streamed:
            given.setdefault("stream", np.ones(1, bool))
        request = InferRequest(
            model, version, inputs=given, parameters=self.parameters(node),
            datatypes={key: spec.datatype for key, spec in specs.items()},
        )  # fmt: skip
        running = await self.graph.front.start(request, self.origin(name), stream=streamed)
        async with running:
            if not streamed:
                yield board | self.renamed(node, {each.name: each.array for each in await running.only()})
                return
            async for outputs in running:
                yield board | self.renamed(node, {each.name: each.array for each in outputs})

    def parameters(self, node: Node) -> dict[str, Any]:
        """A node's parameters. The request's count in place of those that the node names, and nowhere else."""
        found = {key: self.options.parameters.get(key, default) for key, default in node.parameters.items()}
        return {key: value for key, value in found.items() if value is not None}

    @staticmethod
    def renamed(node: Node, outputs: Tensors) -> Tensors:
        return {node.outputs.get(key, key): array for key, array in outputs.items()}

    def origin(self, node: str) -> Origin:
        """Who asks a node: who asked the graph. A key that may use the graph may use what is in it."""
        left = None if self.deadline is None else max(self.deadline - time.monotonic(), 0.001)
        asked = self.options.origin or Origin("", "")
        caller = None if asked.caller is None else replace(asked.caller, models=None)
        tags = {**asked.tags, "graph": self.graph.name, "node": node}
        return Origin(f"/graphs/{self.graph.name}/{node}", asked.address, caller, left, tags)


def holds(board: Tensors, tensor: str, wanted: Any) -> bool:
    """Whether the first element of a tensor is the value, or one of several."""
    if tensor not in board or board[tensor].size == 0:
        return False
    value = board[tensor].ravel()[0]
    value = value.decode(errors="replace") if isinstance(value, bytes) else value.item()
    return value in wanted if isinstance(wanted, list) else value == wanted
