"""What travels between ranks, and in which order: read off a schedule, the same on every rank. Loads no torch.

Two things travel: what a forward puts out, to the stage after it, and what a backward puts out (the gradient of the
stage's input), to the stage before it. Both are named by the action that makes them, `F` or `B`.
"""

from dataclasses import replace

from soma.train.parallel.pipeline.schedule import Action, Schedule

Channel = tuple[int, int]  # from rank, to rank


def made_by(action: Action) -> Action:
    """The name of what an action puts out: a whole backward gives what its first half gives."""
    return replace(action, kind="B") if action.kind == "BW" else action


def needed_by(schedule: Schedule, action: Action) -> Action | None:
    """What an action reads from the neighbouring stage; None at the ends, and for a weight gradient."""
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind == "F" and stage > 0:
        return Action("F", stage - 1, microbatch)
    if kind in ("B", "BW") and stage < schedule.stages - 1:
        return Action("B", stage + 1, microbatch)
    return None


def reader_of(schedule: Schedule, action: Action) -> int | None:
    """The rank that needs what an action puts out; None where nobody does."""
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind == "F" and stage < schedule.stages - 1:
        return schedule.rank_of(stage + 1, microbatch)
    if kind in ("B", "BW") and stage > 0:
        return schedule.rank_of(stage - 1, microbatch)
    return None


def channels(schedule: Schedule) -> dict[Channel, list[Action]]:
    """For every pair of ranks what goes from one to the other, in the order in which it is made.

    A channel has one direction and one order, which both of its ends know: the reader asks for its messages in just
    that order, however early, so that no two ranks can wait for each other (unless the schedule itself does). What
    stays on its rank is on no channel.
    """
    found: dict[Channel, list[Action]] = {}
    for rank in range(schedule.ranks):
        for action in schedule.actions(rank):
            reader = reader_of(schedule, action)
            if reader is not None and reader != rank:
                found.setdefault((rank, reader), []).append(made_by(action))
    return dict(sorted(found.items()))


def forward_only(schedule: Schedule) -> Schedule:
    """The same plan without its backward: for evaluation."""
    steps = tuple(
        tuple(action for action in schedule.actions(rank) if action.kind == "F") for rank in range(schedule.ranks)
    )
    return replace(schedule, steps=steps, activations=None)
