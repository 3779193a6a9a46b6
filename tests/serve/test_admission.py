"""Who waits, who goes first, and who is turned away: a queue with a clock that the test moves."""

import asyncio

import pytest

from soma.serve.admission import Admission, AdmissionConfig, AdmissionGate
from soma.serve.calls import Call, Usage
from soma.serve.errors import ApiError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def admission(**more: object) -> tuple[Admission, Clock]:
    clock = Clock()
    config = {"running": 1, "waiting": 4, "interval": "10s", "target": "500ms", **more}
    return Admission(AdmissionConfig.model_validate(config), clock), clock


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def start(queue: Admission, log: list[str], name: str, **more: float) -> asyncio.Task[None]:
    async def one() -> None:
        try:
            await queue.enter(**more)  # type: ignore[arg-type]
            log.append(name)
        except ApiError as error:
            log.append(f"{name} {error.code}")

    return asyncio.create_task(one())


def test_first_come_first_served_within_a_priority() -> None:
    async def run() -> list[str]:
        queue, clock = admission()
        log: list[str] = []
        for name, priority in (("a", 0), ("b", 0), ("c", -1), ("d", 0), ("e", 1), ("f", 0)):
            start(queue, log, name, priority=priority)
            await settle()
            clock.now += 0.1
        for _ in range(5):
            queue.leave()
            await settle()
        assert queue.running == 0
        return log

    assert asyncio.run(run()) == ["a", "f queue_full", "c", "b", "d", "e"]


def test_overloaded() -> None:
    """The queue was never empty for the interval: who waited longer than the target is turned away, the newest goes
    first."""

    async def run() -> list[str]:
        queue, clock = admission()
        log: list[str] = []
        for name in ("a", "b"):
            start(queue, log, name)
            await settle()
        clock.now += 9.9
        start(queue, log, "c")
        await settle()
        assert not queue.is_overloaded
        clock.now += 0.2
        start(queue, log, "d")
        await settle()
        assert log == ["a", "b overloaded"]
        queue.leave()
        await settle()
        return log

    assert asyncio.run(run()) == ["a", "b overloaded", "d"]


def test_not_overloaded_once_it_was_empty() -> None:
    async def run() -> list[str]:
        queue, clock = admission()
        log: list[str] = []
        for name in ("a", "b"):
            start(queue, log, name)
            await settle()
        clock.now += 8
        queue.leave()
        await settle()
        start(queue, log, "c")
        await settle()
        clock.now += 8
        start(queue, log, "d")
        await settle()
        queue.leave()
        await settle()
        return log

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_its_own_time_is_over() -> None:
    async def run() -> list[str]:
        queue, _ = admission()
        log: list[str] = []
        start(queue, log, "a")
        await settle()
        await start(queue, log, "b", timeout=0.01)
        assert queue.queue == []
        return log

    assert asyncio.run(run()) == ["a", "b deadline_exceeded"]


def test_the_longest_wait() -> None:
    async def run() -> list[str]:
        queue, _ = admission(interval="20ms")
        log: list[str] = []
        start(queue, log, "a")
        await settle()
        await start(queue, log, "b")
        return log

    assert asyncio.run(run()) == ["a", "b overloaded"]


@pytest.mark.parametrize("has_place", [False, True])
def test_a_client_that_leaves_the_queue(has_place: bool) -> None:
    """Also in the moment in which it was given a place: the next one gets that."""

    async def run() -> None:
        queue, _ = admission()
        log: list[str] = []
        start(queue, log, "a")
        await settle()
        waits = start(queue, log, "b")
        start(queue, log, "c")
        await settle()
        if has_place:
            queue.leave()
        waits.cancel()
        await settle()
        if not has_place:
            queue.leave()
            await settle()
        assert log == ["a", "c"]
        queue.leave()
        assert queue.running == 0

    asyncio.run(run())


def test_the_gate_has_a_queue_for_each_model() -> None:
    async def run() -> None:
        gate = AdmissionGate({"m": AdmissionConfig(running=1, waiting=0), "n": None})
        place = await gate.enter(Call("/v1/completions", "m", ""))
        assert place is not None
        assert await gate.enter(Call("/v1/completions", "n", "")) is None
        with pytest.raises(ApiError) as caught:
            await gate.enter(Call("/v1/completions", "m", ""))
        assert (caught.value.status, caught.value.retry_after) == (429, 10)
        assert gate.refused.labels("queue_full")._value.get() == 1
        gate.replace({"m": AdmissionConfig(running=2, waiting=0)})
        second = await gate.enter(Call("/v1/completions", "m", ""))
        assert second is not None
        for each in (place, second):
            await each.leave(Usage())
        assert gate.queues["m"].running == 0

    asyncio.run(run())
