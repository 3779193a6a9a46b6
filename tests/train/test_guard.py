"""The guards: divergence, and the time that a run may take."""

import math

import pytest

from soma.train.guard import DivergenceGuard, TimeGuard


def test_not_finite() -> None:
    guard = DivergenceGuard(2.0, 10)
    assert guard.check(3.0) is None
    assert "nan" in (guard.check(math.nan) or "")
    assert "inf" in (guard.check(math.inf) or "")


def test_divergence_needs_several_steps_on_end() -> None:
    guard = DivergenceGuard(2.0, 3)
    for _ in range(40):
        assert guard.check(2.0) is None
    assert guard.best == pytest.approx(2.0)
    assert guard.check(4.1) is None
    assert guard.check(4.1) is None
    assert guard.check(1.9) is None  # the streak is over
    assert [guard.check(4.5) for _ in range(2)] == [None, None]
    reason = guard.check(4.5)
    assert reason
    assert "2 × the best running mean" in reason


def test_a_falling_loss_never_diverges() -> None:
    guard = DivergenceGuard(2.0, 1)
    for step in range(300):
        assert guard.check(10 * math.exp(-step / 50) + 0.1) is None


def test_small_losses_are_noise() -> None:
    guard = DivergenceGuard(2.0, 1)
    for _ in range(100):
        assert guard.check(0.01) is None
    assert guard.check(1.3) is None
    assert guard.check(1.5) is not None


def test_divergence_state_returns() -> None:
    one, other = DivergenceGuard(2.0, 3), DivergenceGuard(2.0, 3)
    for loss in [2.0] * 30 + [5.0] * 2:
        one.check(loss)
    other.restore(one.state())
    assert one.check(5.0) == other.check(5.0)
    assert one == other


def clock(max_seconds: float, seconds: float, steps: int) -> TimeGuard:
    guard = TimeGuard(max_seconds)
    for _ in range(steps):
        guard.record(seconds)
    return guard


def test_worked_number() -> None:
    assert clock(100, 1.0, 10).decide(10, 1000, 0) == 97


def test_fast_enough_is_left_alone() -> None:
    assert clock(100, 1.0, 10).decide(10, 100, 0) is None


def test_closing_work_counts() -> None:
    assert clock(100, 1.0, 10).decide(10, 100, 5) == 92


def test_compiling_does_not_count_as_speed() -> None:
    guard = TimeGuard(100)
    guard.record(30.0)
    for _ in range(9):
        guard.record(0.5)
    # 34.5 s are gone, 0.97 · 100 - 34.5 = 62.5 s are left at 0.5 s a step: 125 steps more
    assert guard.decide(10, 1000, 0) == 135


def test_it_waits_for_a_measurement() -> None:
    assert clock(100, 1.0, 6).decide(6, 1000, 0) is None
    assert clock(100, 1.0, 7).decide(7, 1000, 0) is not None


def test_time_is_up() -> None:
    assert clock(5, 1.0, 6).decide(6, 1000, 0) == 6


def test_totals_only_fall() -> None:
    guard, total = TimeGuard(100), 1000
    for step in range(1, 1000):
        guard.record(1.0 + 0.3 * math.sin(step))
        shorter = guard.decide(step, total, 0)
        assert shorter is None or shorter < total
        total = shorter if shorter is not None else total
        if step >= total:
            break
    assert 85 <= total <= 100
    assert guard.spent <= 100
