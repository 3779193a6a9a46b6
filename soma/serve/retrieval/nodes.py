"""Nodes of graphs: `retrieve` finds passages, `answer` asks a language model about them and checks what it cites.

graphs:
  ask:
    inputs: [{name: text_input, datatype: BYTES, shape: [-1]}]
    outputs:
      - {name: text_output, datatype: BYTES, shape: [-1]}
      - {name: citations, datatype: BYTES, shape: [-1], optional: true}
      - {name: citations_dropped, datatype: INT64, shape: [1], optional: true}
    nodes:
      main: {sequence: [find, say]}
      find: {retrieve: {index: ./my-index, limit: 5}}
      say: {answer: {model: llm}, parameters: {max_tokens: 256}}
  llm: …                                       # a model or graph of this file: text_input in, text_output out
"""

import json
import threading
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from soma.serve.calls import Usage
from soma.serve.errors import ApiError
from soma.serve.graphs.kinds import NodeKind, Place
from soma.serve.retrieval.passages import Citations, prompt
from soma.serve.retrieval.search import MODES, MOST, Mode, Retriever, open_retriever
from soma.serve.retrieval.serving import key_of, search
from soma.serve.v2.datatypes import Tensors, as_objects
from soma.serve.v2.front import InferRequest, Running, present
from soma.serve.v2.model import Job, Options, Origin, TensorSpec, V2Model


