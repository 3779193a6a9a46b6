"""The time of passes whose tokens travel, alone and in turns, and what a schedule makes of it."""

import random
from dataclasses import replace

import pytest

from soma.train.parallel.pipeline.chunks import Chunk, chunk_costs, length
from soma.train.parallel.pipeline.schedule import Action, Overlap
from soma.train.parallel.pipeline.schedules import SCHEDULES
from soma.train.parallel.pipeline.simulate import simulate


def test_worked_numbers() -> None:
    """Those of the docstring and of docs/schedules.md."""
    short, long = Chunk([2, 2], [1]), Chunk([2, 2], [3])
    assert (length(short), length(short, short)) == (5, 8)
    assert (length(long), length(long, long)) == (7, 10)
    forward, backward = Chunk([2, 3, 2], [1, 1]), Chunk([2, 3, 2], [1, 1], [2, 3, 2])
    assert (length(forward), length(backward), length(forward, backward)) == (9, 14, 21)
    assert length(backward.first_part) == 9


def test_a_pair_lies_between_its_bounds() -> None:
    """Not shorter than its computation or its exchanges, not longer than one pass after the other; on draws."""
    rng = random.Random(1)

    def draw(layers: int, weights: bool) -> Chunk:
        def times(count: int) -> list[float]:
            return [rng.expovariate(1) for _ in range(count)]

        return Chunk(times(2 * layers + 1), times(2 * layers), times(2 * layers + 1) if weights else ())

    for _ in range(200):
        forward, backward = draw(rng.randint(0, 3), False), draw(rng.randint(0, 3), True)
        pair = length(forward, backward)
        assert pair <= length(forward) + length(backward) + 1e-9
        assert pair >= forward.work + backward.work - 1e-9
        assert pair >= sum(forward.exchange) + sum(backward.exchange)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipe-v"])
def test_a_step_is_as_short_as_its_pairs(name: str) -> None:
    """Exchanges that are hidden cost a step of DualPipe only where nothing runs beside them."""
    schedule = SCHEDULES[name](4, 40)

    def step(exchange: float, together: bool) -> float:
        forward = Chunk([2, 3, 0], [exchange] * 2)
        backward = Chunk([0, 3, 2], [exchange] * 2, [0, 3, 2])
        costs = chunk_costs([forward] * schedule.stages, [backward] * schedule.stages)
        whole, halves = costs.of(Action("BW", 1, 0)), costs.of(Action("B", 1, 0)) + costs.of(Action("W", 1, 0))
        assert whole == length(backward) <= halves
        pair = Overlap(Action("F", 0, 1), Action("BW", 1, 0))
        assert costs.of(pair) == length(forward, backward)
        return simulate(schedule, costs if together else replace(costs, overlapped=None)).length

    free = step(0.0, True)
    assert free == pytest.approx(step(0.0, False))
    hidden, open_ = step(1.0, True) - free, step(1.0, False) - free
    assert 0 < hidden < 0.5 * open_
