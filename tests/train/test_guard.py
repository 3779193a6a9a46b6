"""The guards: divergence, and the time that a run may take."""

import math
import random
from collections.abc import Callable

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
    assert clock(100, 1.0, 10).decide(10, 1000, 1000, 0) == 97


def test_fast_enough_is_left_alone() -> None:
    assert clock(100, 1.0, 10).decide(10, 100, 100, 0) is None
    assert clock(100, 1.0, 30).decide(30, 60, 60, 0) is None  # ends early, and nothing was cut


def test_closing_work_counts() -> None:
    assert clock(100, 1.0, 30).decide(30, 100, 100, 5) == 92


def test_a_small_overrun_waits_for_a_quarter_of_the_budget() -> None:
    assert clock(100, 1.0, 24).decide(24, 150, 150, 0) is None
    assert clock(100, 1.0, 25).decide(25, 150, 150, 0) == 97


def test_the_next_decision_waits_for_its_mark() -> None:
    guard = clock(100, 1.0, 25)
    assert guard.decide(25, 150, 150, 0) == 97  # the next mark: 25 + 0.15 · 75 = 36.25 s
    for done in range(26, 37):
        guard.record(1.0)
        assert guard.decide(done, 120, 150, 0) is None
    guard.record(1.0)
    assert guard.decide(37, 120, 150, 0) == 97


def test_what_was_cut_grows_again_but_not_beyond_the_plan() -> None:
    assert clock(100, 0.5, 80).decide(80, 97, 1000, 0) == 194  # 80 + (97 - 40) / 0.5
    assert clock(100, 0.5, 80).decide(80, 97, 150, 0) == 150
    assert clock(100, 0.5, 80).decide(80, 190, 1000, 0) is None  # 95 s: near enough


def test_compiling_does_not_count_as_speed() -> None:
    guard = TimeGuard(100)
    guard.record(30.0)
    for _ in range(9):
        guard.record(0.5)
    # 34.5 s are gone, 0.97 · 100 - 34.5 = 62.5 s are left at 0.5 s a step: 125 steps more
    assert guard.decide(10, 1000, 1000, 0) == 135


def test_evaluations_between_the_steps_count() -> None:
    guard = TimeGuard(100)
    for step in range(42):
        guard.record(0.5, 5.0 if step in (11, 31) else 0.0)
    # 31 s are gone; a step costs 0.5 + 10 / 40 = 0.75: (97 - 31) / 0.75 = 88 steps more
    assert guard.decide(42, 200, 200, 0) == 130


def test_it_waits_for_a_measurement() -> None:
    assert clock(100, 1.0, 6).decide(6, 1000, 1000, 0) is None
    assert clock(100, 1.0, 7).decide(7, 1000, 1000, 0) is not None
    assert clock(10, 2.0, 3).decide(3, 1000, 1000, 0) == 4  # six of ten seconds are gone: one step must do


def test_time_is_up() -> None:
    assert clock(5, 1.0, 6).decide(6, 1000, 1000, 0) == 6


def test_one_slow_start_does_not_decide() -> None:
    """The case of the quickstart: 640 steps at 0.3 s under 220 s, whose first steps take 1.5 times as long."""
    _, done, totals = simulate(220, 640, lambda spent: 0.45 if spent < 15 else 0.3)
    assert done == 640
    assert totals == []


def simulate(
    budget: float, planned: int, seconds: Callable[[float], float], evaluation: float = 0.0
) -> tuple[float, int, list[int]]:
    """A run under the guard: time it took, steps it did, and the totals it decided on."""
    guard, total, done = TimeGuard(budget), planned, 0
    totals: list[int] = []
    while done < total:
        guard.record(seconds(guard.spent), evaluation if done % 50 == 49 else 0.0)
        done += 1
        decided = guard.decide(done, total, planned, 0)
        if decided is not None:
            total = decided
            totals.append(total)
    return guard.spent, done, totals


@pytest.mark.parametrize("seed", range(200))
def test_noise_that_settles(seed: int) -> None:
    """Times drawn from a noisy start, up to four times too long or too short in stretches, that settles by half."""
    draw = random.Random(seed)
    steps, budget = draw.randint(80, 2000), draw.uniform(5, 500)
    base = budget / steps
    settles = draw.uniform(0, 0.5) * budget
    stretches = [draw.choice((0.4, 1.0, 2.0, 4.0)) for _ in range(8)]
    longest = 0.0

    def seconds(spent: float) -> float:
        nonlocal longest
        factor = draw.uniform(0.9, 1.1)
        if spent < settles:
            factor *= stretches[int(8 * spent / settles)] * draw.choice((0.7, 1.0, 3.0))
        elif draw.random() < 0.02:
            factor *= 5  # a stall now and then
        longest = max(longest, factor * base)
        return factor * base

    planned = draw.randint(steps, 5 * steps)
    spent, done, totals = simulate(budget, planned, seconds, evaluation=draw.choice((0.0, 2 * base)))
    assert spent <= budget + longest + 2 * base
    assert all(total <= planned for total in totals)
    assert done == planned or spent >= 0.9 * budget
    assert len(totals) < 40
