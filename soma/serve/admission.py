"""How many calls of a model run at once, who waits, and who is turned away before waiting has become useless.

A call waits at most `interval`. When the queue has not been empty for that long, there is more work than can be done:
then nobody waits longer than `target`, and the newest goes first, since who waited long has mostly given up (controlled
delay and adaptive LIFO of Maurer, Fail at Scale, ACM Queue 13(8), 2015, after Nichols and Jacobson's CoDel, 2012).
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import Counter
from pydantic import Field

from soma.serve.calls import Call, Usage
from soma.serve.errors import ApiError
from soma.serve.limits.config import Span, Strict


class AdmissionConfig(Strict):
    """The block `admission` of a model."""

    running: int = Field(ge=1, description="Calls at once.")
    waiting: int = Field(256, ge=0, description="Calls that may wait; more get 429.")
    interval: Span = Field(10_000, ge=1, description="The longest wait.")
    target: Span = Field(500, ge=1, description="The longest wait while there is more work than can be done.")


@dataclass(eq=False)
class Waiter:
    """A call in the queue."""

    priority: int
    since: float
    place: asyncio.Future[None]
    timer: asyncio.TimerHandle | None = None


class Admission:
    """The queue of one model. Lower priority goes first."""

    def __init__(self, config: AdmissionConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.clock = config, clock
        self.running = 0
        self.queue: list[Waiter] = []
        self.last_empty = clock()

    @property
    def is_overloaded(self) -> bool:
        """Whether calls have been waiting all the time for as long as one may wait."""
        return bool(self.queue) and self.clock() - self.last_empty >= self.config.interval / 1000

    async def enter(self, priority: int = 0, timeout: float | None = None) -> None:
        """Take a place, or wait for one. Raises ApiError: 429 the queue is full; 503 it moves too slowly; 504 the
        call's own time is over."""
        if not self.queue:
            self.last_empty = self.clock()
            if self.running < self.config.running:
                self.running += 1
                return
        self._shed()
        if len(self.queue) >= self.config.waiting:
            raise self._error(429, f"{self.config.waiting} requests wait already; try again soon", "queue_full")
        loop = asyncio.get_running_loop()
        waiter = Waiter(priority, self.clock(), loop.create_future())
        self.queue.append(waiter)
        most = self.config.interval / 1000
        late = timeout is not None and timeout < most
        error = (
            ApiError(504, "the request's time is over, and it still waits", "timeout", "deadline_exceeded") if late
            else self._slow()
        )  # fmt: skip
        waiter.timer = loop.call_later(timeout if late and timeout is not None else most, self._drop, waiter, error)
        try:
            await waiter.place
        except asyncio.CancelledError:
            if waiter in self.queue:
                self._remove(waiter)
            elif waiter.place.done() and not waiter.place.cancelled() and waiter.place.exception() is None:
                self.leave()  # it had just been given a place
            raise

    def leave(self) -> None:
        """A call has ended: the next one has its place."""
        self.running -= 1
        self._shed()
        while self.queue and self.running < self.config.running:
            order = -1 if self.is_overloaded else 1
            waiter = min(self.queue, key=lambda each: (each.priority, order * each.since))
            self._remove(waiter)
            if not waiter.place.done():
                self.running += 1
                waiter.place.set_result(None)
        if not self.queue:
            self.last_empty = self.clock()

    def _shed(self) -> None:
        """While there is too much work, turn away who has waited longer than the target."""
        if self.is_overloaded:
            before = self.clock() - self.config.target / 1000
            for waiter in [each for each in self.queue if each.since < before]:
                self._drop(waiter, self._slow())

    def _drop(self, waiter: Waiter, error: ApiError) -> None:
        if waiter in self.queue:
            self._remove(waiter)
            if not waiter.place.done():
                waiter.place.set_exception(error)

    def _remove(self, waiter: Waiter) -> None:
        self.queue.remove(waiter)
        if waiter.timer is not None:
            waiter.timer.cancel()

    def _slow(self) -> ApiError:
        return self._error(503, "there is more work than can be done in time; try again soon", "overloaded")

    def _error(self, status: int, message: str, code: str) -> ApiError:
        return ApiError(status, message, code=code, retry_after=max(1, self.config.interval // 1000))


class AdmissionGate:
    """The queues of all models that have one."""

    def __init__(self, configs: dict[str, AdmissionConfig | None]) -> None:
        self.queues: dict[str, Admission] = {}
        self.refused = Counter("soma:admission_refused", "Calls that found no place in time.", ["code"], registry=None)
        self.replace(configs)

    def replace(self, configs: dict[str, AdmissionConfig | None]) -> None:
        """Other settings from now on; who runs and waits stays."""
        before, self.queues = self.queues, {}
        for name, config in configs.items():
            if config is not None:
                self.queues[name] = before.get(name) or Admission(config)
                self.queues[name].config = config

    async def enter(self, call: Call) -> "Place | None":
        """Wait for a place. Raises ApiError."""
        queue = self.queues.get(call.model)
        if queue is None:
            return None
        try:
            await queue.enter(call.caller.priority if call.caller else 0, call.timeout)
        except ApiError as error:
            self.refused.labels(error.code).inc()
            raise
        return Place(queue)


class Place:
    """A call's place among those that run."""

    def __init__(self, queue: Admission) -> None:
        self.queue, self.headers = queue, dict[str, str]()

    async def leave(self, usage: Usage) -> None:
        """Let the next one in."""
        self.queue.leave()
