"""Adaptive batching, on a clock that jumps: whatever arrives and is cancelled, everybody gets their own result, batches
keep their bounds, and waiting happens where it pays."""

import asyncio
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instant import run

import soma
from soma.base.errors import UserError
from soma.serve.batching import Batcher, LatencyModel, batched, power_of_two
from soma.serve.errors import ApiError
from soma.serve.v2.batched import BatchedModel
from soma.serve.v2.callables import PythonModel
from soma.serve.v2.model import TensorSpec

FIXED, EACH = 0.010, 0.001


class Machine:
    """A function whose batch of n takes FIXED + EACH·n seconds. It notes the batches that it ran."""

    def __init__(self, fixed: float = FIXED, each: float = EACH) -> None:
        self.fixed, self.each = fixed, each
        self.batches: list[list[Any]] = []

    async def __call__(self, items: list[Any]) -> list[Any]:
        self.batches.append(list(items))
        await asyncio.sleep(self.fixed + self.each * len(items))
        if any(item == "poison" for item in items):
            raise ValueError("poison")
        return [("result", item) for item in items]


CALLS = st.lists(
    st.tuples(
        st.floats(0, 0.1),  # seconds from the call before
        st.one_of(st.none(), st.none(), st.floats(0, 0.05)),  # cancelled after so long
        st.integers(0, 1),  # key
        st.integers(1, 3),  # size
    ),
    min_size=1, max_size=40,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(CALLS, st.integers(1, 8), st.sampled_from([0.0, 0.005, 0.05]), st.sampled_from([None, 0.03]), st.integers(1, 2))
def test_everybody_gets_their_own(
    calls: list[tuple[float, float | None, int, int]], max_batch: int, delay: float, target: float | None, places: int
) -> None:
    machine = Machine()

    async def main() -> None:
        batcher = Batcher(machine, max_batch=max_batch, max_delay=delay, target=target, concurrency=places)

        async def one(place: int, cancel_after: float | None, key: int, size: int) -> Any:
            work = asyncio.ensure_future(batcher.submit((place, key, size), size, key))
            if cancel_after is None:
                return await work
            await asyncio.wait({work}, timeout=cancel_after)
            work.cancel()
            try:
                return await work
            except asyncio.CancelledError:
                return "cancelled"

        tasks = []
        for place, (gap, cancel_after, key, size) in enumerate(calls):
            await asyncio.sleep(gap)
            tasks.append(asyncio.create_task(one(place, cancel_after, key, size)))
        results = await asyncio.gather(*tasks)
        for place, (result, (_, cancel_after, key, size)) in enumerate(zip(results, calls, strict=True)):
            if cancel_after is None or result != "cancelled":
                assert result == ("result", (place, key, size))
        await asyncio.sleep(1)
        assert not batcher.queue
        assert not batcher.running
        assert batcher.worker is None or batcher.worker.done()

    run(main())
    for batch in machine.batches:
        assert len({key for _, key, _ in batch}) == 1
        assert sum(size for *_, size in batch) <= max_batch or len(batch) == 1
        assert [place for place, *_ in batch] == sorted(place for place, *_ in batch)
    assert len({place for batch in machine.batches for place, *_ in batch}) == sum(map(len, machine.batches))


def test_a_batch_mate_that_leaves_hurts_nobody_and_the_last_one_ends_the_batch() -> None:
    machine = Machine(fixed=1.0)

    async def main() -> None:
        batcher = Batcher(machine, max_batch=4)
        first = asyncio.ensure_future(batcher.submit("first"))
        await asyncio.sleep(0.1)
        mates = [asyncio.ensure_future(batcher.submit(f"mate {i}")) for i in range(3)]
        await first
        await asyncio.sleep(0.1)
        mates[0].cancel()
        assert await mates[1] == ("result", "mate 1")
        assert await mates[2] == ("result", "mate 2")
        alone = asyncio.ensure_future(batcher.submit("alone"))
        await asyncio.sleep(0.1)
        started = asyncio.get_running_loop().time()
        alone.cancel()
        assert await batcher.submit("next") == ("result", "next")
        took = asyncio.get_running_loop().time() - started
        assert took < 1.01  # not 1.9: the batch that nobody waited for was stopped

    run(main())


def test_poison_is_only_for_who_sent_it() -> None:
    machine = Machine()

    async def main() -> list[Any]:
        batcher = Batcher(machine, max_batch=8)
        head = asyncio.ensure_future(batcher.submit("head"))
        await asyncio.sleep(0)
        rest = [batcher.submit(item) for item in ("a", "poison", "b")]
        return [await head, *await asyncio.gather(*rest, return_exceptions=True)]

    head, a, poison, b = run(main())
    assert (head, a, b) == (("result", "head"), ("result", "a"), ("result", "b"))
    assert isinstance(poison, ValueError)


def test_the_check_notices_a_batcher_that_mixes_results() -> None:
    """Negative control: a function whose results are turned by one place fails the property above."""

    async def turned(items: list[Any]) -> list[Any]:
        await asyncio.sleep(0.01)
        return [("result", item) for item in items[1:] + items[:1]]

    async def main() -> list[Any]:
        batcher: Batcher[Any, Any] = Batcher(turned, max_batch=4)
        return list(await asyncio.gather(*(batcher.submit(i) for i in range(5))))

    assert run(main()) != [("result", i) for i in range(5)]


def mean_latency(rate: float, fixed: float, batcher_options: dict[str, Any], seed: int, kind: type[Batcher]) -> float:
    """Seconds from call to result over 300 Poisson arrivals."""
    machine = Machine(fixed=fixed)
    source = random.Random(seed)

    async def main() -> float:
        batcher = kind(machine, **batcher_options)
        now = asyncio.get_running_loop().time
        latencies: list[float] = []

        async def one() -> None:
            started = now()
            await batcher.submit(0)
            latencies.append(now() - started)

        tasks = []
        for _ in range(300):
            await asyncio.sleep(source.expovariate(rate))
            tasks.append(asyncio.create_task(one()))
        await asyncio.gather(*tasks)
        return sum(latencies) / len(latencies)

    return run(main())


class Never(Batcher[Any, Any]):
    """Runs what is there at once."""

    def patience(self, now: float) -> float:
        return 0.0


class Always(Batcher[Any, Any]):
    """Holds every batch for the whole delay, as batchers with a fixed window do."""

    def patience(self, now: float) -> float:
        if not self.queue or len(self.queue) >= self.max_batch:
            return 0.0
        return self.queue[0].arrived + self.max_delay - now


@pytest.mark.parametrize("rate", [5, 30, 100, 300, 1000, 3000])
def test_waiting_pays(rate: float) -> None:
    """From idle to overload: never worse than the better of never waiting and always waiting, but for 5 %."""
    options = {"max_batch": 32, "max_delay": 0.02}
    seeds = range(2)
    ours, never, always = (
        sum(mean_latency(rate, 0.02, options, seed, kind) for seed in seeds) for kind in (Batcher, Never, Always)
    )
    assert ours <= 1.05 * min(never, always)


def test_an_idle_function_is_not_held_back() -> None:
    """One call in a second, a window of half a second: the fixed window costs all of it, ours nothing."""
    options = {"max_batch": 32, "max_delay": 0.5}
    assert mean_latency(1, FIXED, options, 1, Batcher) < 0.02
    assert mean_latency(1, FIXED, options, 1, Always) > 0.3


def test_a_latency_target_bounds_the_batch() -> None:
    """30 ms to the result allow batches of about 20 on a machine of 10 ms + 1 ms each."""
    machine = Machine()

    async def main() -> None:
        batcher = Batcher(machine, max_batch=64, max_delay=0.02, target=0.03)
        source = random.Random(0)
        for size in (1, 8, 16):  # what it learns from
            await asyncio.gather(*(batcher.submit(0) for _ in range(size)))
        machine.batches.clear()
        tasks = []
        for _ in range(400):
            await asyncio.sleep(source.expovariate(300))
            tasks.append(asyncio.create_task(batcher.submit(0)))
        await asyncio.gather(*tasks)

    run(main())
    assert max(map(len, machine.batches)) <= 20
    assert max(map(len, machine.batches)) >= 4


def test_latency_model_learns_the_line() -> None:
    model = LatencyModel()
    assert model(5) == 0
    for size in np.random.default_rng().integers(1, 33, 60):
        model.observe(int(size), FIXED + EACH * size)
    assert model.line == pytest.approx((FIXED, EACH), rel=1e-6)
    for size in (1, 2, 4, 8) * 40:  # it got faster: old batches fade
        model.observe(size, 0.002 + 0.0005 * size)
    assert model.line == pytest.approx((0.002, 0.0005), rel=0.05)


def test_powers_of_two() -> None:
    assert [power_of_two(size, 32) for size in (1, 2, 3, 5, 17, 32)] == [1, 2, 4, 8, 32, 32]
    assert power_of_two(5, 6) == 6
    assert power_of_two(40, 32) == 40


def test_decorator() -> None:
    sizes: list[int] = []

    @soma.batched(max_batch=8, pad=True)
    def double(items: list[int]) -> list[int]:
        """Twice."""
        sizes.append(len(items))
        return [2 * item for item in items]

    @batched
    async def named(items: list[str]) -> Sequence[str | Exception]:
        return [KeyError(item) if item == "bad" else item.upper() for item in items]

    class Model:
        def __init__(self, factor: int) -> None:
            self.factor = factor

        @soma.batched(max_batch=4)
        async def times(self, items: list[int]) -> list[int]:
            sizes.append(len(items))
            return [self.factor * item for item in items]

    async def main() -> None:
        assert await asyncio.gather(*(double(i) for i in range(20))) == [2 * i for i in range(20)]
        assert set(sizes) <= {1, 2, 4, 8}
        got = await asyncio.gather(named("a"), named("bad"), named("b"), return_exceptions=True)
        assert (got[0], got[2]) == ("A", "B")
        assert isinstance(got[1], KeyError)
        two, three = Model(2), Model(3)
        sizes.clear()
        assert await asyncio.gather(*(two.times(i) for i in range(4)), *(three.times(i) for i in range(4))) == [
            0, 2, 4, 6, 0, 3, 6, 9,
        ]  # fmt: skip
        assert max(sizes) > 1

    asyncio.run(main())
    asyncio.run(main())  # a second event loop has batches of its own
    assert double.__doc__ == "Twice."
    with pytest.raises(ValueError, match="max_batch is 0"):
        batched(max_batch=0)(len)


def test_wrong_number_of_results() -> None:
    @batched
    async def short(items: list[int]) -> list[int]:
        return []

    async def main() -> None:
        with pytest.raises(TypeError, match="0 results for 1 items"):
            await short(1)

    run(main())


def test_import_is_light() -> None:
    heavy = ("torch", "numpy", "fastapi", "pydantic")
    code = f"import soma, sys; soma.batched; print([name for name in {heavy} if name in sys.modules])"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "[]"


def row_model(batches: list[int], outputs: Any = None) -> PythonModel:
    async def function(x: np.ndarray, scale: Any = None) -> Any:
        batches.append(len(x))
        await asyncio.sleep(FIXED)
        if (x == 13).any():
            raise ApiError(400, "unlucky")
        return x * 2

    specs = [TensorSpec("x", "FP32", (-1, -1))], [TensorSpec("y", "FP32", (-1, -1))]
    return PythonModel(function, *specs)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 2), st.floats(0, 0.01)), min_size=1, max_size=15))
