"""The five algorithms, and calls at once, in the memory of one process. `limits.lua` is the same for many.

Fixed window, sliding window log, sliding window counter (Cloudflare's, "How we built rate limiting capable of scaling
to millions of domains"), token bucket, leaky bucket as a queue (ITU-T I.371's continuous-state form of the GCRA).
Nothing here waits, so calls are decided one after another.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from soma.serve.limits.buckets import NEVER, Ask, Bucket, Decision

SWEEP = 1024  # decisions between two looks for counts that nobody needs any more


class Count(Protocol):
    """The count of one bucket. All methods but the first take it as `roll` left it."""

    bucket: Bucket

    def roll(self, now: int) -> None:
        """Bring it to `now`, which never goes back."""

    def check(self, cost: int) -> tuple[int, int]:
        """(ms to wait in the queue, ms until `cost` would fit: 0 if it does). `cost` can fit at all."""

    def add(self, id_: str, cost: int) -> None:
        """Count a call that was let through."""

    def adjust(self, id_: str, delta: int, decided: int) -> None:
        """Correct the count of a call that was let through at `decided`. What it has too much counts now if its time
        is over; what it gives back does not."""

    def state(self) -> tuple[int, int]:
        """(what remains, ms until the count is as new)."""


class FixedWindow:
    """So many in each window; windows begin at multiples of their length since 1970."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.now, self.place, self.count = bucket, 0, 0, 0

    def roll(self, now: int) -> None:
        self.now, place = now, now // self.bucket.window
        if place != self.place:
            self.place, self.count = place, 0

    def _left(self) -> int:
        return (self.place + 1) * self.bucket.window - self.now

    def check(self, cost: int) -> tuple[int, int]:
        return 0, 0 if self.count + cost <= self.bucket.limit else self._left()

    def add(self, id_: str, cost: int) -> None:
        self.count += cost

    def adjust(self, id_: str, delta: int, decided: int) -> None:
        if delta > 0 or decided // self.bucket.window == self.place:
            self.count += delta

    def state(self) -> tuple[int, int]:
        return max(0, self.bucket.limit - self.count), self._left() if self.count else 0


class SlidingLog:
    """So many in every span as long as the window: each call is remembered for that long."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.now, self.sum = bucket, 0, 0
        self.log: OrderedDict[str, tuple[int, int]] = OrderedDict()  # id to (when, amount), oldest first

    def roll(self, now: int) -> None:
        self.now = now
        while self.log and next(iter(self.log.values()))[0] <= now - self.bucket.window:
            self.sum -= self.log.popitem(last=False)[1][1]

    def check(self, cost: int) -> tuple[int, int]:
        need = self.sum + cost - self.bucket.limit
        if need <= 0:
            return 0, 0
        for when, amount in self.log.values():
            need -= amount
            if need <= 0:
                return 0, when + self.bucket.window - self.now
        raise AssertionError("a call that never fits is refused before")

    def add(self, id_: str, cost: int) -> None:
        if cost:
            self.log[id_] = (self.now, cost)
            self.sum += cost

    def adjust(self, id_: str, delta: int, decided: int) -> None:
        when, amount = self.log.get(id_, (self.now, 0))
        if id_ in self.log or delta > 0:
            self.sum += delta
            self.log[id_] = (when, amount + delta)
            if amount + delta == 0:
                del self.log[id_]

    def state(self) -> tuple[int, int]:
        last = next(reversed(self.log.values()))[0] + self.bucket.window - self.now if self.log else 0
        return max(0, self.bucket.limit - self.sum), last


class SlidingCounter:
    """Two windows: of the last one counts the share that a span ending now still covers."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.now, self.place, self.before, self.count = bucket, 0, 0, 0, 0

    def roll(self, now: int) -> None:
        self.now, place = now, now // self.bucket.window
        if place != self.place:
            self.before = self.count if place == self.place + 1 else 0
            self.place, self.count = place, 0

    def _left(self) -> int:
        return (self.place + 1) * self.bucket.window - self.now

    def check(self, cost: int) -> tuple[int, int]:
        limit, window, left = self.bucket.limit, self.bucket.window, self._left()
        room = limit - self.count - cost
        if self.before * left <= room * window:
            return 0, 0
        if room >= 0:
            return 0, left - room * window // self.before
        return 0, left + window - (limit - cost) * window // self.count

    def add(self, id_: str, cost: int) -> None:
        self.count += cost

    def adjust(self, id_: str, delta: int, decided: int) -> None:
        behind = self.place - decided // self.bucket.window
        if delta > 0 or behind == 0:
            self.count += delta
        elif behind == 1:
            self.before += delta

    def state(self) -> tuple[int, int]:
        window, left = self.bucket.window, self._left()
        used = self.before * left + self.count * window
        reset = left + window if self.count else left if self.before else 0
        return max(0, self.bucket.limit * window - used) // window, reset


