"""What a pipeline schedule is: for every rank, the list of what it does, in order. Loads no torch.

A model is cut into S stages. A microbatch runs forward through stages 0 to S-1 and backward from S-1 to 0. A
backward may be split (zero bubble, arXiv:2401.10241): the gradient of the stage's input, which the stage before waits
for, and the gradient of its weights, for which nobody waits.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Kind = Literal["F", "B", "W", "BW"]  # forward; backward for the input; backward for the weights; both at once


@dataclass(frozen=True, order=True)
class Action:
    """One piece of work: `kind` of `microbatch` on `stage`."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


@dataclass(frozen=True)
class Overlap:
    """A forward and a full backward of two microbatches that run side by side and hide each other's transfers."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


@dataclass(frozen=True)
class Transfer:
    """One end of a message between two ranks: what the action `message` put out, to or from the rank `peer`.

    A forward puts out its stage's output, for the stage after it, a backward (`B`, also where it is part of a `BW`) the
    gradient of its stage's input, for the stage before it. A send does not hold its rank up. A receive opens a buffer
    and does not wait either: the action that reads it does.
    """

    kind: Literal["send", "receive"]
    message: Action
    peer: int

    def __str__(self) -> str:
        return f"{self.message}>{self.peer}" if self.kind == "send" else f"{self.peer}>{self.message}"


@dataclass(frozen=True)
class ShardAction:
    """Gather the parameters of a stage, cut them again, or sum its gradients so far and cut those."""

    kind: Literal["unshard", "reshard", "reduce"]
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}"


Compute = Action | Overlap
Step = Compute | Transfer | ShardAction


def actions_of(step: Step) -> tuple[Action, ...]:
    """The one or two actions of a step that computes, none of another."""
    if isinstance(step, Overlap):
        return (step.forward, step.backward)
    return (step,) if isinstance(step, Action) else ()


@dataclass(frozen=True)
class Schedule:
    """A whole plan.

    placements: per direction the rank of every stage. One direction for all schedules but DualPipe, in which half of
    the microbatches enter at the other end (direction 1) and every rank holds the parameters of two stages.
    activations: most activations, in full stages of an unsplit model (a rank's layers), that the plan promises to
    hold on any rank at once; None: it promises nothing.
    zero: None where the steps only compute. A lowered schedule has all steps and says for which stage of ZeRO: 0 for
    stages that are not sharded.
    """

    name: str
    microbatches: int
    placements: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[Step, ...], ...]
    activations: float | None = None
    zero: int | None = None

    @property
    def ranks(self) -> int:
        return len(self.steps)

    @property
    def stages(self) -> int:
        return len(self.placements[0])

    @property
    def stages_per_rank(self) -> int:
        """Stages that one rank computes for one direction."""
        return self.stages // self.ranks

    def rank_of(self, stage: int, microbatch: int) -> int:
        """Where this microbatch visits this stage."""
        directions = len(self.placements)
        return self.placements[microbatch * directions // self.microbatches][stage]

    def stages_of(self, rank: int) -> list[int]:
        """The stages whose parameters a rank holds."""
        return sorted({stage for place in self.placements for stage, there in enumerate(place) if there == rank})

    def computing(self, rank: int) -> list[Compute]:
        """A rank's steps in order, those that compute."""
        return [step for step in self.steps[rank] if isinstance(step, Action | Overlap)]

    def actions(self, rank: int) -> list[Action]:
        """A rank's actions in order, overlaps taken apart."""
        return [action for step in self.steps[rank] for action in actions_of(step)]


def layers_of_stages(layers: int, stages: int) -> list[list[int]]:
    """Consecutive layers of every stage, as even as can be; the first stages get one more.

    16 layers on 8 stages with interleaved placement on 4 ranks: rank 0 has stages 0 and 4, that is layers 0, 1, 8, 9.
    Raises ValueError where a stage would have none.
    """
    if layers < stages:
        raise ValueError(f"{layers} layers do not fill {stages} stages: use at most {layers} stages")
    cuts = [stage * (layers // stages) + min(stage, layers % stages) for stage in range(stages + 1)]
    return [list(range(start, end)) for start, end in pairwise(cuts)]


def straight(ranks: int) -> tuple[int, ...]:
    """Stage s on rank s."""
    return tuple(range(ranks))


def looped(ranks: int, chunks: int) -> tuple[int, ...]:
    """Interleaved (arXiv:2104.04473): stage s on rank s mod p."""
    return tuple(stage % ranks for stage in range(ranks * chunks))


def vee(ranks: int) -> tuple[int, ...]:
    """Down and up again: rank r has stages r and 2p-1-r."""
    return (*range(ranks), *reversed(range(ranks)))
