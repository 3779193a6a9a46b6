"""From what a schedule computes to all that its ranks do: one object that is checked, timed, drawn and run.

As in torchtitan's and torch's own pipelines, in passes: the functions of `schedules.py` say what is computed, one pass
adds what happens to shards, another the transfers. Loads no torch.
"""

from dataclasses import replace

from soma.train.parallel.pipeline.schedule import Schedule
from soma.train.parallel.pipeline.sharding import add_shards
from soma.train.parallel.pipeline.transfers import add_transfers


def lower(schedule: Schedule, zero: int = 0, ahead: int | None = None) -> Schedule:
    """The schedule with sends, receives and (for stages that are sharded in ZeRO's stage `zero`) shard actions.

    ahead: receives that each channel has open before they are needed; None: all of them.
    Worked example: rank 1 of 1F1B on two ranks with two microbatches, ahead 1:
    0>F0.0, F1.0, 0>F0.1, BW1.0, B1.0>0, F1.1, BW1.1, B1.1>0.
    """
    assert schedule.zero is None, "lowered already"
    sharded = add_shards(schedule, zero) if zero else schedule
    return replace(add_transfers(sharded, ahead), zero=zero)


def one_by_one(schedule: Schedule) -> Schedule:
    """The same schedule with its overlapped pairs taken apart: for ranks that run one action at a time."""
    return replace(schedule, steps=tuple(tuple(schedule.actions(rank)) for rank in range(schedule.ranks)), zero=None)


def forward_only(schedule: Schedule) -> Schedule:
    """The same schedule without its backward, not lowered: for evaluation."""
    steps = tuple(
        tuple(action for action in schedule.actions(rank) if action.kind == "F") for rank in range(schedule.ranks)
    )
    return replace(schedule, steps=steps, activations=None, zero=None)