class TokenBucket:
    """A bucket that fills at a constant rate; what a call takes must be in it."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.now, self.level = bucket, 0, bucket.capacity

    def roll(self, now: int) -> None:
        full = -((self.level - self.bucket.capacity) // self.bucket.up)
        self.level = self.bucket.capacity if now - self.now >= full else self.level + (now - self.now) * self.bucket.up
        self.now = now

    def check(self, cost: int) -> tuple[int, int]:
        return 0, max(0, -((self.level - cost * self.bucket.per) // self.bucket.up))

    def add(self, id_: str, cost: int) -> None:
        self.level -= cost * self.bucket.per

    def adjust(self, id_: str, delta: int, decided: int) -> None:
        self.level = min(self.bucket.capacity, self.level - delta * self.bucket.per)

    def state(self) -> tuple[int, int]:
        full = -((self.level - self.bucket.capacity) // self.bucket.up)
        return max(0, self.level) // self.bucket.per, full


class LeakyBucket:
    """A queue that leaves at a constant rate: a call waits until what came before it has left."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.now, self.water = bucket, 0, 0

    def roll(self, now: int) -> None:
        self.water = max(0, self.water - (now - self.now) * self.bucket.up)
        self.now = now

    def check(self, cost: int) -> tuple[int, int]:
        over = self.water + cost * self.bucket.per - self.bucket.capacity
        return -(-self.water // self.bucket.up), max(0, -(-over // self.bucket.up))

    def add(self, id_: str, cost: int) -> None:
        self.water += cost * self.bucket.per

    def adjust(self, id_: str, delta: int, decided: int) -> None:
        self.water = max(0, self.water + delta * self.bucket.per)

    def state(self) -> tuple[int, int]:
        return max(0, self.bucket.capacity - self.water) // self.bucket.per, -(-self.water // self.bucket.up)


class Concurrency:
    """Calls at once; what counts are the leases."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self.running = bucket, 0

    def roll(self, now: int) -> None:
        """Time alone changes nothing."""

    def check(self, cost: int) -> tuple[int, int]:
        return 0, 0 if self.running + cost <= self.bucket.limit else 1000  # when one ends nobody knows

    def add(self, id_: str, cost: int) -> None:
        self.running += cost

    def adjust(self, id_: str, delta: int, decided: int) -> None:
        self.running = max(0, self.running + delta)

    def state(self) -> tuple[int, int]:
        return max(0, self.bucket.limit - self.running), 0


KINDS: dict[int, Callable[[Bucket], Count]] = {
    1: FixedWindow, 2: SlidingLog, 3: SlidingCounter, 4: TokenBucket, 5: LeakyBucket, 6: Concurrency,
}  # fmt: skip


def wall_clock() -> Callable[[], int]:
    """Milliseconds since 1970 that never go back, whatever happens to the machine's clock."""
    begun = time.time() - time.monotonic()
    return lambda: int((begun + time.monotonic()) * 1000)


class MemoryLimits:
    """Counts in this process. Their calls end with it, so nothing is leased."""

    def __init__(self, clock: Callable[[], int] | None = None) -> None:
        self.clock = clock or wall_clock()
        self.counts: dict[str, Count] = {}
        self.decided = 0

    def _count(self, ask: Ask, now: int) -> Count:
        count = self.counts.get(ask.key)
        if count is None:
            count = self.counts[ask.key] = KINDS[ask.bucket.code](ask.bucket)
        count.bucket = ask.bucket  # a reload may have given the rule another limit
        count.roll(now)
        return count

    def take(self, id_: str, asks: Sequence[Ask]) -> Decision:
        """Let a call through everywhere, or nowhere."""
        now = self.clock()
        self._sweep(now)
        counts = [self._count(ask, now) for ask in asks]
        delay, longest, refused = 0, 0, None
        for place, (ask, count) in enumerate(zip(asks, counts, strict=True)):
            if ask.cost > ask.bucket.most:
                longest, refused = NEVER, place
                break
            wait, retry = count.check(ask.cost)
            delay = max(delay, wait)
            if retry > longest:
                longest, refused = retry, place
        if refused is None:
            for ask, count in zip(asks, counts, strict=True):
                count.add(id_, ask.cost)
        states = tuple(count.state() for count in counts)
        return Decision(refused is None, now, delay if refused is None else longest, refused, states)

    def settle(self, id_: str, decided: int, asks: Sequence[tuple[Ask, int]]) -> None:
        """A call has ended: for each ask what it used in place of its cost."""
        now = self.clock()
        for ask, used in asks:
            self._count(ask, now).adjust(id_, used - ask.cost, decided)

    def _sweep(self, now: int) -> None:
        """Forget counts that are as new."""
        self.decided += 1
        if self.decided % SWEEP:
            return
        for key, count in list(self.counts.items()):
            count.roll(now)
            if count.state()[1] == 0 and not getattr(count, "running", 0):
                del self.counts[key]
