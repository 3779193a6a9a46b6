"""Kinds of graph nodes that live in modules of their own: `KINDS` says where each is, nothing is loaded before a graph
names it.

A kind is a pydantic model of what stands under its name in YAML, with `build`:

    class Shout(NodeKind):
        mark: str = "!"

        def build(self, place: Place) -> V2Model: ...

    # in KINDS: "shout": "soma.serve.shout:Shout";  in YAML: {shout: {mark: "?"}, inputs: {text: text_input}}

What `build` returns is served as the model `GRAPH.NODE`; `inputs` and `outputs` of the node rename its tensors as they
do for every model. It is built anew when the node is redeployed, and closed when its last request is over.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from soma.base.errors import UserError
from soma.serve.yaml_file import explain

if TYPE_CHECKING:
    from soma.serve.v2.datatypes import Tensors
    from soma.serve.v2.front import Front
    from soma.serve.v2.model import Options, V2Model

KINDS: dict[str, str] = {
    "features": "soma.serve.features.config:Lookup",
    "guard": "soma.serve.guards.node:Guard",
    "llm": "soma.serve.graphs.llm:LLM",
    "retrieve": "soma.serve.retrieval.nodes:Retrieve",
    "answer": "soma.serve.retrieval.nodes:AnswerKind",
}


@dataclass(frozen=True)
class Place:
    """Where a node stands. `folder`: of the graph's file, for paths in it. `front`: through which other models of the
    service are asked."""

    graph: str
    node: str
    folder: Path
    front: "Front"

    @property
    def where(self) -> str:
        """For messages: graphs.GRAPH.nodes.NODE."""
        return f"graphs.{self.graph}.nodes.{self.node}"

    async def ask(
        self, model: str, inputs: "Tensors", options: "Options", parameters: Mapping[str, Any] | None = None
    ) -> "Tensors":  # fmt: skip
        """The one answer of another model of the service, through the gates for whoever asked this node (`options` as
        the node's `job` got them). Raises ApiError."""
        from soma.serve.v2.front import InferRequest, present
        from soma.serve.v2.model import Origin

        loaded = present(self.front.repository.get(model))
        await loaded.prepare()
        datatypes = {spec.name: spec.datatype for spec in loaded.inputs}
        request = InferRequest(model, inputs=inputs, parameters=dict(parameters or {}), datatypes=datatypes)
        asked = options.origin or Origin("", "")
        origin = Origin(f"/graphs/{self.graph}/{self.node}", asked.address, asked.caller, options.timeout, asked.tags)
        async with await self.front.start(request, origin) as running:
            return {each.name: each.array for each in await running.only()}


class NodeKind(BaseModel):
    """What stands under a kind's name."""

    model_config = ConfigDict(extra="forbid")

    def build(self, place: Place) -> "V2Model":
        """The model that the node is. Raises UserError that names what is wrong."""
        raise NotImplementedError


def read_kind(name: str, value: Any) -> NodeKind:
    """The node of a kind. Raises ValueError that says what is wrong in it."""
    module, _, attribute = KINDS[name].partition(":")
    try:
        kind: type[NodeKind] = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(f"{name}: this kind of node needs more packages ({error})") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{name}: {explain(error)}") from None


def build(kind: NodeKind, place: Place) -> "V2Model":
    """The model of a node. Raises UserError that names the node."""
    try:
        return kind.build(place)
    except UserError as error:
        raise UserError(f"{place.where}: {error}") from error
