"""Events from threads to an event loop: all of them, in order, with few wake-ups, and none to a loop that is closed."""

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest

from soma.engine.handover import handovers, threadsafe
from soma.engine.request import TokenEvent

THREADS, EVENTS = 4, 500


def event(number: int) -> TokenEvent:
    return TokenEvent(number)


def test_everything_arrives_in_order() -> None:
    async def run() -> list[list[int | None]]:
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        got: list[list[int | None]] = [[] for _ in range(THREADS)]

        def take(place: int, one: TokenEvent) -> None:
            assert threading.current_thread() is threading.main_thread()
            got[place].append(one.id)
            if sum(map(len, got)) == THREADS * EVENTS:
                done.set()

        def give(place: int) -> None:
            put = threadsafe(loop, lambda one: take(place, one))
            for number in range(EVENTS):
                put(event(number))

        threads = [threading.Thread(target=give, args=(place,)) for place in range(THREADS)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(done.wait(), 120)
        for thread in threads:
            thread.join()
        return got

    assert asyncio.run(run()) == [list(range(EVENTS))] * THREADS


def test_events_that_gather_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> tuple[int, list[int | None]]:
        loop, got, calls = asyncio.get_running_loop(), [], []
        real = loop.call_soon_threadsafe

        def counted(*given: Any) -> Any:
            calls.append(given)
            return real(*given)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        put = threadsafe(loop, lambda one: got.append(one.id))
        for number in range(64):
            put(event(number))
        assert not got
        while len(got) < 64:
            await asyncio.sleep(0)
        put(event(64))
        while len(got) < 65:
            await asyncio.sleep(0)
        return len(calls), got

    calls, got = asyncio.run(run())
    assert calls == 2
    assert got == list(range(65))


def test_a_listener_that_fails_takes_nobody_with_it() -> None:
    async def run() -> list[int | None]:
        loop, got, seen = asyncio.get_running_loop(), [], []
        loop.set_exception_handler(lambda _, context: seen.append(context["exception"]))

        def broken(one: TokenEvent) -> None:
            raise ValueError("no")

        threadsafe(loop, broken)(event(0))
        threadsafe(loop, lambda one: got.append(one.id))(event(1))
        while not got:
            await asyncio.sleep(0)
        assert isinstance(seen[0], ValueError)
        return got

    assert asyncio.run(run()) == [1]


def test_a_closed_loop_gets_nothing_and_is_not_kept() -> None:
    loop = asyncio.new_event_loop()
    got: list[Any] = []
    put = threadsafe(loop, got.append)
    put(event(0))
    loop.close()
    put(event(1))
    assert got == []
    assert not handovers[loop].waiting or handovers[loop].is_called
    gone = weakref.ref(loop)
    del loop
    gc.collect()
    assert gone() is None
    put(event(2))
    assert got == []
