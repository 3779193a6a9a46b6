"""Pipelines whose stages are sharded over other ranks: when a stage is gathered, cut again, and its gradients summed.

Read off a schedule, like the transfers. Loads no torch.
"""

from collections.abc import Sequence
from dataclasses import replace

from soma.train.parallel.pipeline.schedule import Action, Schedule, ShardAction, Step, actions_of


def add_shards(schedule: Schedule, zero: int) -> Schedule:
    """What happens to the shards of the stages, between the steps that compute; `zero` is 1, 2 or 3.

    Stages 1 and 2 of ZeRO keep the parameters of a stage together from its first step to its last, stage 3 cuts them
    whenever another stage of the rank takes its turn. Gradients are summed once, after a stage's last backward (1), or
    after each backward (2, 3). A stage is gathered one step before its turn, so that the gathering hides behind it.
    Worked example: rank 1 of 1F1B with two microbatches, ZeRO-2: unshard1, F1.0, BW1.0, reduce1, F1.1, BW1.1, reduce1,
    reshard1.
    """
    return replace(schedule, steps=tuple(tuple(shard_row(row, zero)) for row in schedule.steps))


def shard_row(row: Sequence[Step], zero: int) -> list[Step]:
    """One rank's steps."""
    begins, ends = turns(row, zero)
    last = {action.stage: place for place, step in enumerate(row) for action in weights_of(step)}
    plan: list[Step] = [ShardAction("unshard", stage) for stage in begins.get(0, [])]
    for place, step in enumerate(row):
        plan += [ShardAction("unshard", stage) for stage in begins.get(place + 1, [])]
        plan.append(step)
        for action in weights_of(step):
            if zero > 1 or last[action.stage] == place:
                plan.append(ShardAction("reduce", action.stage))
        plan += [ShardAction("reshard", stage) for stage in ends.get(place, [])]
    return plan


def weights_of(step: Step) -> list[Action]:
    """The actions of a step that end with a gradient of the weights."""
    return [action for action in actions_of(step) if action.kind in ("W", "BW")]


def turns(row: Sequence[Step], zero: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Where the turns of stages begin and where they end: places in the row, each with the stages."""
    places: dict[int, list[int]] = {}
    for place, step in enumerate(row):
        for action in actions_of(step):
            places.setdefault(action.stage, []).append(place)
    begins: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for stage, own in places.items():
        for before, place in zip([None, *own], own, strict=False):
            if before is None or (zero == 3 and place > before + 1):
                begins.setdefault(place, []).append(stage)
        for place, after in zip(own, [*own[1:], None], strict=True):
            if after is None or (zero == 3 and after > place + 1):
                ends.setdefault(place, []).append(stage)
    return begins, ends
