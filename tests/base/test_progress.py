"""Progress: the same work shown as bars, lines or JSON, or not at all."""

import io
import json
import math

import pytest

from soma.base import progress
from soma.base.progress import JsonReporter, PlainReporter, Reporter, Task, TerminalReporter, compact, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves: `clock[0] += 1`."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rate_and_remaining_time(clock: list[float]) -> None:
    task = Task(Reporter(), "train", 100, "steps")
    assert task.remaining is None
    task.skip(40)
    clock[0] += 10
    task.advance(20)
    assert (task.done, task.rate, task.remaining) == (60, 2.0, 20.0)


def test_plain_lines_are_few(clock: list[float]) -> None:
    stream = io.StringIO()
    with PlainReporter(stream).task("train", 100, "steps") as task:
        for _ in range(100):
            clock[0] += 0.25
            task.advance(1, loss=3.14159)
    lines = stream.getvalue().splitlines()
    assert lines == [
        "  train 40/100 steps, 4 steps/s, 15s left, loss 3.142",
        "  train 80/100 steps, 4 steps/s, 5.0s left, loss 3.142",
        "  train 100/100 steps, 4 steps/s, in 25s, loss 3.142",
    ]


def test_json_is_one_object_a_line(clock: list[float]) -> None:
    stream = io.StringIO()
    reporter = JsonReporter(stream)
    reporter.note("hello")
    with reporter.task("train", 4, "steps") as task:
        for _ in range(4):
            clock[0] += 0.6
            task.advance(loss=1.5)
    reporter.event("stage_end", seconds=2.4)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["note", "progress", "progress", "task_end", "stage_end"]
    assert events[0]["text"] == "hello"
    assert (events[3]["done"], events[3]["total"], events[3]["loss"]) == (4, 4, 1.5)


def test_a_failed_task_ends_too() -> None:
    stream = io.StringIO()
    reporter = PlainReporter(stream)
    with pytest.raises(TypeError), reporter.task("train", 10) as task:
        task.advance("three")  # type: ignore[arg-type]
    assert "train 0/10" in stream.getvalue()
    assert reporter.last == {}


def test_terminal_bars_nest_and_close() -> None:
    from rich.console import Console

    reporter = TerminalReporter()
    stream = io.StringIO()
    reporter.console = Console(file=stream, force_terminal=True, width=200)
    with reporter.task("outer", 2) as outer:
        with reporter.task("inner [red]", 2, "B") as inner:
            inner.advance(2)
        outer.advance(2)
        assert reporter.live is not None
    assert reporter.live is None
    assert "inner [red] 2/2 B" in stream.getvalue()


def test_one_reporter_is_current() -> None:
    before = progress.current()
    reporter = PlainReporter(io.StringIO())
    with progress.use(reporter):
        assert progress.current() is reporter
    assert progress.current() is before
    with pytest.raises(ZeroDivisionError), progress.use(reporter):
        1 / 0  # noqa: B018
    assert progress.current() is before


def test_a_library_user_sees_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Reporter().task("quiet", 1) as task:
        task.advance()
    Reporter().note("quiet")
    Reporter().event("quiet")
    assert capfd.readouterr() == ("", "")


def test_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(progress.choose(as_json=True)) is JsonReporter
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    assert type(progress.choose()) is PlainReporter


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (12345, "12.3k"), (1234, "1234"), (2.5e6, "2.5M"), (3e9, "3G"), (0.12345, "0.1235")]
)
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


def test_compact_takes_what_a_diverged_loss_is() -> None:
    assert compact(math.nan) == "nan"
    assert compact(math.inf) == "inf"
    assert compact(-math.inf) == "-inf"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0s"), (9.94, "9.9s"), (59.4, "59s"), (59.6, "1m00s"), (90, "1m30s"), (7500, "2h05m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
