"""Adaptive batching: single calls gathered into batches for a function that is cheaper per item in a batch.

    @soma.batched(max_batch=32, max_delay_ms=5)
    def classify(texts: list[str]) -> list[str]: ...

    label = await classify("one text")

While a batch runs, the next one gathers by itself. Only an idle function poses a question: run what is there, or wait
for one more? Say a batch of n items takes a + b·n seconds and the next item comes in g seconds. If it is waited for,
the n items here end g + b later, and the newcomer a - g earlier (it would have waited for this batch, and paid `a`
again). So waiting pays while a - g > n·(g + b). The three numbers are learned as calls come: g from the arrivals, a and
b by a least squares fit to the latencies of batches, in which old ones fade.
"""

import asyncio
import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload
from weakref import WeakKeyDictionary

T = TypeVar("T")
R = TypeVar("R")

FADING = 0.95  # weight of a batch after the next one
ARRIVAL_FADING = 0.8


class LatencyModel:
    """Seconds of a batch of n items as a + b·n, from batches seen. Nothing seen: no cost at all."""

    def __init__(self) -> None:
        self.w = self.n = self.s = self.nn = self.ns = 0.0

    def observe(self, size: int, seconds: float) -> None:
        """A batch of `size` items took so long."""
        for name, value in (("w", 1.0), ("n", size), ("s", seconds), ("nn", size * size), ("ns", size * seconds)):
            setattr(self, name, getattr(self, name) * FADING + value)

    @property
    def line(self) -> tuple[float, float]:
        """a and b, neither below 0. While all batches had one size, each is taken to be half of the cost."""
        if self.w == 0:
            return 0.0, 0.0
        mean_n, mean_s = self.n / self.w, self.s / self.w
        variance = self.nn / self.w - mean_n**2
        if variance < 1e-6 * mean_n**2:
            return mean_s / 2, mean_s / 2 / mean_n
        b = min(max((self.ns / self.w - mean_n * mean_s) / variance, 0.0), mean_s / mean_n)
        return mean_s - b * mean_n, b

    def __call__(self, size: int) -> float:
        """Seconds that a batch of `size` items should take."""
        a, b = self.line
        return a + b * size


@dataclass(eq=False)
class Item:
    """A call that waits for its batch."""

    value: Any
    size: int
    key: Hashable
    arrived: float
    future: "asyncio.Future[Any]"


