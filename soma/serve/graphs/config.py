"""Inference graphs in YAML: `soma graph serve FILE`. Nodes and edges have the names of KServe's InferenceGraph.

    models: …                                    # as of `soma serve --models`
    graphs:
      support:
        inputs: [{name: text_input, datatype: BYTES, shape: [-1]}]
        outputs: [{name: text_output, datatype: BYTES, shape: [-1]}, {name: label, datatype: BYTES, shape: [-1]}]
        nodes:
          main: {sequence: [classify, answer]}   # the first node is where requests enter
          classify: {model: topics, inputs: {text: text_input}}
          answer:
            switch:
              - {when: {label: refund}, node: form}
              - {node: llm}
          form: {model: forms}
          llm: {openai: "http://127.0.0.1:8000/v1", model: tiny, parameters: {max_tokens: 64}}

A request's tensors lie on a board by their names. A node takes its inputs from there and puts its outputs there;
`inputs: {text: text_input}` takes the board's `text_input` as the model's `text`, `outputs: {label: topic}` puts the
model's `label` there as `topic`. The graph's outputs are what lies there in the end. Further kinds of nodes, each in a
module of its own: `kinds.py`.
"""

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from soma.base.errors import UserError
from soma.serve.graphs.kinds import KINDS as FURTHER
from soma.serve.graphs.kinds import NodeKind, read_kind
from soma.serve.guards.config import Guarded
from soma.serve.limits.config import Rule
from soma.serve.v2.config import Model, Tensor

EDGES = ("sequence", "switch", "ensemble", "splitter", "guarded")
KINDS = (*EDGES, "openai", "v2", "further", "model")


class Branch(BaseModel):
    """A way out of a switch: taken if the first element of every tensor in `when` is the value, or one of the list."""

    model_config = ConfigDict(extra="forbid")
    node: str
    when: dict[str, Any] = Field({}, description="tensor names and values; none: always")


class Share(BaseModel):
    """A way out of a splitter."""

    model_config = ConfigDict(extra="forbid")
    node: str
    weight: float = Field(0.0, ge=0, description="of the requests, beside the others' weights")
    shadow: bool = Field(False, description="gets a copy of every request; nobody waits for it or sees its answer")


class Node(BaseModel):
    """Exactly one of: an edge (sequence, switch, ensemble, splitter, guarded) or something that computes (model, v2,
    openai, a kind of `kinds.KINDS`)."""

    model_config = ConfigDict(extra="forbid")
    sequence: list[str] = Field([], description="nodes, one after another")
    switch: list[Branch] = Field([], description="the first branch whose condition holds; none: nothing happens")
    ensemble: list[str] = Field([], description="nodes side by side")
    combine: str | None = Field(None, description="of an ensemble: python function of {node: outputs} giving outputs")
    splitter: list[Share] = Field([], description="one of the nodes, by weight")
    by: str | None = Field(None, description="of a splitter: the parameter whose equal values go the same way")
    guarded: Guarded | None = Field(None, description="a node whose text is checked as it comes (docs/guardrails.md)")
    v2: str | None = Field(None, description="URL of another Open Inference Protocol server")
    openai: str | None = Field(None, description="URL of an OpenAI-like endpoint, as http://host:8000/v1")
    model: str | None = Field(None, description="model of this file, or of the remote endpoint")
    version: str = Field("", description="of the model; left out, its newest")
    key_env: str | None = Field(None, description="environment variable with the key of the remote endpoint")
    parameters: dict[str, Any] = Field(
        {},
        description="of every request to this node; a client's values count "
        "in place of those named here, null has no value of its own",
    )
    inputs: dict[str, str] = Field({}, description="the model's input: the board's tensor")
    outputs: dict[str, str] = Field({}, description="the model's output: the board's tensor")
    limits: list[Rule] = Field([], description="of this node alone: rates, tokens, concurrency (`soma.serve.limits`)")
    further: NodeKind | None = Field(None, exclude=True, description="what stands under the name of its kind")
    further_kind: str | None = Field(None, exclude=True, description="the name of that kind")

    @property
    def kind(self) -> str:
        """The key that says what it is."""
        found = next(kind for kind in KINDS if getattr(self, kind))
        return self.further_kind or found

    @model_validator(mode="before")
    @classmethod
    def _further(cls, value: Any) -> Any:
        """A kind that has a module of its own."""
        if not isinstance(value, dict):
            return value
        if meant := value.keys() & {"further", "further_kind"}:
            raise ValueError(f"{min(meant)}: no key of a node")
        names = [key for key in value if key in FURTHER]
        if len(names) > 1:
            raise ValueError(f"expected one kind; got {', '.join(names)}")
        rest = {key: given for key, given in value.items() if key not in FURTHER}
        return rest | {"further": read_kind(names[0], value[names[0]]), "further_kind": names[0]} if names else rest

    @property
    def targets(self) -> list[str]:
        """Nodes that it leads to."""
        branches = [branch.node for branch in self.switch] + ([self.guarded.node] if self.guarded else [])
        return [*self.sequence, *self.ensemble, *branches, *(share.node for share in self.splitter)]

    @model_validator(mode="after")
    def _one_kind(self) -> "Node":
        found = [kind for kind in KINDS if getattr(self, kind)]
        if len([kind for kind in found if kind != "model"]) > 1 or not found:
            kinds = ", ".join((*EDGES, "openai", "v2", *FURTHER, "model"))
            raise ValueError(f"expected one of {kinds}; got {', '.join(found) or 'none'}")
        if self.kind in ("v2", "openai") and self.model is None:
            raise ValueError("a remote endpoint needs model")
        if self.model is not None and self.kind not in ("v2", "openai", "model"):
            raise ValueError(f"a {self.kind} has no model of its own")
        if self.splitter and not any(share.weight for share in self.splitter):
            raise ValueError("no share of the splitter has a weight")
        if self.limits and self.kind in EDGES:
            raise ValueError("limits are for a node that computes; put them on those that it leads to")
        if (self.combine and not self.ensemble) or (self.by and not self.splitter):
            raise ValueError("combine is for an ensemble, by for a splitter")
        return self


