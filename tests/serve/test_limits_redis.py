"""Many gateways, one real Redis on its own clock; Redis that hangs, dies and forgets; a gateway that dies."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from http_tools import wait_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limit_oracle import Oracle
from redis_tools import RedisServer, needs_redis

from soma.serve.calls import Call, Usage
from soma.serve.errors import ApiError
from soma.serve.limits.buckets import Ask, Bucket
from soma.serve.limits.config import LimitsConfig, Rule
from soma.serve.limits.gate import LimitsGate, LimitsHold
from soma.serve.limits.shared import RedisLimits, SharedMetrics

pytestmark = needs_redis
SKEWS = (0.0, 3600.0, -86_400.0, 0.7)  # seconds
WORKER = Path(__file__).with_name("limit_worker.py")


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as made:
        yield made


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with RedisServer() as made:
        yield made


class Worker:
    """A gateway process."""

    def __init__(self, skew: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(skew)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def say(self, job: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    made = [Worker(skew) for skew in SKEWS]
    yield made
    for worker in made:
        worker.kill()


class Order:
    """The order in which Redis ran the script's calls, as MONITOR shows it: (op, id)."""

    def __init__(self, server: RedisServer) -> None:
        self.seen: list[tuple[str, str]] = []
        self.done = threading.Event()
        self.monitor = redis.Redis(port=server.port, socket_timeout=60).monitor()
        self.monitor.__enter__()
        self.thread = threading.Thread(target=self._listen)
        self.thread.start()

    def _listen(self) -> None:
        for entry in self.monitor.listen():
            if entry["command"] == "ECHO the end":
                return
            if found := re.match(r"EVALSHA .* (take|settle) (\S+) \d+ ", entry["command"]):
                self.seen.append((found[1], found[2]))

    def end(self, server: RedisServer) -> list[tuple[str, str]]:
        server.client.echo("the end")
        self.thread.join(120)
        self.monitor.__exit__(None, None, None)
        return self.seen


def one_of_each(limits: list[int], windows: list[int]) -> list[dict[str, Any]]:
    names = ("fixed_window", "sliding_window_log", "sliding_window_counter", "token_bucket", "leaky_bucket")
    rows: list[dict[str, Any]] = [
        {"name": name, "algorithm": name, "limit": limit, "window": window / 1000, "unit": "tokens"}
        for name, limit, window in zip(names, limits, windows, strict=True)
    ]
    return [*rows, {"name": "at_once", "algorithm": "concurrency", "limit": 6}]


@given(
    st.lists(st.integers(8, 40), min_size=5, max_size=5), st.lists(st.integers(40, 400), min_size=5, max_size=5),
    st.integers(0, 10**6),
)  # fmt: skip
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_four_gateways_with_skewed_clocks(
    shared_server: RedisServer, workers: list[Worker], limits: list[int], windows: list[int], seed: int
) -> None:
    """All five algorithms at once: each decision of each of four processes is the sequential oracle's."""
    shared_server.client.flushdb()
    order = Order(shared_server)
    rows = one_of_each(limits, windows)
    config = {"redis": shared_server.url, "rules": rows, "timeout": "20s", "lease": "10m"}
    for number, worker in enumerate(workers):
        worker.say({"limits": config, "calls": 30, "seconds": 0.4, "seed": seed + number, "name": f"w{number}"})
    said: dict[tuple[str, str], Any] = {}
    for worker in workers:
        said |= {(op, id_): answer for op, id_, answer in worker.hear()}
    seen = order.end(shared_server)
    assert len(seen) == len([op for op, _ in said if op != "used"])
    oracles = [Oracle(Rule.model_validate(row)) for row in rows]
    admitted = 0
    for op, id_ in seen:
        answer = said[op, id_]
        now, amount = answer[1], int(id_.rpartition("-")[2])
        costs = [amount if oracle.rule.unit == "tokens" else 1 for oracle in oracles]
        if op == "take":
            pass_ = all(oracle.admits(now, cost) for oracle, cost in zip(oracles, costs, strict=True))
            assert answer[0] == ("yes" if pass_ else "no")
            if pass_:
                admitted += 1
                for oracle, cost in zip(oracles, costs, strict=True):
                    oracle.add(now, id_, cost)
            assert answer[6::2] == [oracle.remaining(now) for oracle in oracles]
        else:
            for oracle in oracles:
                oracle.settle(now, id_, 0 if oracle.rule.algorithm == "concurrency" else said["used", id_])
    assert 0 < admitted < 120


