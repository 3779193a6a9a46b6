"""The door: pure ASGI middleware in front of every route. Nobody without a key passes, but to what is public by name.

Keys come as `Authorization: Bearer KEY` or `X-API-Key: KEY`. A request with several is refused: two parts of a system
that pick different ones are a way in.
"""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from prometheus_client import Counter
from starlette.types import ASGIApp, Receive, Scope, Send

from soma.serve.calls import Call, Caller, not_allowed
from soma.serve.errors import ApiError, respond
from soma.serve.keys.keyring import Keyring
from soma.serve.keys.routes import MANAGING, PUBLIC

FAILURES = 10  # wrong keys that one address may send at once, and how many a minute after that
ADDRESSES = 10_000  # whose failures are remembered


class Failures:
    """A token bucket of failed attempts for each address (a /64 of IPv6 is one: who has one has all of it)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def count(self, address: str) -> float:
        """Note a failure; seconds until the next would be answered as one, 0 while it is."""
        name, now = network_of(address), self.clock()
        left, then = self.buckets.pop(name, (float(FAILURES), now))
        left = min(FAILURES, left + (now - then) * FAILURES / 60)
        is_over = left < 1
        self.buckets[name] = (left if is_over else left - 1, now)
        if len(self.buckets) > ADDRESSES:
            self.buckets.popitem(last=False)
        return (1 - left) * 60 / FAILURES if is_over else 0.0


class Guard:
    """Finds out who asks, for HTTP and for gRPC.

    role: of the keys that open this door. `refused`: a counter, for whose registry it is.
    """

    def __init__(self, keyring: Keyring, role: str = "use") -> None:
        self.keyring, self.role, self.failures = keyring, role, Failures()
        self.refused = Counter("soma:requests_refused", "Requests refused at the door, by reason.", ["reason"],
                               registry=None)  # fmt: skip

    def admit(self, given: Iterable[str], address: str, path: str) -> Caller:
        """The caller with the one key that was given, if it may use `path`.

        Raises ApiError: 401 no key, several, or one that is not valid; 403 a valid one that may not do this; 429 too
        many failures from this address, which shuts nobody out who has a valid key; 503 the keys cannot be read.
        """
        if self.keyring.is_stale:
            raise ApiError(503, "keys cannot be checked at the moment; try again soon", code="keys_unavailable",
                           retry_after=5)  # fmt: skip
        texts = list(given)
        if len(texts) != 1:
            reason = "several" if texts else "missing"
            more = "send one key, once" if texts else "this service asks for a key"
            raise self._failed(address, reason, f"{more}: Authorization: Bearer KEY, or X-API-Key: KEY")
        state, entry = self.keyring.find(texts[0])
        if state != "active" or entry is None:
            words = "this key is not valid" if entry is None else f"this key is {state}"
            raise self._failed(address, state, words)
        key = entry.key
        if key.role != self.role:
            self.refused.labels("role").inc()
            raise ApiError(403, f"this is a key for {'the admin API' if key.role == 'admin' else 'the model service'}, "
                           "which listens elsewhere", code="wrong_role")  # fmt: skip
        if not may_reach(path, key.routes):
            self.refused.labels("route").inc()
            raise ApiError(403, "this key may not use this route", code="route_not_allowed")
        return entry.caller

    def counts(self) -> dict[str, int]:
        """How many were refused, by reason."""
        samples = (sample for metric in self.refused.collect() for sample in metric.samples)
        return {each.labels["reason"]: int(each.value) for each in samples if each.name.endswith("_total")}

    def _failed(self, address: str, reason: str, words: str) -> ApiError:
        self.refused.labels(reason).inc()
        if wait := self.failures.count(address):
            return ApiError(429, "too many attempts without a valid key", code="too_many_failures",
                            retry_after=math.ceil(wait))  # fmt: skip
        return ApiError(401, words, code="invalid_api_key", headers={"WWW-Authenticate": 'Bearer realm="soma"'})


class Door:
    """The middleware: it sets `request.state.caller`. `soma.serve.addresses` stands before it and finds the address."""

    def __init__(self, app: ASGIApp, guard: Guard, public: frozenset[str] = PUBLIC) -> None:
        self.app, self.guard, self.public = app, guard, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        if scope["type"] != "http" or scope["path"] not in self.public:
            address = state.get("address") or peer(scope)
            try:
                state["caller"] = self.guard.admit(credentials(scope["headers"]), address, scope["path"])
            except ApiError as error:
                await refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the error, the body unread."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await respond(error, scope["path"])(scope, receive, send)


def credentials(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """Every key among the headers; what is no bearer token counts as a key that nobody has."""
    found = []
    for name, value in headers:
        text = value.decode("latin-1").strip()
        if name == b"x-api-key":
            found.append(text)
        elif name == b"authorization":
            scheme, _, rest = text.partition(" ")
            found.append(rest.strip() if scheme.lower() == "bearer" else "")
    return found


def may_reach(path: str, routes: tuple[str, ...] | None) -> bool:
    """Whether a key with these patterns may use a path; None: all that does not manage the service."""
    if routes is None:
        return not any(fnmatchcase(path, pattern) for pattern in MANAGING)
    return any(fnmatchcase(path, pattern) for pattern in routes)


def peer(scope: Scope) -> str:
    """Who sent the packet."""
    client: Any = scope.get("client")
    return str(client[0]) if client else ""


def network_of(address: str) -> str:
    """The address, or the /64 that an IPv6 address lies in."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False))


class ModelScope:
    """The gate that keeps a key to its models."""

    async def enter(self, call: Call) -> None:
        """Raises ApiError 403."""
        if call.caller is not None and not call.caller.may_use(call.model):
            raise not_allowed(call.model)