class GraphConfig(BaseModel):
    """A graph."""

    model_config = ConfigDict(extra="forbid")
    inputs: list[Tensor] = Field(min_length=1)
    outputs: list[Tensor] = Field(min_length=1)
    nodes: dict[str, Node] = Field(min_length=1)

    @property
    def start(self) -> str:
        return next(iter(self.nodes))

    @model_validator(mode="after")
    def _whole(self) -> "GraphConfig":
        for name, node in self.nodes.items():
            for target in node.targets:
                if target not in self.nodes:
                    raise ValueError(f"node {name} leads to {target}, which is no node")
        seen = self._walk(self.start, ())
        if lost := self.nodes.keys() - seen:
            raise ValueError(f"nothing leads to {', '.join(sorted(lost))}")
        return self

    def _walk(self, name: str, path: tuple[str, ...]) -> set[str]:
        if name in path:
            raise ValueError(f"a circle: {' → '.join((*path, name))}")
        found = {name}
        for target in self.nodes[name].targets:
            found |= self._walk(target, (*path, name))
        return found


class GraphsFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")
    models: dict[str, Model] = Field({})
    graphs: dict[str, GraphConfig] = Field(min_length=1)

    @model_validator(mode="after")
    def _models_are_there(self) -> "GraphsFile":
        for name, graph in self.graphs.items():
            for node_name, node in graph.nodes.items():
                if node.kind == "model" and node.model not in self.models.keys() | self.graphs.keys():
                    raise ValueError(f"graphs.{name}.nodes.{node_name}: model {node.model} is not in this file")
        return self


def rules_of(file: GraphsFile) -> list[Rule]:
    """The limits of all nodes as rules over everything, named GRAPH.NODE.RULE. What a node has of its own is limited
    on all ways to it, a model that it shares only on the way through the graph. Raises UserError for names that clash.
    """
    found: dict[str, Rule] = {}
    for graph, config in file.graphs.items():
        for name, node in config.nodes.items():
            own = {"route": [f"/graphs/{graph}/{name}"]} if node.kind == "model" else {"model": [f"{graph}.{name}"]}
            for rule in node.limits:
                called = re.sub(r"[^A-Za-z0-9._-]", "-", f"{graph}.{name}.{rule.name}")[-64:].lstrip(".-_")
                if called in found:
                    raise UserError(f"graphs.{graph}.nodes.{name}.limits: two rules are named {called!r}")
                found[called] = rule.model_copy(update={"name": called, "only": {**rule.only, **own}})
    return list(found.values())
