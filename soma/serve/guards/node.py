"""A guard as a node of a graph: `{guard: {checks: [{injection: {}}, {personal: {action: mask}}]}}`.

`text` (BYTES, [N]) and, for `grounded`, `passages` (BYTES, [M]) in; `text`, masked, and `verdict` (BYTES, [N]: `ok` or
the names of checks that objected and only flag) out. A check that blocks ends the request with 400, `content_filter`.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from soma.serve.errors import ApiError
from soma.serve.graphs.kinds import NodeKind, Place
from soma.serve.guards.checks import Ask, judge
from soma.serve.guards.config import Check
from soma.serve.v2.datatypes import Tensors, as_objects
from soma.serve.v2.model import Job, Once, Options, TensorSpec, V2Model


class Guard(NodeKind):
    """What stands under `guard`."""

    checks: list[Check] = Field(min_length=1)

    def build(self, place: Place) -> V2Model:
        """The node."""
        return GuardModel(self.checks, place)


class GuardModel(V2Model):
    """Checks texts."""

    platform = "soma_guard"
    outputs = (TensorSpec("text", "BYTES", (-1,)), TensorSpec("verdict", "BYTES", (-1,)))

    def __init__(self, checks: list[Check], place: Place) -> None:
        self.checks, self.place = checks, place
        wants = any(check.grounded is not None for check in checks)
        self.inputs = (TensorSpec("text", "BYTES", (-1,)), TensorSpec("passages", "BYTES", (-1,), optional=not wants))

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """As `job`, for who asks from within."""
        return await self.judge(tensors, Options(parameters))

    async def job(self, tensors: Tensors, options: Options) -> Job:
        return Once(partial(self.judge, tensors, options), options.timeout)

    async def judge(self, tensors: Tensors, options: Options) -> Tensors:
        """Raises ApiError 400."""
        passages = passages_of(tensors.get("passages"), "passages")
        ask = asking(self.place, options)
        found = [await judge(self.checks, text, passages, ask) for text in texts_of(tensors["text"], "text")]
        size = (len(found),)
        return {"text": as_objects([text.encode() for text, _ in found], size),
                "verdict": as_objects([",".join(names).encode() or b"ok" for _, names in found], size)}  # fmt: skip


def asking(place: Place, options: Options) -> Ask:
    """Who asks classifiers for a guard, and puts the names of the classes to scores that come without."""

    async def ask(model: str, inputs: Tensors) -> Tensors:
        answer = await place.ask(model, inputs, options)
        entry = place.front.repository.get(model)
        labels = entry.loaded.model.labels if entry.loaded is not None else ()
        if labels and "labels" not in answer:
            answer = {**answer, "labels": as_objects([name.encode() for name in labels], (len(labels),))}
        return answer

    return ask


def passages_of(array: np.ndarray | None, name: str) -> list[str]:
    """Passages: texts, or JSON with title and text as `retrieve` gives them. Raises ApiError."""
    found = []
    for given in texts_of(array, name):
        try:
            value = json.loads(given)
        except ValueError:
            value = None
        is_passage = isinstance(value, dict) and isinstance(value.get("text"), str)
        found.append(f"{value.get('title') or ''}\n{value['text']}" if is_passage else given)
    return found


def texts_of(array: np.ndarray | None, name: str) -> list[str]:
    """Texts of a tensor. Raises ApiError."""
    if array is None:
        return []
    try:
        return [element.decode() for element in array.ravel()]
    except UnicodeDecodeError:
        raise ApiError(400, f"{name} is no UTF-8", name) from None
