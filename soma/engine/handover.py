"""Events from an engine's thread to an event loop. Loads no torch."""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

if TYPE_CHECKING:
    from soma.engine.request import TokenEvent

    Put = Callable[[TokenEvent], object]


class Handover:
    """The way to one event loop. What gathers before the loop gets to it wakes it once: a step of 64 requests makes 64
    events, and each wake-up is a system call and a turn of the loop. Any number of threads may give."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = ref(loop)
        self.is_called = False
        self.waiting: deque[tuple[Put, TokenEvent]] = deque()

    def give(self, put: "Put", event: "TokenEvent") -> None:
        """Call `put(event)` on the loop, after what was given before; dropped if the loop has closed."""
        self.waiting.append((put, event))  # before the look at `is_called`: `_take` looks the other way round
        if self.is_called:
            return
        self.is_called = True
        loop = self.loop()
        try:
            if loop is None:
                raise RuntimeError("the loop is gone")
            loop.call_soon_threadsafe(self._take, loop)
        except RuntimeError:  # it is closed: nobody listens
            self.waiting.clear()
            self.is_called = False

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        self.is_called = False
        for _ in range(len(self.waiting)):
            put, event = self.waiting.popleft()
            loop.call_soon(put, event)


handovers: WeakKeyDictionary[asyncio.AbstractEventLoop, Handover] = WeakKeyDictionary()


def threadsafe(loop: asyncio.AbstractEventLoop, put: "Put") -> "Callable[[TokenEvent], None]":
    """Deliver on `loop`'s thread, where this is called; events for a loop that has closed are dropped."""
    handover = handovers.get(loop)
    if handover is None:
        handovers[loop] = handover = Handover(loop)
    return partial(handover.give, put)
