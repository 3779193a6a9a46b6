"""The limits as a gate: reserves when a call comes, settles when it has ended, tells the client how much is left."""

import asyncio
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter

from soma.serve.calls import Call, Usage
from soma.serve.errors import ApiError
from soma.serve.limits.buckets import NEVER, Ask, Bucket, Decision, asks_of
from soma.serve.limits.config import LimitsConfig
from soma.serve.limits.memory import MemoryLimits
from soma.serve.limits.shared import AwayError, RedisLimits, SharedMetrics


class LimitsGate:
    """All rules at once, all or nothing. Raises UserError for a URL of Redis that is none."""

    def __init__(self, config: LimitsConfig, clock: Callable[[], int] | None = None) -> None:
        self.memory = MemoryLimits(clock)
        self.shared: RedisLimits | None = None
        self.shared_metrics = SharedMetrics()
        self.refused = Counter("soma:limits_refused", "Calls that a limit refused.", ["rule"], registry=None)
        self.away = Counter(
            "soma:limits_away", "Calls that Redis did not decide, by what was done.", ["policy"], registry=None
        )
        self._take(config)

    def _take(self, config: LimitsConfig) -> None:
        self.config, self.buckets = config, [Bucket.of(rule) for rule in config.rules]
        self.shared = RedisLimits(config, self.shared_metrics) if config.redis else None

    async def replace(self, config: LimitsConfig) -> None:
        """Other rules from now on. Calls that run settle where they began; a rule of the same name goes on counting."""
        before, same = self.shared, self.config.model_copy(update={"rules": config.rules}) == config
        if same:
            self.config, self.buckets = config, [Bucket.of(rule) for rule in config.rules]
            return
        self._take(config)
        if before is not None:
            await before.close()

    def register(self, registry: CollectorRegistry) -> None:
        """Show the figures."""
        shared = self.shared_metrics
        for collector in (self.refused, self.away, *((shared.up, shared.lost, shared.dropped) if self.shared else ())):
            registry.register(collector)

    async def close(self) -> None:
        """End what runs in the background."""
        if self.shared is not None:
            await self.shared.close()

    async def enter(self, call: Call) -> "LimitsHold | None":
        """Reserve for the call; wait in the queue of a leaky bucket. Raises ApiError 429, or 503 without Redis."""
        asks = asks_of(self.buckets, call)
        if not asks:
            return None
        store: MemoryLimits | RedisLimits = self.memory
        if self.shared is None:
            decision = self.memory.take(call.id, asks)
        else:
            try:
                store, decision = self.shared, await self.shared.take(call.id, asks)
            except AwayError:
                self.away.labels(self.config.when_away).inc()
                if self.config.when_away == "open":
                    return None
                if self.config.when_away == "closed":
                    raise ApiError(503, "the rate limits cannot be checked now; try again soon", code="limits_away",
                                   retry_after=1) from None  # fmt: skip
                store, decision = self.memory, self.memory.take(call.id, asks)
        headers = told(asks, decision)
        if not decision.admitted:
            assert decision.refused is not None
            ask = asks[decision.refused]
            self.refused.labels(ask.bucket.rule.name).inc()
            raise refusal(ask, decision, headers)
        hold = LimitsHold(store, call.id, decision.now, asks, headers)
        if decision.delay:
            try:
                await asyncio.sleep(decision.delay / 1000)
            except asyncio.CancelledError:
                await hold.leave(Usage(outcome="refused"))
                raise
        return hold


class LimitsHold:
    """What a call has reserved."""

    def __init__(
        self, store: MemoryLimits | RedisLimits, id_: str, decided: int, asks: Sequence[Ask], headers: dict[str, str]
    ) -> None:
        self.store, self.id, self.decided, self.asks, self.headers = store, id_, decided, asks, headers

    async def leave(self, usage: Usage) -> None:
        """Settle on what was used; a call that another gate refused never was."""
        ended = [(ask, used_of(ask, usage)) for ask in self.asks]
        ended = [(ask, used) for ask, used in ended if used != ask.cost or ask.bucket.is_leased]
        if ended:
            self.store.settle(self.id, self.decided, ended)


def used_of(ask: Ask, usage: Usage) -> int:
    """What a call used of what it asked for."""
    if usage.outcome == "refused" or ask.bucket.rule.algorithm == "concurrency":
        return 0
    return usage.prompt_tokens + usage.completion_tokens if ask.bucket.rule.unit == "tokens" else ask.cost


def told(asks: Sequence[Ask], decision: Decision) -> dict[str, str]:
    """OpenAI's headers, of the rule that has least left for each unit."""
    headers: dict[str, str] = {}
    for unit in ("requests", "tokens"):
        rows = [
            (remaining, -reset, ask.bucket.limit)
            for ask, (remaining, reset) in zip(asks, decision.states, strict=True)
            if ask.bucket.rule.unit == unit and ask.bucket.rule.algorithm != "concurrency"
        ]
        if rows:
            remaining, reset, limit = min(rows)
            headers |= {f"x-ratelimit-limit-{unit}": str(limit), f"x-ratelimit-remaining-{unit}": str(remaining),
                        f"x-ratelimit-reset-{unit}": span(-reset)}  # fmt: skip
    return headers


def refusal(ask: Ask, decision: Decision, headers: dict[str, str]) -> ApiError:
    """The 429 of a call. `retry-after-ms` is exact, and the openai client reads it first."""
    rule = ask.bucket.rule
    whose = f" for each {' and '.join(rule.per)}" if rule.per else ""
    if rule.algorithm == "concurrency":
        allowed = f"{rule.limit} calls at once{whose}"
    else:
        allowed = f"{rule.limit} {rule.unit} in {span(rule.window)}{whose}"
    if decision.delay == NEVER:
        message = (
            f"this request is too large: it may take {ask.cost} {rule.unit}, and the limit `{rule.name}` is {allowed}"
        )
        return ApiError(429, message, code="rate_limit_exceeded", headers={**headers, "x-should-retry": "false"})
    message = f"the limit `{rule.name}` is reached: {allowed}; try again in {span(decision.delay)}"
    return ApiError(
        429, message, code="rate_limit_exceeded", retry_after=-(-decision.delay // 1000),
        headers={**headers, "retry-after-ms": str(decision.delay)},
    )  # fmt: skip


def span(ms: int) -> str:
    """A span of time as OpenAI writes it: 20ms, 1.5s, 6m0s, 24h0m0s."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    seconds = f"{rest // 1000}" + (f".{rest % 1000:03d}".rstrip("0") if rest % 1000 else "") + "s"
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else "") + seconds
