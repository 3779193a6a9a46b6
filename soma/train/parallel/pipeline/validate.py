"""Checks a schedule before anything runs: whole, on the right ranks, no deadlock, within the memory it promises."""

from collections import Counter

from soma.train.parallel.pipeline.schedule import Action, Schedule
from soma.train.parallel.pipeline.simulate import DeadlockError, simulate


def validate(schedule: Schedule) -> None:
    """Raises ValueError: what is wrong, and a picture of the grid in which `!` marks the culprit.

    Every microbatch passes every stage forward once and backward once (whole, or split in B and W), each on the rank
    that the placement names; what an action needs comes before it; no rank waits for ever; no rank holds more
    activations than the schedule claims.
    """
    for rank in range(schedule.ranks):
        for place, step_actions in enumerate(schedule.actions(rank)):
            check_place(schedule, rank, place, step_actions)
    counts = Counter(action for rank in range(schedule.ranks) for action in schedule.actions(rank))
    for action, count in counts.items():
        if count > 1:
            fail(schedule, f"{action} is done {count} times", [action])
    for microbatch in range(schedule.microbatches):
        for stage in range(schedule.stages):
            check_whole(schedule, counts, stage, microbatch)
    try:
        timeline = simulate(schedule)
    except DeadlockError as error:
        culprits = [action for step, _ in error.stuck.values() for action in (step,) if isinstance(action, Action)]
        fail(schedule, str(error), culprits)
    claimed = schedule.activations
    if claimed is not None:
        for rank, held in enumerate(timeline.peaks):
            if held > claimed + 1e-9:
                fail(schedule, f"rank {rank} holds {held:g} activations at once, {claimed:g} were promised", [], rank)


def check_place(schedule: Schedule, rank: int, place: int, action: Action) -> None:
    """The action exists and belongs here."""
    if not (0 <= action.stage < schedule.stages and 0 <= action.microbatch < schedule.microbatches):
        fail(
            schedule,
            f"rank {rank}, action {place}: {action} is outside {schedule.stages} stages and "
            f"{schedule.microbatches} microbatches",
            [action],
        )
    there = schedule.rank_of(action.stage, action.microbatch)
    if there != rank:
        fail(schedule, f"rank {rank} has {action}, which belongs to rank {there}", [action])


def check_whole(schedule: Schedule, counts: Counter[Action], stage: int, microbatch: int) -> None:
    """One forward, one backward, whole or in two parts."""
    has = {kind: counts[Action(kind, stage, microbatch)] for kind in ("F", "B", "W", "BW")}
    rank = schedule.rank_of(stage, microbatch)
    if not has["F"]:
        fail(schedule, f"rank {rank} never runs F{stage}.{microbatch}", [], rank)
    if has["BW"] + has["B"] != 1 or has["B"] != has["W"]:
        parts = ", ".join(kind for kind in ("B", "W", "BW") if has[kind]) or "nothing"
        fail(
            schedule, f"the backward of stage {stage}, microbatch {microbatch} is {parts}: one BW, or B and W",
            [Action(kind, stage, microbatch) for kind in ("B", "W", "BW")], rank,
        )  # fmt: skip


def fail(schedule: Schedule, message: str, culprits: list[Action], rank: int | None = None) -> None:
    raise ValueError(f"schedule {schedule.name}: {message}\n{grid(schedule, culprits, rank)}")


def grid(schedule: Schedule, culprits: list[Action], culprit_rank: int | None = None) -> str:
    """The plan as text: a line for each rank, in order; `!` before the culprits."""
    rows = []
    for rank, row in enumerate(schedule.steps):
        words = []
        for step in row:
            marked = any(action in culprits for action in ([step] if isinstance(step, Action) else []))
            words.append(f"!{step}" if marked else f"{step}")
        rows.append(f"{'!' if rank == culprit_rank else ' '}rank {rank}: {' '.join(words)}")
    return "\n".join(rows)
