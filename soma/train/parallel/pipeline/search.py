"""The best schedule for measured times under a memory limit. Loads no torch.

Building blocks (arXiv:2405.15362): say at which tick one microbatch visits every stage of a V; send the next one the
same way a period later, for as long as there are microbatches. How long a microbatch's activations live then fixes the
memory, whatever their number. The order is what counts: the real times decide between the orders.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

from soma.train.parallel.pipeline.costs import Costs, Memory, PerStage
from soma.train.parallel.pipeline.lower import lower
from soma.train.parallel.pipeline.schedule import Action, Schedule, Step, vee
from soma.train.parallel.pipeline.schedules import SCHEDULES, make
from soma.train.parallel.pipeline.simulate import LongerError, most_held, simulate

PERIOD = 6  # ticks: a rank of a V does two forwards, two backwards, two weight gradients for each microbatch
STEPS = (1, 2, 3, 4)  # ticks between neighbouring stages
TURNS = (1, 2, 3)  # ticks between the last stage's forward and backward, and where the V turns


def v_half_limit(ranks: int) -> float:
    """Activations of V-half: ceil(p/2) + 1. For 8 ranks 5."""
    return math.ceil(ranks / 2) + 1


def search(ranks: int, microbatches: int, limit: float, costs: Costs | None = None) -> Schedule:
    """The schedule of the shortest time line among the fixed ones that hold at most `limit` activations (in units of
    a rank's whole forward) and all building blocks that do.

    costs: as for `per_stage`: one number each, or one for each of 2p parts of the model. Raises ValueError where
    nothing fits; the message names the least that does.
    """
    costs = costs or Costs()
    best: tuple[float, float, Schedule] | None = None
    least = math.inf
    for schedule, held in itertools.chain(fixed(ranks, microbatches), blocks(ranks, microbatches, limit)):
        least = min(least, held)
        if held > limit + 1e-9:
            continue
        within = math.inf if best is None else best[0] + 1e-9
        try:
            length = simulate(schedule, per_stage(costs, schedule), within=within).length
        except LongerError:
            continue
        if best is None or (length, held) < best[:2]:
            best = (length, held, schedule)
    if best is None:
        raise ValueError(f"no schedule of {ranks} ranks holds at most {limit:g} activations: the least is {least:g}")
    return replace(best[2], steps=tuple(tuple(best[2].computing(rank)) for rank in range(ranks)), zero=None)


def v_half(ranks: int, microbatches: int) -> Schedule:
    """Half the memory of 1F1B, on a V (arXiv:2405.15362): what `search` finds at equal times for `v_half_limit`."""
    limit = v_half_limit(ranks)
    return replace(search(ranks, microbatches, limit), name="v-half", activations=limit)


def per_stage(costs: Costs, schedule: Schedule) -> Costs:
    """Times of the schedule's stages. One number is the time of a rank's whole share of the model: a schedule with two
    stages a rank has half of it for each. Several are those of equally many consecutive parts of the model, one or more
    to a stage, which are added up: 2p parts do for schedules with one and with two stages a rank."""
    parts = schedule.stages_per_rank

    def share(time: PerStage) -> PerStage:
        return of_stages(time, schedule)

    assert isinstance(costs.overlapped, int | float | None)
    return replace(
        costs, forward=share(costs.forward), backward=share(costs.backward), weight=share(costs.weight),
        overlapped=None if costs.overlapped is None else costs.overlapped / parts,
        all_to_all=share(costs.all_to_all), unshard=share(costs.unshard), reduce=share(costs.reduce),
        whole=None if costs.whole is None else share(costs.whole),
    )  # fmt: skip


def memory_per_stage(memory: Memory, schedule: Schedule) -> Memory:
    """The same for bytes; a message is as large as ever."""
    return replace(
        memory, activation=of_stages(memory.activation, schedule), parameters=of_stages(memory.parameters, schedule),
        gradients=of_stages(memory.gradients, schedule),
    )  # fmt: skip


def of_stages(value: PerStage, schedule: Schedule) -> PerStage:
    """A rank's number divided, or those of parts of the model added up."""
    if isinstance(value, int | float):
        return value / schedule.stages_per_rank
    parts, rest = divmod(len(value), schedule.stages)
    if rest or not parts:
        raise ValueError(f"{len(value)} numbers for the {schedule.stages} stages of {schedule.name}: unequal shares")
    return [sum(value[stage * parts : (stage + 1) * parts]) for stage in range(schedule.stages)]


@functools.cache
def fixed(ranks: int, microbatches: int) -> list[tuple[Schedule, float]]:
    """The named schedules that exist for these sizes and keep one copy of the parameters, and what each holds."""
    found = []
    for name, schedule in SCHEDULES.items():
        if name != "dualpipe":
            try:
                found.append(weighed(schedule(ranks, microbatches)))
            except ValueError:
                continue
    return found


def weighed(schedule: Schedule) -> tuple[Schedule, float]:
    """A schedule, lowered, and the most activations that it holds on a rank, whatever the times."""
    most = max(most_held(schedule.computing(rank)) for rank in range(schedule.ranks))
    return lower(schedule), most / schedule.stages_per_rank


@functools.cache
def blocks(ranks: int, microbatches: int, limit: float) -> list[tuple[Schedule, float]]:
    """Every repeated building block on a V whose activations stay within `limit`, as `weighed`; those first that are
    short when all times are equal: the sooner a short one is found, the sooner the others are given up."""
    found: dict[tuple[tuple[Step, ...], ...], Schedule] = {}
    for down, up, back_down, back_up in itertools.product(STEPS, repeat=4):
        for turn, last, back_turn in itertools.product(TURNS, repeat=3):
            ticks = visit(ranks, (down, turn, up), (last, back_down, back_turn, back_up))
            if lifetime(ranks, ticks) > limit * 2 * PERIOD or clashes(ranks, ticks):
                continue
            schedule = repeat(ranks, microbatches, ticks)
            found.setdefault(schedule.steps, schedule)
    weighed_ones = [weighed(schedule) for schedule in found.values()]
    return sorted(weighed_ones, key=lambda one: simulate(one[0]).length)


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


NAMED: dict[str, Callable[[int, int], Schedule]] = {**SCHEDULES, "v-half": v_half}