# ---------------------------------------------------------------------------------------------------- Redis is away

PATIENT = "30s"
CALL = {"route": "/v1/completions", "model": "m", "address": "203.0.113.9"}


async def enter(gate: LimitsGate, **more: Any) -> "LimitsHold | int | None":
    """The hold, or the status of the refusal."""
    try:
        return await gate.enter(Call(**{**CALL, **more}))
    except ApiError as error:
        return error.status


def gate_of(server: RedisServer, when_away: str, limit: int = 3) -> LimitsGate:
    rule = {"name": "all", "limit": limit, "window": "1d", "algorithm": "fixed_window"}
    config = {"redis": server.url, "when_away": when_away, "timeout": PATIENT, "rules": [rule]}
    return LimitsGate(LimitsConfig.model_validate(config))


@contextmanager
def stopped(server: RedisServer, gate: LimitsGate) -> Iterator[None]:
    """Within it Redis takes what it is sent and says nothing. Only then does the gate wait a short time for an answer:
    a machine that stands still for a moment must not look like that."""
    shared = gate.shared
    assert shared is not None
    pool, patient = shared.redis.connection_pool, shared.timeout

    def wait_at_most(seconds: float) -> None:
        shared.timeout = pool.connection_kwargs["socket_timeout"] = seconds
        for connection in pool._available_connections:
            connection.socket_timeout = seconds

    server.signal(signal.SIGSTOP)
    wait_at_most(0.3)
    yield
    wait_at_most(patient)
    server.signal(signal.SIGCONT)


@contextmanager
def killed(server: RedisServer) -> Iterator[None]:
    server.kill()
    yield
    assert server.start()


async def back(gate: LimitsGate) -> "LimitsHold | int | None":
    """The first answer that Redis gives again."""
    assert gate.shared is not None
    for _ in range(2400):
        if not gate.shared.is_away and isinstance(found := await enter(gate), LimitsHold | int) and found != 503:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError("Redis did not come back")


@pytest.mark.parametrize(
    ("policy", "away"),
    [("closed", [503, 503, 503, 503]), ("open", [None] * 4), ("local", ["hold", "hold", "hold", 429])],
)
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_redis_is_away(server: RedisServer, policy: str, away: list[Any], how: str) -> None:
    """The stated policy holds; and once Redis goes on, calls that were given up do not count."""

    async def run() -> None:
        gate = gate_of(server, policy)
        assert isinstance(await enter(gate), LimitsHold)
        assert gate.shared_metrics.up._value.get() == 1
        with stopped(server, gate) if how == "stop" else killed(server):
            made = [await enter(gate) for _ in range(4)]
            assert ["hold" if isinstance(each, LimitsHold) else each for each in made] == away
            assert gate.away.labels(policy)._value.get() == 4
            assert gate.shared_metrics.up._value.get() == 0
        first = await back(gate)
        assert isinstance(first, LimitsHold)
        # Stopped it still knows the call from before; killed it has lost that, and the gateway says so.
        assert gate.shared_metrics.lost._value.get() == (0 if how == "stop" else 1)
        assert first.headers["x-ratelimit-remaining-requests"] == ("1" if how == "stop" else "2")
        left = 1 if how == "stop" else 2
        made = [await enter(gate) for _ in range(left + 1)]
        assert [isinstance(each, LimitsHold) for each in made] == [True] * left + [False]
        assert made[-1] == 429
        await gate.close()

    asyncio.run(run())


