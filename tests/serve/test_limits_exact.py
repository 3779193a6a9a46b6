"""Every decision of every algorithm, in memory and in Redis, against the oracle's, which follows the definitions."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limit_oracle import Oracle
from redis_tools import RedisServer, needs_redis

from soma.serve.limits.buckets import Ask, Bucket, Decision
from soma.serve.limits.config import LimitsConfig, Rule
from soma.serve.limits.memory import MemoryLimits
from soma.serve.limits.shared import SCRIPT, RedisLimits, SharedMetrics

WINDOWED = ("fixed_window", "sliding_window_log", "sliding_window_counter")
BUCKETS = ("token_bucket", "leaky_bucket")
BEGIN = 1_790_000_000_000  # ms; now and then a multiple of the windows
# (ms until it happens, what: None a call, else which earlier call ends; its cost or what it used)
Step = tuple[int, int | None, int]


def rules(algorithms: tuple[str, ...], unit: str = "tokens") -> st.SearchStrategy[Rule]:
    def make(algorithm: str, limit: int, window: int, burst: int | None) -> Rule:
        more = {"burst": burst} if algorithm in BUCKETS else {}
        return Rule(name="r", algorithm=algorithm, limit=limit, window=window / 1000, unit=unit, **more)  # type: ignore[arg-type]

    return st.builds(
        make, st.sampled_from(algorithms), st.integers(1, 12), st.integers(1, 40), st.none() | st.integers(1, 12)
    )


STEPS = st.lists(
    st.tuples(st.sampled_from([0, 0, 1, 2, 5, 17, 41, 90]), st.none() | st.integers(0, 30), st.integers(1, 6)),
    max_size=40,
)


class Clock:
    def __init__(self) -> None:
        self.now = BEGIN

    def __call__(self) -> int:
        return self.now


def expect(oracle: Oracle, now: int, cost: int, decision: Decision) -> None:
    """One rule's decision is the oracle's, and so is what it tells."""
    admitted = oracle.admits(now, cost)
    assert decision.admitted == admitted
    if cost > oracle.capacity:
        assert decision.delay == -1
    elif not admitted:
        assert decision.delay == oracle.retry(now, cost)
    else:
        assert decision.delay == oracle.delay(now)


def follow(rule: Rule, steps: list[Step]) -> None:
    clock, oracle, ask = Clock(), Oracle(rule), Bucket.of(rule)
    limits, open_ = MemoryLimits(clock), {}
    for number, (passed, ends, amount) in enumerate(steps):
        clock.now += passed
        if ends is not None and ends in open_:
            decided, cost = open_.pop(ends)
            limits.settle(f"c{ends}", decided, [(Ask(ask, "k", cost), amount)])
            oracle.settle(clock.now, f"c{ends}", amount)
            continue
        decision = limits.take(f"c{number}", [Ask(ask, "k", amount)])
        expect(oracle, clock.now, amount, decision)
        if decision.admitted:
            oracle.add(clock.now, f"c{number}", amount)
            open_[number] = (clock.now, amount)
        assert decision.states[0][0] == oracle.remaining(clock.now)


@given(rules(WINDOWED + BUCKETS), STEPS)
@settings(max_examples=300, deadline=None)
def test_one_rule_in_memory(rule: Rule, steps: list[Step]) -> None:
    follow(rule, steps)


def test_the_oracle_notices() -> None:
    """Negative control: a limiter with another limit disagrees with it."""
    rule, steps = Rule(name="r", algorithm="fixed_window", limit=3, window="20ms", unit="tokens"), [(0, None, 1)] * 4

    class Wrong(Oracle):
        @property
        def capacity(self) -> int:
            return 4

    follow(rule, steps)
    clock, oracle, bucket = Clock(), Wrong(rule), Bucket.of(rule)
    limits = MemoryLimits(clock)
    for number, (_, _, amount) in enumerate(steps[:3]):
        expect(oracle, clock.now, amount, limits.take(f"c{number}", [Ask(bucket, "k", amount)]))
        oracle.add(clock.now, f"c{number}", amount)
    fourth = limits.take("c4", [Ask(bucket, "k", 1)])
    with pytest.raises(AssertionError):
        expect(oracle, clock.now, 1, fourth)


@pytest.mark.parametrize(
    ("algorithm", "more", "delays"),
    [
        ("fixed_window", {}, [0, 0, 0, 3000]),  # 90 % of a window of 30 s lies behind
        ("sliding_window_log", {}, [0, 0, 0, 30_000]),
        ("sliding_window_counter", {}, [0, 0, 0, 13_000]),  # in the next one the count weighs 3 (30 - 10) / 30 = 2
        ("token_bucket", {}, [0, 0, 0, 10_000]),
        ("token_bucket", {"burst": 1}, [0, 10_000]),
        ("leaky_bucket", {"burst": 2}, [0, 10_000, 10_000]),  # the second call waits in the queue, the third may not
    ],
)
def test_worked_numbers(algorithm: str, more: dict[str, int], delays: list[int]) -> None:
    clock = Clock()
    clock.now = BEGIN // 30_000 * 30_000 + 27_000
    limits = MemoryLimits(clock)
    bucket = Bucket.of(Rule(name="r", algorithm=algorithm, limit=3, window="30s", **more))  # type: ignore[arg-type]
    made = [limits.take(f"c{number}", [Ask(bucket, "k", 1)]).delay for number in range(len(delays))]
    assert made == delays


def test_counts_as_new_are_forgotten() -> None:
    clock = Clock()
    limits = MemoryLimits(clock)
    bucket = Bucket.of(Rule(name="r", limit=3, window="1s"))
    for number in range(3000):
        clock.now += 10
        limits.take(f"c{number}", [Ask(bucket, f"k{number}", 1)])
    assert len(limits.counts) < 1200


# ------------------------------------------------------------------------------------------------------------ Redis


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as made:
        yield made


# The test's clock in place of Redis' own; everything else is the script as it runs.
TEST_CLOCK = "local clock = tonumber(redis.call('GET', 'clock'))\n"
WITH_TEST_CLOCK = TEST_CLOCK + SCRIPT[SCRIPT.index("-- The algorithms") :]


async def both(server: RedisServer, found: list[Rule], steps: list[Step]) -> None:
    """The script and memory.py say the same about several rules at once, in all they say."""
    server.client.flushdb()
    clock = Clock()
    config = LimitsConfig(redis=server.url, rules=found, lease="1h", timeout="10s")
    shared = RedisLimits(config, SharedMetrics(), WITH_TEST_CLOCK)
    memory, buckets, open_ = MemoryLimits(clock), [Bucket.of(rule) for rule in found], {}
    try:
        for number, (passed, ends, amount) in enumerate(steps):
            clock.now += passed
            server.client.set("clock", clock.now)
            if ends is not None and ends in open_:
                decided, asks = open_.pop(ends)
                ended = [(ask, 0 if ask.bucket.code == 6 else amount) for ask in asks if ask.bucket.is_leased]
                memory.settle(f"c{ends}", decided, ended)
                if ended:
                    shared.settle(f"c{ends}", decided, ended)
                    while shared.queue or shared.is_sending:  # Redis sees it at this time of the clock
                        await asyncio.sleep(0)
                continue
            asks = [
                Ask(each, f"k{place}", amount if each.rule.unit == "tokens" else 1)
                for place, each in enumerate(buckets)
            ]
            decision = memory.take(f"c{number}", asks)
            assert await shared.take(f"c{number}", asks) == decision
            if decision.admitted:
                open_[number] = (clock.now, asks)
    finally:
        await shared.close()


MANY = st.lists(
    rules(WINDOWED + BUCKETS) | rules(WINDOWED + BUCKETS, "requests")
    | st.builds(lambda limit: Rule(name="r", algorithm="concurrency", limit=limit), st.integers(1, 5)),
    min_size=1, max_size=4,
).map(lambda made: [rule.model_copy(update={"name": f"r{place}"}) for place, rule in enumerate(made)])  # fmt: skip


@needs_redis
@given(MANY, STEPS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_several_rules_in_redis_as_in_memory(server: RedisServer, found: list[Rule], steps: list[Step]) -> None:
    asyncio.run(both(server, found, steps))
