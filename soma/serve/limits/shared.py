"""Counts that many gateways share: one script in Redis decides for each call.

What a tick of the event loop asks goes in one pipeline over one connection, so Redis decides in the order in which
calls came, and a call costs no round trip of its own under load. A call whose answer did not come in time is given up
by both sides: the script leaves alone what it reads after the deadline. Leases of running calls are renewed; those of a
gateway that died end, and the next call that meets the bucket gives back what they held.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from prometheus_client import Counter, Gauge

from soma.base.errors import UserError
from soma.base.secrets import redact_url
from soma.serve.limits.buckets import Ask, Decision
from soma.serve.limits.config import LimitsConfig

log = logging.getLogger("soma.serve")

SCRIPT = "".join(files("soma.serve.limits").joinpath(name).read_text("utf-8") for name in ("clock.lua", "limits.lua"))
PAUSE = 0.5  # seconds until Redis is tried again after it failed
REMEMBERED = 60_000  # ms for which Redis knows that a call was settled
MOST_PENDING = 100_000  # settlements kept while Redis is away


class AwayError(Exception):
    """Redis did not decide."""


@dataclass(slots=True)
class Command:
    """One call of the script. `answer` is for takes; settlements are sent again until they arrive."""

    keys: list[str]
    arguments: list[Any]
    answer: "asyncio.Future[list[Any]] | None" = None
    is_settlement: bool = False


class SharedMetrics:
    """What is seen of Redis. In no registry yet."""

    def __init__(self) -> None:
        self.up = Gauge("soma:limits_redis_up", "1 while Redis answers.", registry=None)
        self.lost = Counter(
            "soma:limits_lost_calls", "Calls let through by this gateway whose counts Redis lost.", registry=None
        )
        self.dropped = Counter(
            "soma:limits_dropped_settlements", "Calls whose end Redis was never told: too many waited.", registry=None
        )


class RedisLimits:
    """`take` and `settle` of `MemoryLimits`, in Redis. Raises UserError for a URL that is none."""

    def __init__(self, config: LimitsConfig, metrics: SharedMetrics, script: str = SCRIPT) -> None:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        assert config.redis is not None
        self.timeout, self.lease, self.metrics, self.script = config.timeout / 1000, config.lease, metrics, script
        try:
            # No retries: a script that was sent twice might count twice.
            self.redis: Any = Redis.from_url(
                config.redis, socket_timeout=self.timeout, socket_connect_timeout=self.timeout,
                retry=Retry(NoBackoff(), 0),
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"limits.redis: {redact_url(config.redis)}: {error}") from None
        # Braces: in a cluster all keys of the script lie on one node.
        self.prefix = "{" + config.prefix + ":limits}"
        self.sha: str | None = None
        self.queue: list[Command] = []
        self.wake = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.retry_at, self.is_sending = 0.0, False
        self.offset: int | None = None  # from our monotonic ms to Redis' clock
        self.running: dict[str, list[Ask]] = {}  # calls that hold leases
        self.epoch = b""
        self.seqs: deque[int] = deque(maxlen=10_000)  # of what was let through lately, to see a snapshot come back
        self.in_epoch = 0  # calls let through since Redis was empty

    def _start(self) -> None:
        if not self.tasks:
            self.tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._renew())]

    async def close(self) -> None:
        """End what runs in the background, after the last settlements."""
        deadline = time.monotonic() + 2 * self.timeout
        while (self.queue or self.is_sending) and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=self.timeout)
        await self.redis.aclose()

    @property
    def is_away(self) -> bool:
        """Whether Redis failed a moment ago."""
        return time.monotonic() < self.retry_at

    async def take(self, id_: str, asks: Sequence[Ask]) -> Decision:
        """Let a call through everywhere, or nowhere. Raises AwayError if Redis does not say in time."""
        for _ in range(2):
            deadline = 0 if self.offset is None else self._milliseconds() + self.offset + int(self.timeout * 1000)
            answer = await self._ask(id_, asks, deadline)
            if answer[0] != b"late":
                return self._decision(id_, asks, answer)
            self.offset = answer[1] - self._milliseconds()  # Redis' clock was set forward
        raise AwayError

    async def _ask(self, id_: str, asks: Sequence[Ask], deadline: int) -> list[Any]:
        if self.is_away:
            raise AwayError
        self._start()
        numbers = [part for ask in asks for part in (*ask.bucket.numbers, ask.cost, int(ask.bucket.is_leased))]
        command = Command(self._keys(asks), ["take", id_, self.lease, deadline, secrets.token_hex(8), *numbers])
        command.answer = asyncio.get_running_loop().create_future()
        self._push(command)
        return await command.answer

    def _decision(self, id_: str, asks: Sequence[Ask], answer: list[Any]) -> Decision:
        verdict, now, epoch, seq, delay, refused = answer[:6]
        self.offset = now - self._milliseconds()
        self._watch(epoch, seq, verdict == b"yes")
        if verdict == b"yes" and any(ask.bucket.is_leased for ask in asks):
            self.running[id_] = [ask for ask in asks if ask.bucket.is_leased]
        states = tuple(zip(answer[6::2], answer[7::2], strict=True))
        return Decision(verdict == b"yes", now, delay, refused - 1 if refused else None, states)

    def _watch(self, epoch: bytes, seq: int, admitted: bool) -> None:
        """Count what Redis forgot: everything if its epoch is new, the latest if an older snapshot came back."""
        lost = 0
        if epoch != self.epoch:
            lost, self.in_epoch, self.epoch = self.in_epoch, 0, epoch
            self.seqs.clear()
        while self.seqs and self.seqs[-1] >= seq:
            self.seqs.pop()
            lost += 1
            self.in_epoch -= 1
        if lost:
            self.metrics.lost.inc(lost)
            log.warning("Redis lost its counts of %d calls that this gateway let through", lost)
        if admitted:
            self.seqs.append(seq)
            self.in_epoch += 1

    def settle(self, id_: str, decided: int, asks: Sequence[tuple[Ask, int]]) -> None:
        """A call has ended: for each ask what it used in place of its cost. Sent as soon as Redis is there."""
        self.running.pop(id_, None)
        numbers = [
            part for ask, used in asks
            for part in (*ask.bucket.numbers, ask.cost, int(ask.bucket.is_leased), used)
        ]  # fmt: skip
        self._start()
        self._push(Command(
            self._keys([ask for ask, _ in asks]), ["settle", id_, self.lease, decided, REMEMBERED, *numbers],
            is_settlement=True,
        ))  # fmt: skip

    def _keys(self, asks: Sequence[Ask]) -> list[str]:
        return [self.prefix, *(f"{self.prefix}:{ask.key}" for ask in asks)]

    def _push(self, command: Command) -> None:
        self.queue.append(command)
        self.wake.set()

    @staticmethod
    def _milliseconds() -> int:
        return int(time.monotonic() * 1000)

    async def _work(self) -> None:
        while True:
            await self.wake.wait()
            self.wake.clear()
            while self.queue:
                if (pause := self.retry_at - time.monotonic()) > 0:
                    await asyncio.sleep(pause)
                batch, self.queue, self.is_sending = self.queue, [], True
                try:
                    await self._send(batch)
                except Exception:
                    log.exception("the limits could not ask Redis")
                    for command in batch:
                        if command.answer is not None and not command.answer.done():
                            command.answer.set_exception(AwayError())
                finally:
                    self.is_sending = False

    async def _send(self, batch: list[Command]) -> None:
        """Run a batch. What Redis did not do is refused, or, if it is a settlement, put back."""
        from redis.exceptions import NoScriptError, RedisError

        answers: list[Any]
        try:
            answers = await self._pipeline(batch)
            if any(isinstance(answer, NoScriptError) for answer in answers):
                self.sha = None
                answers = await self._pipeline(batch)
        except (RedisError, OSError) as error:
            answers = [error] * len(batch)
            await self.redis.connection_pool.disconnect()
        failures = [answer for answer in answers if isinstance(answer, Exception)]
        if failures:
            if not self.is_away:
                log.warning("Redis, which counts for the limits, does not answer: %s", type(failures[0]).__name__)
            self.retry_at = time.monotonic() + PAUSE
        self.metrics.up.set(0 if failures else 1)
        again = []
        for command, answer in zip(batch, answers, strict=True):
            failed = isinstance(answer, Exception)
            if command.answer is not None and not command.answer.done():
                if failed:
                    command.answer.set_exception(AwayError())
                else:
                    command.answer.set_result(answer)
            elif failed and command.is_settlement:
                again.append(command)
        if failures:  # who came meanwhile does not wait for the next try
            for command in self.queue:
                if command.answer is not None and not command.answer.done():
                    command.answer.set_exception(AwayError())
            again += [command for command in self.queue if command.is_settlement]
            self.metrics.dropped.inc(max(0, len(again) - MOST_PENDING))
            self.queue = again[-MOST_PENDING:]

    async def _pipeline(self, batch: Sequence[Command]) -> list[Any]:
        pipeline = self.redis.pipeline(transaction=False)
        if self.sha is None:
            self.sha = await self.redis.script_load(self.script)
        for command in batch:
            pipeline.execute_command("EVALSHA", self.sha, len(command.keys), *command.keys, *command.arguments)
        answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    async def _renew(self) -> None:
        """Tell Redis of the calls that still run, one command for each bucket."""
        while True:
            await asyncio.sleep(self.lease / 3000)
            held: dict[tuple[str, int], list[str]] = {}
            for id_, asks in self.running.items():
                for ask in asks:
                    held.setdefault((ask.key, ask.bucket.code), []).append(id_)
            if self.is_away:
                continue
            for (key, code), ids in held.items():
                self._push(Command([self.prefix, f"{self.prefix}:{key}"], ["renew", " ".join(ids), self.lease, code]))
