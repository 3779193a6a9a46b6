"""The Open Inference Protocol, whatever carries it: from a decoded request through the gates to a model's answers."""

import logging
import time
import traceback
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

import soma
from soma.serve.calls import Call, Caller, Gates, Passage, Usage, not_allowed
from soma.serve.errors import ApiError, as_api_error
from soma.serve.v2.datatypes import Tensors, classes
from soma.serve.v2.model import Job, Options, Origin, V2Model
from soma.serve.v2.repository import Entry, Repository

log = logging.getLogger("soma.serve")

MAX_BODY_BYTES = 64 << 20  # tensors are larger than texts
EXTENSIONS = ("binary_tensor_data", "classification", "generate", "model_repository", "statistics")


class Host(Protocol):
    """The service around: its gates, how many requests are open, and whether it is about to end."""

    gates: Gates
    open: int
    draining: bool


class Alone:
    """The host of models that are served without an engine."""

    def __init__(self, gates: Gates | None = None) -> None:
        self.gates, self.open, self.draining = gates or Gates(), 0, False


@dataclass
class InferRequest:
    """A request with its tensors decoded. `outputs`: those that were asked for with their parameters; none: all."""

    model: str
    version: str = ""
    id: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    inputs: Tensors = field(default_factory=dict)
    datatypes: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """A tensor of an answer."""

    name: str
    datatype: str
    array: np.ndarray
    parameters: Mapping[str, Any]


