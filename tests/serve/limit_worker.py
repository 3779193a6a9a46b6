"""One gateway of several for test_limits_redis.py: `python limit_worker.py SKEW` with clocks that are SKEW seconds off.

Reads a line of JSON (the limits, how many calls, a seed), makes the calls, prints what Redis said to each command.
`{"hold": true}` instead takes one call and never ends it.
"""

import asyncio
import json
import random
import sys
import time
from typing import Any

SKEW = float(sys.argv[1])
_time, _monotonic = time.time, time.monotonic
time.time = lambda: _time() + SKEW
time.monotonic = lambda: _monotonic() + abs(SKEW)

from soma.serve.limits.buckets import Ask, Bucket  # noqa: E402
from soma.serve.limits.config import LimitsConfig  # noqa: E402
from soma.serve.limits.shared import Command, RedisLimits, SharedMetrics  # noqa: E402


class Recorded(RedisLimits):
    """Notes what Redis answered."""

    record: list[Any]

    async def _pipeline(self, batch: Any) -> list[Any]:
        answers = await super()._pipeline(batch)
        for command, answer in zip(batch, answers, strict=True):
            assert isinstance(command, Command)
            said = [each.decode() if isinstance(each, bytes) else each for each in answer]
            self.record.append([*command.arguments[:2], said])
        return answers


async def run(job: dict[str, Any]) -> list[Any]:
    config = LimitsConfig.model_validate(job["limits"])
    limits, draw, name = Recorded(config, SharedMetrics()), random.Random(job["seed"]), job["name"]
    limits.record = []
    buckets = [Bucket.of(rule) for rule in config.rules]

    async def call(number: int) -> None:
        # Some at once: more than six at a time, whatever the machine does.
        await asyncio.sleep(draw.random() * job["seconds"] if number >= 10 else 0)
        amount = draw.randint(1, 4)
        asks = [Ask(each, each.rule.name, amount if each.rule.unit == "tokens" else 1) for each in buckets]
        decision = await limits.take(f"{name}-{number}-{amount}", asks)
        if job.get("hold"):
            print(json.dumps(decision.now), flush=True)
            await asyncio.sleep(600)
        if decision.admitted:
            await asyncio.sleep(draw.random() * job["seconds"] / 4)
            used = draw.randint(0, 6)
            ended = [(ask, 0 if ask.bucket.code == 6 else used) for ask in asks if ask.bucket.is_leased]
            limits.settle(f"{name}-{number}-{amount}", decision.now, ended)
            limits.record.append(["used", f"{name}-{number}-{amount}", used])

    await asyncio.gather(*(call(number) for number in range(job["calls"])))
    await limits.close()
    return limits.record


for line in sys.stdin:
    print(json.dumps(asyncio.run(run(json.loads(line)))), flush=True)
