"""The best schedule for measured times under a memory limit. Loads no torch.

Building blocks (arXiv:2405.15362): say at which tick one microbatch visits every stage of a V; send the next one the
same way a period later, for as long as there are microbatches. How long a microbatch's activations live then fixes the
memory, whatever their number. The order is what counts: the real times decide between the orders.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

from soma.train.parallel.pipeline.schedule import Action, Schedule, Step, vee
from soma.train.parallel.pipeline.schedules import SCHEDULES, make
from soma.train.parallel.pipeline.simulate import Costs, simulate

PERIOD = 6  # ticks: a rank of a V does two forwards, two backwards, two weight gradients for each microbatch
STEPS = (1, 2, 3, 4)  # ticks between neighbouring stages
TURNS = (1, 2, 3)  # ticks between the last stage's forward and backward, and where the V turns


def v_half_limit(ranks: int) -> float:
    """Activations of V-half: ceil(p/2) + 1. For 8 ranks 5."""
    return math.ceil(ranks / 2) + 1


def search(ranks: int, microbatches: int, limit: float, costs: Costs | None = None) -> Schedule:
    """The schedule of the shortest time line among the fixed ones that hold at most `limit` activations (in units of
    a rank's whole forward) and all building blocks that do.

    costs: times of a rank's whole forward, backward and weight gradient (one number each); a schedule with two stages a
    rank has half of each for a stage. Raises ValueError where nothing fits; the message names the least that does.
    """
    costs = costs or Costs()
    fitting: list[tuple[float, float, Schedule]] = []
    least = math.inf
    for schedule in itertools.chain(fixed(ranks, microbatches), blocks(ranks, microbatches, limit)):
        timeline = simulate(schedule, per_stage(costs, schedule))
        least = min(least, timeline.peak)
        if timeline.peak <= limit + 1e-9:
            fitting.append((timeline.length, timeline.peak, schedule))
    if not fitting:
        raise ValueError(f"no schedule of {ranks} ranks holds at most {limit:g} activations: the least is {least:g}")
    return min(fitting, key=lambda entry: entry[:2])[2]


def per_stage(costs: Costs, schedule: Schedule) -> Costs:
    """Times of a stage from those of a rank's whole share of the model."""
    parts = schedule.stages_per_rank

    def share(time: float | Sequence[float]) -> float:
        if not isinstance(time, int | float):
            raise ValueError("times of a rank are one number each: stages differ between schedules")
        return time / parts

    overlapped = None if costs.overlapped is None else costs.overlapped / parts
    return Costs(share(costs.forward), share(costs.backward), share(costs.weight), costs.transfer, overlapped)


def fixed(ranks: int, microbatches: int) -> Iterator[Schedule]:
    """The named schedules that exist for these sizes and keep one copy of the parameters."""
    for name, schedule in SCHEDULES.items():
        if name != "dualpipe":
            try:
                yield schedule(ranks, microbatches)
            except ValueError:
                continue


@functools.cache
def blocks(ranks: int, microbatches: int, limit: float) -> list[Schedule]:
    """Every repeated building block on a V whose activations stay within `limit`."""
    found: dict[tuple[tuple[Step, ...], ...], Schedule] = {}
    for down, up, back_down, back_up in itertools.product(STEPS, repeat=4):
        for turn, last, back_turn in itertools.product(TURNS, repeat=3):
            ticks = visit(ranks, (down, turn, up), (last, back_down, back_turn, back_up))
            if lifetime(ranks, ticks) > limit * 2 * PERIOD or clashes(ranks, ticks):
                continue
            schedule = repeat(ranks, microbatches, ticks)
            found.setdefault(schedule.steps, schedule)
    return list(found.values())


def visit(ranks: int, forward: tuple[int, int, int], backward: tuple[int, int, int, int]) -> dict[tuple[str, int], int]:
    """Ticks of the forward and backward on every stage: steps on the way down, at the turn, and up; then back."""
    ticks: dict[tuple[str, int], int] = {}
    tick = 0
    for stage in range(2 * ranks):
        if stage:
            tick += forward[1] if stage == ranks else forward[0] if stage < ranks else forward[2]
        ticks["F", stage] = tick
    tick += backward[0]
    for stage in reversed(range(2 * ranks)):
        if stage < 2 * ranks - 1:
            tick += backward[2] if stage == ranks - 1 else backward[1] if stage >= ranks else backward[3]
        ticks["B", stage] = tick
    return ticks


def lifetime(ranks: int, ticks: dict[tuple[str, int], int]) -> int:
    """Longest that the activations of one microbatch live on a rank, summed over its two stages, in ticks."""
    alive = [ticks["B", stage] - ticks["F", stage] for stage in range(2 * ranks)]
    return max(alive[rank] + alive[2 * ranks - 1 - rank] for rank in range(ranks))


def clashes(ranks: int, ticks: dict[tuple[str, int], int]) -> bool:
    """Whether two actions of a rank fall on the same tick of the period."""
    for rank in range(ranks):
        places = {ticks[kind, stage] % PERIOD for kind in "FB" for stage in (rank, 2 * ranks - 1 - rank)}
        if len(places) < 4:
            return True
    return False


def repeat(ranks: int, microbatches: int, ticks: dict[tuple[str, int], int]) -> Schedule:
    """The block once for each microbatch, a period apart; weight gradients in the next free ticks of their rank."""
    rows = []
    for rank in range(ranks):
        stages = (rank, 2 * ranks - 1 - rank)
        at = {
            ticks[kind, stage] + PERIOD * microbatch: Action(kind, stage, microbatch)  # type: ignore[arg-type]
            for kind in "FB" for stage in stages for microbatch in range(microbatches)
        }  # fmt: skip
        free = itertools.count(min(at))
        tick = -1
        for done, backward in sorted((tick, action) for tick, action in at.items() if action.kind == "B"):
            while tick <= done or tick in at:
                tick = next(free)
            at[tick] = Action("W", backward.stage, backward.microbatch)
        rows.append([action for _, action in sorted(at.items())])
    return make("searched", microbatches, [vee(ranks)], rows, None)
