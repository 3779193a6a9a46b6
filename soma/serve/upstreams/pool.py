"""The upstreams behind one model name: which are well, and which gets a request.

Passive health is a circuit breaker (Nygard, Release It!): closed, open for a pause, then one request on trial. Active
health asks every few seconds. Retries have a budget (as Finagle's: each request earns a part of one), so that they do
not double the load on what is already failing.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from soma.engine.router import Router
from soma.serve.upstreams.config import Breaker, ModelConfig, UpstreamConfig

LONGEST_PAUSE = 60.0  # seconds
FIRST_RETRIES = 10.0  # that there are before any request has earned one
BLOCK = 128  # bytes of a prompt that count as one for prefix routing
BLOCKS = 65_536  # of them that an upstream is thought to remember
CHECKS = 2  # failed in a row: it is not well


class Upstream:
    """One service: what it is doing, and whether it is well."""

    def __init__(self, config: UpstreamConfig, breaker: Breaker, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.breaker, self.clock = config, breaker, clock
        self.running = 0
        self.credit = 0.0  # towards its turn
        self.failures = self.trips = self.failed_checks = 0
        self.open_until = 0.0  # of the breaker, or as long as it asked with Retry-After
        self.on_trial = False
        key = config.key
        self.headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    @property
    def is_open(self) -> bool:
        """Whether it gets requests."""
        if self.failed_checks >= CHECKS or self.clock() < self.open_until:
            return False
        return not (self.on_trial and self.running)

    @property
    def load(self) -> float:
        """Requests for its weight."""
        return self.running / self.config.weight

    def begin(self) -> None:
        """It gets a request."""
        self.running += 1

    def end(self) -> None:
        """The request is over, however."""
        self.running -= 1

    def succeeded(self) -> None:
        """It answered: the breaker closes."""
        self.failures = self.trips = 0
        self.on_trial = False

    def failed(self) -> None:
        """It did not answer, or with an error of its own."""
        self.failures += 1
        if self.on_trial or self.failures >= self.breaker.failures:
            pause = min(LONGEST_PAUSE, self.breaker.pause / 1000 * 2**self.trips)
            self.trips, self.on_trial, self.failures = self.trips + 1, True, 0
            self.open_until = self.clock() + pause

    def pause(self, seconds: float) -> None:
        """It asked not to be asked for a while."""
        self.open_until = max(self.open_until, self.clock() + min(seconds, LONGEST_PAUSE))

    def checked(self, well: bool) -> None:
        """What the active check found."""
        self.failed_checks = 0 if well else self.failed_checks + 1

    def reset(self) -> None:
        """It has just woken: what was before does not count."""
        self.failures = self.trips = self.failed_checks = 0
        self.open_until, self.on_trial = 0.0, False


class Budget:
    """How many retries there may be."""

    def __init__(self, share: float) -> None:
        self.share, self.left = share, FIRST_RETRIES

    def earn(self) -> None:
        """A request came."""
        self.left = min(FIRST_RETRIES * 10, self.left + self.share)

    def spend(self) -> bool:
        """Whether a retry may be made; then it is."""
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Pool:
    """The upstreams of a model. `before`: the pool that this one replaces; what it knows of those that stay is kept."""

    upstreams: list[Upstream]
    budget: Budget

    def __init__(
        self, name: str, config: ModelConfig, before: "Pool | None" = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self.config, self.clock = name, config, clock
        known = {each.config: each for each in before.upstreams} if before else {}
        self.upstreams = [known.get(each) or Upstream(each, config.breaker, clock) for each in config.upstreams]
        for upstream in self.upstreams:
            upstream.breaker = config.breaker
        self.budget = before.budget if before else Budget(config.retry.budget)
        self.budget.share = config.retry.budget
        self.router = Router([BLOCKS] * len(self.upstreams), BLOCK) if config.routing == "prefix" else None
        if before and before.router and self.router and before.config.upstreams == config.upstreams:
            self.router = before.router
        self.waiting = 0  # requests that wait for it to wake

    def pick(self, tried: Collection[Upstream], prompt: Callable[[], bytes]) -> Upstream | None:
        """Who gets a request, or None if nobody is left. prompt: what it begins with, for routing by prefix."""
        open_ = [each for each in self.upstreams if each.is_open and each not in tried]
        if not open_:
            return None
        if self.router is not None:
            chain = self.router.chain(prompt())
            loads = [each.load if each in open_ else None for each in self.upstreams]
            place = self.router.choose(chain, loads)
            self.router.add(place, chain)
            return self.upstreams[place]
        by_cost = self.config.routing == "cost"
        ranks = {each: (each.config.cost if by_cost else 0.0, each.load) for each in open_}
        return in_turn([each for each in open_ if ranks[each] == min(ranks.values())])

    @property
    def retry_after(self) -> int:
        """Seconds until somebody may be there."""
        waits = [each.open_until - self.clock() for each in self.upstreams if not each.failed_checks >= CHECKS]
        return max(1, min(60, round(min(waits, default=5.0) + 0.5)))


def in_turn(equals: Sequence[Upstream]) -> Upstream:
    """One of several that are equally good, by weight and evenly mixed (nginx' smooth weighted round-robin). One that
    was away gets no more than its share afterwards."""
    for each in equals:
        each.credit += each.config.weight
    chosen = max(equals, key=lambda each: each.credit)
    chosen.credit -= sum(each.config.weight for each in equals)
    return chosen


def prompt_bytes(value: dict[str, Any]) -> bytes:
    """What a request's prompt begins with, in bytes that are equal where prompts are."""
    given: Any = value.get("messages") or value.get("prompt") or value.get("input") or ""
    if isinstance(given, str):
        return given.encode(errors="replace")
    if isinstance(given, Sequence) and given and isinstance(given[0], int):
        return b"".join(int(each).to_bytes(4, "big", signed=True) for each in given if isinstance(each, int))
    return repr(given).encode(errors="replace")
