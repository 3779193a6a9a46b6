"""Progress for people and machines: bars on a terminal, plain lines elsewhere, JSON events with `--json`.

One reporter is current at a time (`use`); code that does work asks for `current()` and never prints by itself.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

PLAIN_INTERVAL = 10.0  # seconds between the lines of one task where there is no terminal


class Task:
    """One piece of work with a known or unknown length. Advance it; the reporter draws it."""

    def __init__(self, reporter: "Reporter", name: str, total: float | None, unit: str) -> None:
        self.reporter, self.name, self.total, self.unit = reporter, name, total, unit
        self.done = 0.0
        self.started = time.monotonic()
        self.start_offset = 0.0
        self.fields: dict[str, Any] = {}

    def skip(self, amount: float) -> None:
        """Count work that an earlier, killed run has done: it moves the bar but not the rate."""
        self.done += amount
        self.start_offset += amount
        self.reporter.draw(self)

    def advance(self, amount: float = 1, **fields: Any) -> None:
        """Count `amount` more units as done; `fields` (loss=…) are shown beside the bar."""
        self.done += amount
        self.fields.update(fields)
        self.reporter.draw(self)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """Units per second since the start of this process's share of the task."""
        return (self.done - self.start_offset) / max(self.seconds, 1e-9)

    @property
    def remaining(self) -> float | None:
        """Seconds left at the present rate, None while unknown."""
        if self.total is None or self.rate <= 0:
            return None
        return max(0.0, (self.total - self.done) / self.rate)


class Reporter:
    """Base reporter: draws nothing. Also what a library user gets."""

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        task = Task(self, name, total, unit)
        self.begin(task)
        try:
            yield task
        finally:
            self.end(task)

    def note(self, text: str) -> None:
        """One line for the person who watches."""

    def event(self, kind: str, **fields: Any) -> None:
        """One machine-readable event; only the JSON reporter shows it."""

    def begin(self, task: Task) -> None:
        """A task starts."""

    def draw(self, task: Task) -> None:
        """A task moved."""

    def end(self, task: Task) -> None:
        """A task is over, also when it failed."""


class PlainReporter(Reporter):
    """Lines of text, at most one per task every `PLAIN_INTERVAL` seconds. For logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.last: dict[int, float] = {}

    def note(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def begin(self, task: Task) -> None:
        self.last[id(task)] = task.started

    def draw(self, task: Task) -> None:
        now = time.monotonic()
        if now - self.last[id(task)] >= PLAIN_INTERVAL:
            self.last[id(task)] = now
            self.note("  " + describe(task))

    def end(self, task: Task) -> None:
        del self.last[id(task)]
        self.note("  " + describe(task, final=True))


class JsonReporter(Reporter):
    """One JSON object a line on standard output: notes, events, and task positions at most once a second."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.last: dict[int, float] = {}

    def event(self, kind: str, **fields: Any) -> None:
        record = {"event": kind, "time": round(time.time(), 3), **fields}
        print(json.dumps(record, default=str), file=self.stream, flush=True)

    def note(self, text: str) -> None:
        self.event("note", text=text)

    def begin(self, task: Task) -> None:
        self.last[id(task)] = 0.0

    def draw(self, task: Task) -> None:
        now = time.monotonic()
        if now - self.last[id(task)] >= 1.0:
            self.last[id(task)] = now
            self._position(task, "progress")

    def end(self, task: Task) -> None:
        del self.last[id(task)]
        self._position(task, "task_end")

    def _position(self, task: Task, kind: str) -> None:
        self.event(
            kind,
            task=task.name,
            done=task.done,
            total=task.total,
            unit=task.unit,
            rate=round(task.rate, 3),
            remaining_seconds=task.remaining,
            **task.fields,
        )


class TerminalReporter(Reporter):
    """Bars with rate and remaining time, drawn by rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.live: Any = None
        self.bars: dict[int, Any] = {}

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, task: Task) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        if self.live is None:
            self.live = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}", markup=False),
                console=self.console,
                transient=True,
                refresh_per_second=5,
            )
            self.live.start()
        self.bars[id(task)] = self.live.add_task(task.name, total=task.total)

    def draw(self, task: Task) -> None:
        self.live.update(self.bars[id(task)], completed=task.done, total=task.total, description=describe(task))

    def end(self, task: Task) -> None:
        self.live.remove_task(self.bars.pop(id(task)))
        self.note("  " + describe(task, final=True))
        if not self.bars:
            self.live.stop()
            self.live = None


def describe(task: Task, *, final: bool = False) -> str:
    """`train 120/400 steps, 3.1 steps/s, 1m30s left, loss 3.2` as one line."""
    total = f"/{compact(task.total)}" if task.total is not None else ""
    parts = [f"{task.name} {compact(task.done)}{total} {task.unit}".rstrip()]
    if task.rate > 0:
        parts.append(f"{compact(task.rate)} {task.unit}/s" if task.unit else f"{compact(task.rate)}/s")
    if final:
        parts.append(f"in {duration(task.seconds)}")
    elif task.remaining is not None:
        parts.append(f"{duration(task.remaining)} left")
    for key, value in task.fields.items():
        parts.append(f"{key} {compact(value) if isinstance(value, int | float) else value}")
    return ", ".join(parts)


def compact(value: float) -> str:
    """A number in at most four significant figures with k, M, G: 12345 → 12.3k. Not finite: inf, nan."""
    if not math.isfinite(value):
        return str(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (limit if suffix != 'k' else 1e3):.3g}{suffix}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45s, 1m30s, 2h05m."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


_current: Reporter = Reporter()


def current() -> Reporter:
    """The reporter in use."""
    return _current


@contextmanager
def use(reporter: Reporter) -> Iterator[Reporter]:
    """Make `reporter` the current one inside the `with`."""
    global _current
    before, _current = _current, reporter
    try:
        yield reporter
    finally:
        _current = before


def choose(*, as_json: bool = False) -> Reporter:
    """The reporter that fits: JSON if asked for, bars on a terminal, plain lines elsewhere."""
    if as_json:
        return JsonReporter()
    return TerminalReporter() if sys.stderr.isatty() else PlainReporter()