class Front:
    """The protocol's operations over a repository. `allow_control`: clients may load and unload models."""

    def __init__(
        self, repository: Repository, host: Host, *, max_body_bytes: int = MAX_BODY_BYTES, allow_control: bool = False
    ) -> None:
        self.repository, self.host = repository, host
        self.max_body_bytes, self.allow_control = max_body_bytes, allow_control

    @property
    def ready(self) -> bool:
        """Whether inference requests are taken."""
        return not self.host.draining and self.repository.ready

    def is_ready(self, name: str, version: str = "", caller: Caller | None = None) -> bool:
        """Whether requests for a model are taken. Raises ApiError 404, 403 for a key that may not use it."""
        check_caller(self.known_as(name), caller)
        return not self.host.draining and self.repository.get(name, version).ready

    @staticmethod
    def metadata() -> dict[str, Any]:
        """Of the server."""
        return {"name": "soma", "version": soma.__version__, "extensions": list(EXTENSIONS)}

    async def model_metadata(self, name: str, version: str = "", caller: Caller | None = None) -> dict[str, Any]:
        """Of a model: its versions, inputs and outputs. Raises ApiError 403, 404, 503 if it is not loaded."""
        check_caller(self.known_as(name), caller)
        entry = self.repository.get(name, version)
        model = present(entry)
        await model.prepare()
        versions = [each.version for each in self.repository.versions(name) if each.loaded is not None]
        sides = {
            side: [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs]
            for side, specs in (("inputs", model.inputs), ("outputs", model.outputs))
        }
        return {"name": name, "versions": [version] if version else versions, "platform": model.platform, **sides}

    def index(self, *, only_ready: bool = False, caller: Caller | None = None) -> list[dict[str, str]]:
        """What is in the repository, as far as the key may use it."""
        return [
            {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
            for entry in self.repository
            if (entry.ready or not only_ready) and (caller is None or caller.may_use(self.known_as(entry.name)))
        ]

    def statistics(self, name: str = "", version: str = "", caller: Caller | None = None) -> list[dict[str, Any]]:
        """Counts and times of one model's requests, or of all that the key may use. Raises ApiError 403, 404."""
        check_caller(self.known_as(name), caller if name else None)
        entries = list(self.repository) if not name else self.repository.versions(name)
        if version:
            entries = [self.repository.get(name, version)]
        return [stats_of(entry) for entry in entries if caller is None or caller.may_use(self.known_as(entry.name))]

    def known_as(self, name: str) -> str:
        """The name by which gates and keys know a model: embeddings are the engine's model there, as in /v1."""
        entries = self.repository.entries.get(name, {}).values()
        return next((entry.loaded.model.known_as or name for entry in entries if entry.loaded is not None), name)

    def check_control(self) -> None:
        """Raises ApiError 403 unless clients may load and unload models."""
        if not self.allow_control:
            raise ApiError(403, "models cannot be loaded or unloaded here: the service was started without "
                           "--allow-model-control", code="model_control_off")  # fmt: skip

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a model anew from what the service was configured with. Raises ApiError."""
        self.check_control()
        if parameters:
            raise ApiError(400, f"load parameters are not supported: {', '.join(parameters)}")
        await self.repository.load(name)

    async def unload(self, name: str) -> None:
        """Unload a model once its running requests are over. Raises ApiError."""
        self.check_control()
        await self.repository.unload(name)

    async def start(self, request: InferRequest, origin: Origin, *, stream: bool = False) -> "Running":
        """Check a request and pass the gates; the answers come from what is returned. Raises ApiError or UserError."""
        if self.host.draining:
            raise ApiError(503, "the service is shutting down; try again soon", code="shutting_down", retry_after=5)
        name = self.known_as(request.model)
        check_caller(name, origin.caller)
        entry = self.repository.get(request.model, request.version)
        model = present(entry)
        if not model.ready:
            raise ApiError(503, f"model '{entry.name}' is not ready; try again soon", code="model_not_ready",
                           retry_after=model.retry_after)  # fmt: skip
        await model.prepare()
        check_inputs(model, request)
        options = Options(request.parameters, tuple(request.outputs), stream, time_left(request, origin), origin)
        kept = AsyncExitStack()
        try:
            assert entry.loaded is not None
            kept.enter_context(entry.loaded.used())
            job = await model.job(request.inputs, options)
            call = Call(
                origin.route, name, origin.address, origin.caller, job.prompt_tokens, job.max_tokens,
                tags=dict(origin.tags), timeout=options.timeout,
            )  # fmt: skip
            passage = await self.host.gates.enter(call)
            try:
                job.meter, job.record = call.meter, call.record
                if call.meter is not None:
                    call.meter.sent()
                job.begin()
            except BaseException:
                await passage.leave(Usage(outcome="refused"))
                raise
        except BaseException:
            await kept.aclose()
            raise
        self.host.open += 1
        return Running(self.host, entry, model, request, job, passage, kept)


class Running:
    """A request that has passed the gates. Iterate over it once, inside `async with`, for its answers; however that
    ends, the gates get back what they held, with what was used."""

    def __init__(
        self, host: Host, entry: Entry, model: V2Model, request: InferRequest, job: Job, passage: Passage,
        kept: AsyncExitStack,
    ) -> None:  # fmt: skip
        self.host, self.entry, self.model, self.request = host, entry, model, request
        self.job, self.passage, self.kept = job, passage, kept
        self.outcome = "abort"
        self.started = time.monotonic()
        self.has_left = False
        self.answers: AsyncGenerator[list[Output], None] | None = None

    async def __aenter__(self) -> "Running":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    async def leave(self) -> None:
        """The request is over. Only the first call counts."""
        if self.has_left:
            return
        self.has_left = True
        if self.answers is not None:
            await self.answers.aclose()
        self.host.open -= 1
        ok = self.outcome == "ok"
        if self.outcome != "abort":
            self.entry.statistics.observe(time.monotonic() - self.started, ok=ok)
        try:
            await self.passage.leave(self.job.end(self.outcome))
        finally:
            await self.kept.aclose()

    def __aiter__(self) -> AsyncGenerator[list[Output], None]:
        self.answers = self._answers()
        return self.answers

    async def _answers(self) -> AsyncGenerator[list[Output], None]:
        """The outputs of each answer. Raises ApiError only."""
        try:
            async with aclosing(self.job.answers()) as answers:
                async for made in answers:
                    yield chosen(self.model, self.request, self.model.check_outputs(made))
            self.outcome = "ok"
        except Exception as error:
            self.outcome = "error"
            raise told(error, self.entry.name) from error

    async def only(self) -> list[Output]:
        """The one answer of a request that must have one. Raises ApiError."""
        found = [outputs async for outputs in self]
        if len(found) != 1:
            raise ApiError(500, f"model '{self.entry.name}' gave {len(found)} answers; a stream can carry them")
        return found[0]


def check_caller(name: str, caller: Caller | None) -> None:
    """Raises ApiError 403 for a key that may not use the model."""
    if caller is not None and not caller.may_use(name):
        raise not_allowed(name)


def present(entry: Entry) -> V2Model:
    """The model of an entry. Raises ApiError 503 if it is not loaded."""
    if entry.loaded is None:
        reason = f": {entry.reason}" if entry.reason else ""
        raise ApiError(503, f"model '{entry.name}' version {entry.version} is not available{reason}", "model",
                       "model_not_ready", retry_after=5)  # fmt: skip
    return entry.loaded.model


def check_inputs(model: V2Model, request: InferRequest) -> None:
    """Raises ApiError 400 for tensors that are not the model's."""
    specs = {spec.name: spec for spec in model.inputs}
    for name, array in request.inputs.items():
        if name not in specs:
            raise ApiError(400, f"unexpected inference input '{name}' for model '{request.model}'; it has "
                           f"{', '.join(specs)}")  # fmt: skip
        if request.datatypes[name] != specs[name].datatype:
            raise ApiError(400, f"input '{name}' is {request.datatypes[name]}; the model takes {specs[name].datatype}")
        specs[name].check(array, f"input '{name}'")
    if missing := [name for name, spec in specs.items() if not spec.optional and name not in request.inputs]:
        raise ApiError(400, f"input {', '.join(repr(name) for name in missing)} is missing for model '{request.model}'")
    check_outputs(model, request)


def check_outputs(model: V2Model, request: InferRequest) -> None:
    """Raises ApiError 400 for outputs that the model does not have, and classes of what are no numbers."""
    have = {spec.name: spec for spec in model.outputs}
    for name, parameters in request.outputs.items():
        count = parameters.get("classification", 1)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ApiError(400, f"output '{name}': classification takes a number of classes")
        if name not in have:
            raise ApiError(400, f"unexpected inference output '{name}' for model '{request.model}'; it has "
                           f"{', '.join(have)}")  # fmt: skip
        if "classification" in parameters and have[name].datatype == "BYTES":
            raise ApiError(400, f"output '{name}': BYTES have no classes")


def time_left(request: InferRequest, origin: Origin) -> float | None:
    """Seconds that a request has: what its `timeout` parameter (microseconds, as Triton's) and its carrier say."""
    given = request.parameters.get("timeout")
    if given is None:
        return origin.timeout
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ApiError(400, f"the parameter timeout must be microseconds, got {given!r}")
    limits = [limit for limit in (given / 1e6 or None, origin.timeout) if limit is not None]
    return min(limits, default=None)


def chosen(model: V2Model, request: InferRequest, made: Tensors) -> list[Output]:
    """The outputs that were asked for, in that order, as classes where that was asked for."""
    datatypes = {spec.name: spec.datatype for spec in model.outputs}
    found: list[Output] = []
    for name in request.outputs or [name for name in datatypes if name in made]:
        parameters = request.outputs.get(name, {})
        if name not in made:
            continue
        array, datatype = made[name], datatypes[name]
        if "classification" in parameters:
            array, datatype = classes(np.atleast_1d(array), parameters["classification"], model.labels), "BYTES"
        found.append(Output(name, datatype, array, parameters))
    return found


def told(error: Exception, name: str) -> ApiError:
    """What a client is told. The log gets where it happened, but no message: that may quote the request."""
    if isinstance(error, TimeoutError):
        return ApiError(504, "the request was not done in time", "timeout", "deadline_exceeded")
    known = as_api_error(error)
    if known.status == 500 and not isinstance(error, ApiError):
        last = traceback.extract_tb(error.__traceback__)[-1]
        log.error("model %s failed: %s in %s, line %s", name, type(error).__name__, last.filename, last.lineno)
    return known


def stats_of(entry: Entry) -> dict[str, Any]:
    """A model's entry in the statistics extension."""
    seen = entry.statistics
    model = entry.loaded.model if entry.loaded else None
    return {
        "name": entry.name, "version": entry.version, "last_inference": seen.last, "inference_count": seen.succeeded,
        "execution_count": getattr(model, "executions", seen.succeeded),
        "inference_stats": {
            "success": {"count": seen.succeeded, "ns": seen.succeeded_ns},
            "fail": {"count": seen.failed, "ns": seen.failed_ns},
        },
    }  # fmt: skip