def test_v2_requests_share_batches(calls: list[tuple[int, int, float]]) -> None:
    """Requests of any number of rows and two widths: each gets its rows, padded or not."""
    batches: list[int] = []

    async def main() -> None:
        model = BatchedModel(row_model(batches), max_batch=8, pad=True)
        tasks, wanted = [], []
        for rows, width, gap in calls:
            await asyncio.sleep(gap)
            x = np.random.default_rng().random((rows, width), np.float32)
            wanted.append(2 * x)
            tasks.append(asyncio.create_task(model.infer({"x": x}, {})))
        for task, expected in zip(tasks, wanted, strict=True):
            assert np.array_equal((await task)["y"], expected)
        assert model.executions == len(batches)

    run(main())
    assert set(batches) <= {1, 2, 4, 8}
    assert sum(batches) >= sum(rows for rows, *_ in calls)


def test_v2_batching_of_one_bad_request() -> None:
    batches: list[int] = []

    async def main() -> list[Any]:
        model = BatchedModel(row_model(batches), max_batch=8)
        calls = [model.infer({"x": np.full((1, 1), value, np.float32)}, {}) for value in (1, 2, 13, 3)]
        with pytest.raises(ApiError, match="at least 1"):
            await model.infer({"x": np.zeros((0, 1), np.float32)}, {})
        return list(await asyncio.gather(*calls, return_exceptions=True))

    results = run(main())
    assert [float(each["y"][0, 0]) for each in results if isinstance(each, dict)] == [2, 4, 6]
    assert isinstance(results[2], ApiError)


def test_v2_batching_needs_a_batch_axis() -> None:
    model = PythonModel(lambda x: x, [TensorSpec("x", "FP32", (3,))], [TensorSpec("y", "FP32", (-1,))])
    with pytest.raises(UserError, match="x has \\[3\\]"):
        BatchedModel(model)
