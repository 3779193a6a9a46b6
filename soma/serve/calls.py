"""One request of one client, as keys, limits and the ledger see it, and the gates that it passes on its way.

A gate (rate limits, budgets, the ledger, admission) may refuse a call, or take note of it and hold something for it:
tokens reserved, a place in a queue, a line in the ledger. Whatever way the call ends, what was held is given back with
what was really used. The routes know gates only through `Gates`.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from starlette.requests import Request

from soma.serve.errors import ApiError
from soma.serve.graphs.trace import CallSpan

if TYPE_CHECKING:
    from soma.serve.requestlog.record import Record

log = logging.getLogger("soma.serve")


_random = bytearray()


def random_hex(size: int = 12) -> str:
    """`size` random bytes in hex, out of a supply: the system call for every id was a tenth of the gateway's time."""
    if len(_random) < size:
        _random.extend(os.urandom(4096))
    made = bytes(_random[-size:])
    del _random[-size:]
    return made.hex()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the key that came with the request. `key_id` and `team` are names, never the secret."""

    key_id: str
    team: str | None = None
    priority: int = 0
    models: tuple[str, ...] | None = None  # patterns of models that it may use; None: all

    def may_use(self, model: str) -> bool:
        """Whether the key is good for a model."""
        return self.models is None or any(fnmatchcase(model, pattern) for pattern in self.models)


class Meter(Protocol):
    """Counts what a call makes while it runs, so that the counts outlive this process. Any thread may call it."""

    def sent(self) -> None:
        """The call has gone to the engine or upstream: its prompt counts."""

    def cached(self, tokens: int) -> None:
        """So many tokens more of the prompt were in the engine's cache."""

    def made(self, tokens: int) -> None:
        """So many tokens more have come back."""


@dataclass(slots=True)
class Call:
    """What is known of a request before it runs. `max_tokens` bounds what all of its choices make."""

    route: str
    model: str
    address: str  # of the client, as an IP
    caller: Caller | None = None  # None: this service asks for no keys
    prompt_tokens: int = 0
    max_tokens: int = 0
    id: str = field(default_factory=lambda: f"req-{random_hex()}")
    tags: dict[str, str] = field(default_factory=dict)  # prompt template version, graph node: go to ledger and trace
    meter: Meter | None = None  # set by the ledger's gate
    is_foreign: bool = False  # goes to an upstream: what comes back of it are events, which are not quite tokens
    timeout: float | None = None  # seconds that the client gives it
    record: "Record | None" = None  # set by the request log's gate, filled by who answers


@dataclass(slots=True)
class Usage:
    """What a call used in the end. `outcome`: ok, error (ours or the upstream's), abort (the client left), refused."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    outcome: str = "ok"
    estimated: bool = False  # an upstream broke off and cannot tell


class Hold(Protocol):
    """What a gate keeps for a call while it runs."""

    headers: dict[str, str]  # for the response, as x-ratelimit-remaining-requests

    async def leave(self, usage: Usage) -> None:
        """The call has ended. Called once, whatever happened."""


class Gate(Protocol):
    """Refuses calls or lets them pass."""

    async def enter(self, call: Call) -> Hold | None:
        """Raises ApiError (403, 429, 503) to refuse; None where there is nothing to give back."""


class Passage:
    """The holds of a call that passed all gates."""

    def __init__(self, call: Call, holds: Sequence[Hold]) -> None:
        self.call, self.holds = call, holds
        self.has_left = False
        self.span = CallSpan(call)

    @property
    def headers(self) -> dict[str, str]:
        """Response headers: the call's id and what the gates tell."""
        told = {"x-request-id": self.call.id}
        if prompt := self.call.tags.get("prompt"):
            told["x-soma-prompt"] = prompt
        for hold in self.holds:
            told |= hold.headers
        return told

    async def leave(self, usage: Usage) -> None:
        """Give everything back, the last gate first; also if this task is cancelled meanwhile. Only the first call
        counts."""
        if self.has_left:
            return
        self.has_left = True
        self.span.end(usage)
        await asyncio.shield(self._leave(usage))

    async def _leave(self, usage: Usage) -> None:
        for hold in reversed(self.holds):
            try:
                await hold.leave(usage)
            except Exception:  # one gate's trouble must not keep what another holds
                log.exception("%s could not settle call %s", type(hold).__name__, self.call.id)


class Gates:
    """All gates of a service, in the order in which calls pass them."""

    def __init__(self, gates: Sequence[Gate] = ()) -> None:
        self.gates = list(gates)

    async def enter(self, call: Call) -> Passage:
        """Pass all gates or none: if one refuses, what earlier ones held is given back unused. Raises ApiError."""
        holds: list[Hold] = []
        try:
            for gate in self.gates:
                if (hold := await gate.enter(call)) is not None:
                    holds.append(hold)
        except BaseException:
            await Passage(call, holds).leave(Usage(outcome="refused"))
            raise
        return Passage(call, holds)


def called(request: Request, model: str, prompt_tokens: int, max_tokens: int = 0) -> Call:
    """The call that a request is, for the gates. Who asks was found out before: `request.state.caller`."""
    caller = caller_of(request)
    address = getattr(request.state, "address", None) or (request.client.host if request.client else "")
    call = Call(request.scope["path"], model, address, caller, prompt_tokens, max_tokens)
    call.tags |= getattr(request.state, "tags", {})
    return call


def caller_of(request: Request) -> Caller | None:
    """Who asks, where this service asks for keys."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return caller


def may_use(request: Request, model: str) -> bool:
    """Whether the key that came with a request is good for a model; without keys everybody is."""
    caller = caller_of(request)
    return caller is None or caller.may_use(model)


def check_allowed(request: Request, model: str) -> None:
    """Raises ApiError 403 where the request's key may not use the model. For routes that pass no gates."""
    if not may_use(request, model):
        raise not_allowed(model)


def not_allowed(model: str) -> ApiError:
    """The answer to a key that is kept to other models."""
    return ApiError(403, f"this key may not use the model `{model}`", "model", "model_not_allowed")