def test_flushed(server: RedisServer) -> None:
    """Exact from then on; what was let through before is counted as lost, by each gateway what it let through."""

    async def run() -> None:
        gates = [gate_of(server, "closed", limit=5) for _ in range(2)]
        for gate in (*gates, gates[0]):
            assert isinstance(await enter(gate), LimitsHold)
        server.client.flushall()
        made = [await enter(gates[number % 2]) for number in range(6)]
        assert [isinstance(each, LimitsHold) for each in made] == [True] * 5 + [False]
        assert [gate.shared_metrics.lost._value.get() for gate in gates] == [2, 1]
        for gate in gates:
            await gate.close()

    asyncio.run(run())


def test_what_ended_meanwhile_is_settled(server: RedisServer) -> None:
    """A call that ends while Redis hangs: Redis is told when it is back, once."""

    async def run() -> None:
        rule = {"name": "all", "limit": 100, "window": "1d", "unit": "tokens", "algorithm": "fixed_window"}
        config = {"redis": server.url, "timeout": PATIENT, "rules": [rule]}
        gate = LimitsGate(LimitsConfig.model_validate(config))
        hold = await enter(gate, prompt_tokens=10, max_tokens=80)
        assert isinstance(hold, LimitsHold)
        assert hold.headers["x-ratelimit-remaining-tokens"] == "10"
        with stopped(server, gate):
            await hold.leave(Usage(10, 5))
            assert await enter(gate, prompt_tokens=1) == 503
        assert gate.shared is not None
        while gate.shared.queue or gate.shared.is_away:
            await asyncio.sleep(0.02)
        last = await enter(gate, prompt_tokens=1, max_tokens=1)
        assert isinstance(last, LimitsHold)
        assert last.headers["x-ratelimit-remaining-tokens"] == str(100 - 15 - 2)
        await gate.close()

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------------------ Leases


def leased(server: RedisServer, lease: str) -> dict[str, Any]:
    rows = [
        {"name": "tokens", "limit": 4, "window": "1d", "unit": "tokens", "algorithm": "sliding_window_log"},
        {"name": "at_once", "limit": 1, "algorithm": "concurrency"},
    ]
    return {"redis": server.url, "rules": rows, "lease": lease, "timeout": PATIENT}


@pytest.mark.parametrize("lease", [1, 600])
def test_a_holder_is_killed(server: RedisServer, lease: int) -> None:
    """kill -9: what it had reserved comes back after its lease, and not before."""
    config = leased(server, f"{lease}s")
    worker = Worker(0.0)
    worker.say({"limits": config, "calls": 1, "seconds": 0, "seed": 1, "name": "w", "hold": True})
    taken = worker.hear()
    worker.kill()

    async def run() -> None:
        limits = RedisLimits(LimitsConfig.model_validate(config), SharedMetrics())
        asks = [
            Ask(bucket, bucket.rule.name, cost)
            for bucket, cost in zip(map(Bucket.of, limits_rules), (4, 1), strict=True)
        ]
        while True:
            decision = await limits.take("next", asks)
            if decision.admitted or lease > 60:
                break
            await asyncio.sleep(0.05)
        if lease > 60:
            assert not decision.admitted
        else:
            assert decision.now >= taken + 1000 * lease
            assert decision.states == ((0, 86_400_000), (0, 0))
        await limits.close()

    limits_rules = LimitsConfig.model_validate(config).rules
    asyncio.run(run())


def test_a_call_that_runs_keeps_its_lease(server: RedisServer) -> None:
    async def run() -> None:
        gate = LimitsGate(LimitsConfig.model_validate(leased(server, "6s")))
        hold = await enter(gate, max_tokens=2)
        assert isinstance(hold, LimitsHold)
        (key,) = server.client.keys("*at_once*:l")
        ((_, ends),) = server.client.zrange(key, 0, -1, withscores=True)
        while (now := server.client.zscore(key, hold.id)) == ends:
            await asyncio.sleep(0.05)
        assert now > ends
        await hold.leave(Usage(1, 0))
        assert gate.shared is not None
        while gate.shared.queue:
            await asyncio.sleep(0.01)
        await gate.close()
        assert wait_for(lambda: server.client.zcard(key) == 0)

    asyncio.run(run())
