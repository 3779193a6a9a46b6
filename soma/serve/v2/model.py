"""What a model is to the Open Inference Protocol: named tensors in, named tensors out."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from soma.serve.calls import Caller, Meter, Usage
from soma.serve.errors import ApiError
from soma.serve.v2.datatypes import DTYPES, Tensors, as_objects

if TYPE_CHECKING:
    from soma.serve.requestlog.record import Record

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a model takes or gives. A size of -1 in the shape may be any. Inputs that are `optional` may be
    left out; outputs that are optional come when they are asked for."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False

    def check(self, array: np.ndarray, what: str) -> None:
        """Raises ApiError if the array's shape is another."""
        fits = len(array.shape) == len(self.shape) and all(
            wanted in (-1, got) for got, wanted in zip(array.shape, self.shape, strict=True)
        )
        if not fits:
            raise ApiError(400, f"{what} has shape {list(array.shape)}; the model takes {list(self.shape)}")


@dataclass(frozen=True)
class Origin:
    """Where a request comes from. `timeout`: seconds that the client waits, None for as long as it takes. `tags`: of
    the call, for the ledger."""

    route: str
    address: str
    caller: Caller | None = None
    timeout: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What comes with the tensors. `outputs`: names that were asked for, empty for all. `stream`: many answers are
    possible. `timeout`: seconds that are left, None for any. `origin`: who asks; None for a model that is asked from
    within."""

    parameters: Parameters = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    stream: bool = False
    timeout: float | None = None
    origin: Origin | None = None


class Job(ABC):
    """One request, ready to run. `prompt_tokens` and `max_tokens`: what it may use at most, for the gates. `meter`: who
    counts its tokens while it runs. `record`: where the request log wants to know what was asked and said."""

    prompt_tokens = 0
    max_tokens = 0
    meter: Meter | None = None
    record: "Record | None" = None

    def begin(self) -> None:  # noqa: B027  (most have nothing to do)
        """The gates are passed. Raises QueueFullError and the like."""

    @abstractmethod
    def answers(self) -> AsyncGenerator[Tensors, None]:
        """The outputs, as often as the model gives them. Closed early when nobody wants them any more."""

    def end(self, outcome: str) -> Usage:
        """The request is over, begun or not, read to the end or not; what it has used."""
        return Usage(self.prompt_tokens, outcome=outcome)


class Once(Job):
    """A request with one answer."""

    def __init__(self, answer: Callable[[], Awaitable[Tensors]], timeout: float | None) -> None:
        self.answer, self.timeout = answer, timeout

    async def answers(self) -> AsyncGenerator[Tensors, None]:
        yield await asyncio.wait_for(self.answer(), self.timeout)


class V2Model(ABC):
    """A model. Give `inputs` and `outputs` and write `infer`; that is all that a model must have.

    A model that counts tokens or gives many answers to one request (`decoupled`) writes `job` as well. `labels`:
    names of classes, for the classification extension. `platform` is what metadata says.
    """

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    platform: str = "soma_python"
    decoupled: bool = False
    labels: Sequence[str] = ()
    known_as: str | None = None  # the name that gates and keys know it by, where it is another one

    @abstractmethod
    async def infer(self, tensors: Tensors, parameters: Parameters) -> Tensors:
        """The outputs for these inputs, which have the datatypes and shapes of `inputs`."""

    async def prepare(self) -> None:  # noqa: B027  (most have nothing to do)
        """Called before a request is held against `inputs` and `outputs`. Raises ApiError."""

    async def job(self, tensors: Tensors, options: Options) -> Job:
        """The request, ready to run. Raises ApiError or UserError for one that cannot."""

        return Once(lambda: self.infer(tensors, options.parameters), options.timeout)

    @property
    def ready(self) -> bool:
        """Whether requests would be answered now."""
        return True

    @property
    def retry_after(self) -> int:
        """Seconds until it may be ready, where it is not."""
        return 5

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Let go of everything. No request runs any more."""

    def check_outputs(self, made: Tensors) -> Tensors:
        """The outputs as arrays of their datatypes. Raises ValueError for a model that does not keep its word."""
        specs = {spec.name: spec for spec in self.outputs}
        if missing := [spec.name for spec in self.outputs if not spec.optional and spec.name not in made]:
            raise ValueError(f"the model gave no {', '.join(missing)}")
        fitting: Tensors = {}
        for name, value in made.items():
            if name not in specs:
                raise ValueError(f"the model gave {name}, which is none of its outputs")
            fitting[name] = as_datatype(value, specs[name].datatype)
        return fitting


def as_datatype(value: Any, datatype: str) -> np.ndarray:
    """What a model made as an array of the datatype; texts become bytes."""
    if datatype != "BYTES":
        return np.asarray(value, DTYPES[datatype])
    array = np.asarray(value, object)
    elements = [each.encode() if isinstance(each, str) else bytes(each) for each in array.ravel()]
    return as_objects(elements, array.shape)
