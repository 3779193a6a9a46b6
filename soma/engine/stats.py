"""What an engine says about itself, for metrics. Loads no torch."""

from collections.abc import Sequence
from typing import Any

# Gauges: running, waiting (requests), kv_cache_usage (0 to 1). Counters since the engine's start: the others.
COUNTERS = ("prefix_cache_queries", "prefix_cache_hits", "preemptions", "draft_tokens", "accepted_tokens")
EMPTY: dict[str, float] = {"running": 0, "waiting": 0, "kv_cache_usage": 0.0, **dict.fromkeys(COUNTERS, 0)}


def stats_of(engine: Any) -> dict[str, float]:
    """The figures of an engine in this process: its own `stats()` where it has them, else what can be seen."""
    if (own := getattr(engine, "stats", None)) is not None:
        return {**EMPTY, **own()}
    pool = engine.pool
    return {**EMPTY, "running": len(engine.running), "waiting": len(engine.waiting),
            "kv_cache_usage": pool.used / pool.budget}  # fmt: skip


def total(each: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of several engines as those of one: sums, and of shares the mean."""
    sums = {name: sum(values[name] for values in each) for name in EMPTY}
    return sums | {"kv_cache_usage": sums["kv_cache_usage"] / len(each)}


def members(engine: Any) -> list[Any]:
    """The engines behind one, or the one."""
    return list(getattr(engine, "engines", [engine]))


def scheduled_at(request: Any) -> float | None:
    """When a request was first given a place (monotonic seconds); None where its engine does not say."""
    return getattr(request, "scheduled", None)