class Batcher(Generic[T, R]):
    """Gathers calls into batches for `run`, in one event loop.

    max_batch: items of a batch at most. max_delay: seconds that a call is held for company at most. target: seconds
    from a call to its result to be aimed for; batches are then no larger, and wait no longer, than that allows. `pad`
    says that `run` pads batches to powers of two, which the predictions then count with. `concurrency`: batches at
    once. Where `run` raises for a batch of several, each of its items is run alone, so that one item's fault is not
    the others'.
    """

    def __init__(
        self, run: Callable[[list[T]], Awaitable[Sequence[R]]], *, max_batch: int = 32, max_delay: float = 0.005,
        target: float | None = None, pad: bool = False, concurrency: int = 1,
    ) -> None:  # fmt: skip
        for name, given in (("max_batch", max_batch), ("concurrency", concurrency)):
            if given < 1:
                raise ValueError(f"{name} is {given}; expected 1 or more")
        if max_delay < 0 or (target is not None and target <= 0):
            raise ValueError(f"max_delay is {max_delay}, target {target}; expected no less than 0, and more than 0")
        self.run, self.max_batch, self.max_delay, self.target, self.pad = run, max_batch, max_delay, target, pad
        self.latency = LatencyModel()
        self.gap = math.inf  # seconds between arrivals
        self.last = -math.inf
        self.queue: list[Item] = []
        self.news = asyncio.Event()
        self.places = asyncio.Semaphore(concurrency)
        self.worker: asyncio.Task[None] | None = None
        self.running: set[asyncio.Task[None]] = set()
        self.batches = 0  # that have run

    async def submit(self, value: T, size: int = 1, key: Hashable = None) -> R:
        """The result for `value`, which counts as `size` items. Only calls with equal keys share a batch."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        since, self.last = now - self.last, now
        self.gap = since if math.isinf(self.gap) else ARRIVAL_FADING * self.gap + (1 - ARRIVAL_FADING) * since
        item = Item(value, size, key, now, loop.create_future())
        self.queue.append(item)
        self.news.set()
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        result: R = await item.future
        return result

    async def _work(self) -> None:
        """Batches until nothing waits."""
        while self.queue:
            await self.places.acquire()
            await self._gather()
            batch = self._take()
            if not batch:
                self.places.release()
                continue
            task = asyncio.create_task(self._run(batch))
            self.running.add(task)
            task.add_done_callback(self.running.discard)

    async def _gather(self) -> None:
        """Wait as long as more company pays."""
        now = asyncio.get_running_loop().time
        while (patience := self.patience(now())) > 0:
            self.news.clear()
            try:
                await asyncio.wait_for(self.news.wait(), patience)
            except TimeoutError:
                return

    def patience(self, now: float) -> float:
        """Seconds that it pays to wait for the next call; 0 or less: run what is there."""
        self.queue = [item for item in self.queue if not item.future.done()]
        if not self.queue:
            return 0.0
        head = self.queue[0]
        size = sum(item.size for item in self.queue if item.key == head.key)
        if size >= self.limit(head, now):
            return 0.0
        a, b = self.latency.line
        worth = (a - size * b) / (size + 1)  # the longest gap that waiting pays for
        if self.gap >= worth:
            return 0.0
        until = min(head.arrived + self.max_delay, self.last + worth)
        if self.target is not None:
            until = min(until, head.arrived + self.target - self.latency(self.padded(size + 1)))
        return until - now

    def limit(self, head: Item, now: float) -> int:
        """Items of the next batch at most, at least 1."""
        if self.target is None or self.batches == 0:
            return self.max_batch
        left = head.arrived + self.target - now
        size = self.max_batch
        while size > 1 and self.latency(self.padded(size)) > left:
            size = size // 2 if self.pad else size - 1
        return size

    def padded(self, size: int) -> int:
        """What a batch of that size is padded to."""
        return power_of_two(size, self.max_batch) if self.pad else size

    def _take(self) -> list[Item]:
        """The oldest call and those after it that fit with it; they leave the queue."""
        self.queue = [item for item in self.queue if not item.future.done()]
        if not self.queue:
            return []
        head = self.queue[0]
        left = self.limit(head, asyncio.get_running_loop().time())
        batch: list[Item] = []
        for item in self.queue:
            if item.key == head.key and (item.size <= left or not batch):
                batch.append(item)
                left -= item.size
        taken = set(batch)
        self.queue = [item for item in self.queue if item not in taken]
        return batch

    async def _run(self, batch: list[Item]) -> None:
        """Run a batch and hand out its results; stopped when nobody waits for it any more."""
        task = asyncio.ensure_future(self._results(batch))

        def one_ended(_: Any) -> None:
            if all(item.future.cancelled() for item in batch):
                task.cancel()

        for item in batch:
            item.future.add_done_callback(one_ended)
        try:
            results = await task
        except asyncio.CancelledError:
            results = []
            for item in batch:
                item.future.cancel()
        finally:
            self.places.release()
        for item, result in zip(batch, results, strict=False):
            if item.future.done():
                continue
            if isinstance(result, Exception):
                item.future.set_exception(result)
            else:
                item.future.set_result(result)

    async def _results(self, batch: list[Item]) -> list[Any]:
        """A result or an exception for each."""
        now = asyncio.get_running_loop().time
        started = now()
        try:
            results = list(await self.run([item.value for item in batch]))
            if len(results) != len(batch):
                raise TypeError(f"the batched function gave {len(results)} results for {len(batch)} items")
        except Exception as error:  # noqa: BLE001  (it goes to those who asked)
            if len(batch) == 1:
                return [error]
            return [(await self._results([item]))[0] for item in batch]
        size = sum(item.size for item in batch)
        self.latency.observe(self.padded(size), now() - started)
        self.batches += 1
        return results


def power_of_two(size: int, most: int) -> int:
    """The next power of two, but not above `most` unless the size itself is: `power_of_two(5, 32)` is 8."""
    return max(size, min(1 << (size - 1).bit_length(), most))


class Batched(Generic[T, R]):
    """A function over lists that is called with one item at a time: see `batched`."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function, self.options = function, options
        self.batchers: WeakKeyDictionary[asyncio.AbstractEventLoop, Batcher[T, R]] = WeakKeyDictionary()
        functools.update_wrapper(self, function)

    async def __call__(self, item: T) -> R:
        loop = asyncio.get_running_loop()
        if (batcher := self.batchers.get(loop)) is None:
            batcher = self.batchers[loop] = Batcher(self._run, **self.options)
        return await batcher.submit(item)

    async def _run(self, items: list[T]) -> Sequence[R]:
        count = len(items)
        if self.options["pad"]:
            items = items + items[-1:] * (power_of_two(count, self.options["max_batch"]) - count)
        if inspect.iscoroutinefunction(self.function):
            results: Sequence[R] = await self.function(items)
        else:
            results = await asyncio.to_thread(self.function, items)
        return results[:count] if len(results) == len(items) else results

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> "Batched[T, R]":
        """As a method: each object batches its own calls."""
        if instance is None:
            return self
        bound: Batched[T, R] = Batched(self.function.__get__(instance), self.options)
        instance.__dict__[self.name] = bound
        return bound


@overload
def batched(function: Callable[..., Sequence[R] | Awaitable[Sequence[R]]]) -> Batched[Any, R]: ...


@overload
def batched(
    *, max_batch: int = 32, max_delay_ms: float = 5.0, latency_target_ms: float | None = None, pad: bool = False,
    concurrency: int = 1,
) -> Callable[[Callable[..., Sequence[R] | Awaitable[Sequence[R]]]], Batched[Any, R]]: ...  # fmt: skip


def batched(
    function: Callable[..., Any] | None = None, *, max_batch: int = 32, max_delay_ms: float = 5.0,
    latency_target_ms: float | None = None, pad: bool = False, concurrency: int = 1,
) -> Any:  # fmt: skip
    """Makes of a function from a list to a list of the same length one that is awaited with a single item.

    The function, plain (run in a thread) or async, sees lists of up to `max_batch` items; a call is held for company
    for `max_delay_ms` at most, and only where that pays. `latency_target_ms`: aim for results within this time.
    `pad`: fill batches up to a power of two with copies of the last item, for functions that compile or capture a graph
    for every size. `concurrency`: batches at once. A call that is cancelled leaves its batch mates alone. If the
    function raises, its items are run one by one, so it must bear being run again; each caller gets the exception of
    its own item. A result that is an Exception is raised to its caller. Works on methods. Raises ValueError for
    impossible settings.
    """
    target = None if latency_target_ms is None else latency_target_ms / 1000
    options: dict[str, Any] = {
        "max_batch": max_batch, "max_delay": max_delay_ms / 1000, "target": target, "pad": pad,
        "concurrency": concurrency,
    }  # fmt: skip
    Batcher(Batched(len, options)._run, **options)  # wrong settings are named where they are written

    def decorate(function: Callable[..., Any]) -> Batched[Any, Any]:
        return Batched(function, options)

    return decorate if function is None else decorate(function)