class Retrieve(NodeKind):
    """What stands under `retrieve`. Keys come from environment variables."""

    index: str = Field(description="folder, beside the graph's file, or URL of a Qdrant server")
    collection: str = "soma"
    encoder: str | None = Field(None, description="left out, the one that the index was made with")
    limit: int = Field(5, ge=1, le=MOST)
    mode: Mode = "hybrid"
    where: dict[str, Any] = Field({}, description="filter of every search; a request's `where` can only narrow it")
    rerank: str | None = Field(None, description="URL#MODEL of a /rerank route")
    qdrant_key_env: str | None = None
    encoder_key_env: str | None = None
    rerank_key_env: str | None = None

    @field_validator("mode", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if value not in MODES:
            raise ValueError(f"expected one of {', '.join(MODES)}")
        return value

    def build(self, place: Place) -> V2Model:
        """Raises UserError: no such index, another encoder."""
        to = self.index if "://" in self.index else str((place.folder / Path(self.index).expanduser()).resolve())
        keys = [key_of(name) for name in (self.qdrant_key_env, self.encoder_key_env, self.rerank_key_env)]
        return Retrieval(self, SHARED.take(to, self, keys))


class SharedRetrievers:
    """Open indexes by what opened them: a folder can be open once, and a node that is redeployed is there twice for a
    while."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open: dict[str, tuple[Retriever, int]] = {}

    def take(self, to: str, config: Retrieve, keys: list[str | None]) -> "Taken":
        """Raises UserError."""
        name = json.dumps([to, config.collection, config.encoder, config.rerank, keys])
        with self.lock:
            if name not in self.open:
                made = open_retriever(
                    to, config.encoder, collection=config.collection, api_key=keys[0], encoder_key=keys[1],
                    rerank=config.rerank, rerank_key=keys[2],
                )  # fmt: skip
                self.open[name] = made, 0
            retriever, users = self.open[name]
            self.open[name] = retriever, users + 1
        return Taken(self, name, retriever)

    def give_back(self, name: str) -> None:
        """The last one closes it."""
        with self.lock:
            retriever, users = self.open[name]
            if users > 1:
                self.open[name] = retriever, users - 1
                return
            del self.open[name]
            retriever.close()


class Taken:
    """One user's hold of a retriever."""

    def __init__(self, shared: SharedRetrievers, name: str, retriever: Retriever) -> None:
        self.shared, self.name, self.retriever = shared, name, retriever

    def close(self) -> None:
        self.shared.give_back(self.name)


SHARED = SharedRetrievers()


class Retrieval(V2Model):
    """`text_input` (BYTES, [1]) to `passages` (BYTES, [N], JSON each) and `prompt` (BYTES, [1]): the question with
    them. `where` (BYTES, [1]): a filter as JSON."""

    platform = "soma_retrieval"
    inputs = (TensorSpec("text_input", "BYTES", (-1,)), TensorSpec("where", "BYTES", (-1,), optional=True))
    outputs = (TensorSpec("passages", "BYTES", (-1,)), TensorSpec("prompt", "BYTES", (-1,)))

    def __init__(self, config: Retrieve, taken: Taken) -> None:
        self.config, self.taken = config, taken

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """Raises ApiError: a filter that is none, the index or its encoder is away."""
        question = only_text(tensors, "text_input")
        where = dict(self.config.where)
        if "where" in tensors:
            where = narrowed(where, only_text(tensors, "where"))
        hits = await search(self.taken.retriever, question, self.config.limit, self.config.mode, where)
        found = [hit.as_json() for hit in hits]
        return {"passages": texts(*(json.dumps(each, ensure_ascii=False) for each in found)),
                "prompt": texts(prompt(question, found))}  # fmt: skip

    def close(self) -> None:
        self.taken.close()


def narrowed(fixed: dict[str, Any], given: str) -> dict[str, Any]:
    """A request's filter under the node's own, whose fields it cannot change. Raises ApiError 400."""
    try:
        asked = json.loads(given)
    except ValueError:
        asked = None
    if not isinstance(asked, dict):
        raise ApiError(400, 'where must be a JSON object, as {"source": "guide"}', "where")
    return {**asked, **fixed}


class AnswerKind(NodeKind):
    """What stands under `answer`."""

    model: str = Field(min_length=1, description="model or graph of this file that writes: text_input to text_output")

    def build(self, place: Place) -> V2Model:
        return Answer(self, place)


class Answer(V2Model):
    """`text_input` (BYTES, [1]: the question) and `passages` (BYTES, [N]) to `text_output` (BYTES, [1]), which may come
    in pieces; with the last piece `citations` (BYTES, [M], JSON each) and `citations_dropped` (INT64, [1])."""

    platform = "soma_answer"
    decoupled = True
    inputs = (TensorSpec("text_input", "BYTES", (-1,)), TensorSpec("passages", "BYTES", (-1,)))
    outputs = (
        TensorSpec("text_output", "BYTES", (-1,)),
        TensorSpec("citations", "BYTES", (-1,), optional=True),
        TensorSpec("citations_dropped", "INT64", (1,), optional=True),
    )

    def __init__(self, config: AnswerKind, place: Place) -> None:
        self.config, self.place = config, place

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """The whole answer."""
        job = await self.job(tensors, Options(parameters))
        return await anext(job.answers())

    async def job(self, tensors: Tensors, options: Options) -> Job:
        """Raises ApiError 400 for passages that are none."""
        question = only_text(tensors, "text_input")
        try:
            passages = [read_passage(each) for each in tensors["passages"]]
        except (ValueError, KeyError, TypeError):
            raise ApiError(400, "passages must be JSON objects as the retrieve node gives them", "passages") from None
        return AnswerJob(self, question, passages, options)

    async def ask(self, question: str, options: Options) -> Running:
        """The language model's request, through the gates for whoever asked."""
        model = present(self.place.front.repository.get(self.config.model))
        await model.prepare()
        specs = {spec.name: spec for spec in model.inputs}
        inputs: Tensors = {"text_input": texts(question)}
        flags = {"stream": options.stream, "exclude_input_in_output": True}
        inputs |= {name: np.array([value]) for name, value in flags.items() if name in specs}
        if unfit := inputs.keys() - specs.keys():
            raise ApiError(500, f"{self.place.where}: model {self.config.model} takes no {', '.join(unfit)}")
        asked = options.origin or Origin("", "")
        origin = Origin(f"/graphs/{self.place.graph}/{self.place.node}", asked.address, asked.caller, options.timeout,
                        asked.tags)  # fmt: skip
        request = InferRequest(
            self.config.model, inputs=inputs, parameters=dict(options.parameters),
            datatypes={name: specs[name].datatype for name in inputs},
        )  # fmt: skip
        return await self.place.front.start(request, origin, stream=options.stream)


class AnswerJob(Job):
    """A question on its way. Its tokens are counted at the language model, not here."""

    def __init__(self, model: Answer, question: str, passages: list[dict[str, Any]], options: Options) -> None:
        self.model, self.options = model, options
        self.question, self.citations = question, Citations(passages)

    async def answers(self) -> AsyncGenerator[Tensors, None]:
        async with await self.model.ask(prompt(self.question, self.citations.passages), self.options) as running:
            if not self.options.stream:
                outputs = await running.only()
                said = next(each.array for each in outputs if each.name == "text_output")
                yield self.last(self.citations.push(said.ravel()[0].decode(errors="replace")))
                return
            async with aclosing(aiter(running)) as pieces:
                async for outputs in pieces:
                    for said in (each.array for each in outputs if each.name == "text_output" and each.array.size):
                        if piece := self.citations.push(said.ravel()[0].decode(errors="replace")):
                            yield {"text_output": texts(piece)}
            yield self.last("")

    def last(self, text: str) -> Tensors:
        """The last answer, with what was cited."""
        text += self.citations.flush()
        cited = [json.dumps(each, ensure_ascii=False) for each in self.citations.as_json()]
        return {"text_output": texts(text), "citations": texts(*cited),
                "citations_dropped": np.array([self.citations.dropped], np.int64)}  # fmt: skip

    def end(self, outcome: str) -> Usage:
        return Usage(outcome=outcome)


def only_text(tensors: Tensors, name: str) -> str:
    """The one element of a tensor. Raises ApiError 400."""
    if tensors[name].size != 1:
        raise ApiError(400, f"{name} takes one text, got {tensors[name].size}", name)
    try:
        text: str = tensors[name].ravel()[0].decode()
    except UnicodeDecodeError:
        raise ApiError(400, f"{name} is no UTF-8", name) from None
    return text


def read_passage(given: bytes) -> dict[str, Any]:
    """A hit as `Hit.as_json` made it. Raises ValueError, KeyError or TypeError."""
    passage = json.loads(given)
    if not all(isinstance(passage[key], str) for key in ("source", "title", "text")):
        raise TypeError
    if not all(isinstance(passage[key], int) for key in ("start", "end")):
        raise TypeError
    return dict(passage)


def texts(*values: str) -> np.ndarray:
    """A BYTES tensor."""
    return as_objects([value.encode("utf-8", "replace") for value in values], (len(values),))
