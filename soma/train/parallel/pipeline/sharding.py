"""Pipelines whose stages are sharded over other ranks: when a stage is gathered, cut again, and its gradients summed.

Read off a schedule, like the transfers. Loads no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from soma.train.parallel.pipeline.schedule import Action, Schedule


@dataclass(frozen=True)
class ShardAction:
    """Gather the parameters of a stage, cut them again, or sum its gradients so far and cut those."""

    kind: Literal["unshard", "reshard", "reduce"]
    stage: int

    def __str__(self) -> str:
        return f"{self.kind} {self.stage}"


def with_shards(schedule: Schedule, rank: int, zero: int) -> list[Action | ShardAction]:
    """A rank's actions in order, and between them what happens to the shards of its stages.

    Stages 1 and 2 of ZeRO keep the parameters of a stage together from its first action to its last, stage 3 cuts them
    whenever another stage of the rank takes its turn. Gradients are summed once, after a stage's last backward (1), or
    after each backward (2, 3). A stage is gathered one action before its turn, so that the gathering hides behind it.
    Worked example: rank 1 of 1F1B with two microbatches, ZeRO-2: unshard 1, F1.0, BW1.0, reduce 1, F1.1, BW1.1,
    reduce 1, reshard 1.
    """
    actions = schedule.actions(rank)
    begins, ends = turns(actions, zero)
    last = {action.stage: place for place, action in enumerate(actions) if action.kind in ("W", "BW")}
    plan: list[Action | ShardAction] = []
    for place, action in enumerate(actions):
        if place == 0:
            plan += [ShardAction("unshard", stage) for stage in begins.get(0, [])]
        plan += [ShardAction("unshard", stage) for stage in begins.get(place + 1, [])]
        plan.append(action)
        if action.kind in ("W", "BW") and (zero > 1 or last[action.stage] == place):
            plan.append(ShardAction("reduce", action.stage))
        plan += [ShardAction("reshard", stage) for stage in ends.get(place, [])]
    return plan


def turns(actions: Sequence[Action], zero: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Where the turn of a stage begins and where it ends: places in the list, each with the stages."""
    spans: list[tuple[int, int, int]] = []  # stage, first place, last place
    if zero == 3:
        for stage, run in groupby(enumerate(actions), key=lambda item: item[1].stage):
            places = [place for place, _ in run]
            spans.append((stage, places[0], places[-1]))
    else:
        for stage in dict.fromkeys(action.stage for action in actions):
            places = [place for place, action in enumerate(actions) if action.stage == stage]
            spans.append((stage, places[0], places[-1]))
    begins: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for stage, first, last in spans:
        begins.setdefault(first, []).append(stage)
        ends.setdefault(last, []).append(stage)
    return begins, ends
