"""What the steps of a pipeline cost: times and bytes of its stages. Loads no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from soma.train.parallel.pipeline.schedule import Action, Compute, Overlap
from soma.train.parallel.pipeline.transfers import Channel

PerStage = float | Sequence[float]  # one number for all stages, or one for each stage of the model


def at(values: PerStage, stage: int) -> float:
    """The number of a stage."""
    return values if isinstance(values, int | float) else values[stage]


@dataclass(frozen=True)
class Phase:
    """A part of a step, in time from its start: computation, or tokens that travel to experts or back."""

    name: str
    lane: Literal["compute", "all-to-all"]
    start: float
    end: float


@dataclass(frozen=True)
class Costs:
    """Times, in any one unit, of a stage: a rank with two stages computes twice as long.

    forward: F. backward: the gradient of a stage's input alone. weight: that of its weights. transfer: of a message
    from rank to rank, one number or one for each link (of one direction, 0 for those not named; one message at a time);
    it is hidden behind computation of others. overlapped: of a forward and a full backward that run side by side, where
    that is known (None: from their parts, `pair`), one number or one for each (stage of the forward, of the backward).
    whole: of a full backward, where its parts help each other (None: the sum of them). `chunks.chunk_costs` finds both
    from the pieces of stages with experts elsewhere. all_to_all: how long tokens travel to experts and back, in a
    forward and in a backward each; it stands still for it, but for an overlapped pair. unshard, reduce: how long the
    parameters of a stage take to be gathered and its gradients to be summed, where it is sharded; both on one lane
    beside the computation. reduce_stops: the rank stands still while it reduces. So it is over Gloo, where FSDP2 has no
    reduction that goes on by itself.
    """

    forward: PerStage = 1.0
    backward: PerStage = 1.0
    weight: PerStage = 1.0
    transfer: float | Mapping[Channel, float] = 0.0
    overlapped: float | Mapping[tuple[int, int], float] | None = None
    all_to_all: PerStage = 0.0
    unshard: PerStage = 0.0
    reduce: PerStage = 0.0
    whole: PerStage | None = None
    reduce_stops: bool = False

    def of(self, step: Compute) -> float:
        """How long a step takes, from the start of its first part to the end of its last."""
        if isinstance(step, Overlap) and self.overlapped is not None:
            stages = step.forward.stage, step.backward.stage
            return self.overlapped[stages] if isinstance(self.overlapped, Mapping) else self.overlapped
        if isinstance(step, Overlap) and not self.travel(step.forward) and not self.travel(step.backward):
            return self.of(step.forward) + self.of(step.backward)
        if isinstance(step, Overlap):
            return max(phase.end for phase in self.phases(step))
        return self.computation(step) + self.travel(step)

    def computation(self, action: Action) -> float:
        """How long an action computes."""
        if action.kind == "BW" and self.whole is not None:
            return at(self.whole, action.stage)
        times = {"F": (self.forward,), "B": (self.backward,), "W": (self.weight,), "BW": (self.backward, self.weight)}
        return sum(at(time, action.stage) for time in times[action.kind])

    def travel(self, action: Action) -> float:
        """How long an action's tokens travel."""
        return 0.0 if action.kind == "W" else at(self.all_to_all, action.stage)

    def over(self, channel: Channel) -> float:
        """How long a message takes."""
        return self.transfer.get(channel, 0.0) if isinstance(self.transfer, Mapping) else self.transfer

    def phases(self, step: Compute) -> list[Phase]:
        """The parts of a step of a stage with experts elsewhere; none where no tokens travel or a pair was measured.

        A stage counts as one layer: attention takes half of its time, the experts the other half.
        """
        if isinstance(step, Overlap):
            if self.overlapped is not None or not (self.travel(step.forward) + self.travel(step.backward)):
                return []
            return pair(self, step)
        trip, half = self.travel(step) / 2, self.computation(step) / 2
        if not trip:
            return []
        if step.kind == "F":
            order = [("attention", half), ("dispatch", trip), ("experts", half), ("combine", trip)]
        else:
            weight = at(self.weight, step.stage) if step.kind == "BW" else 0.0
            half -= weight / 2
            order = [("combine back", trip), ("experts", half), ("dispatch back", trip), ("attention", half + weight)]
        clock, found = 0.0, []
        for name, time in order:
            found.append(Phase(name, lane_of(name), clock, clock + time))
            clock += time
        return found


def lane_of(name: str) -> Literal["compute", "all-to-all"]:
    return "all-to-all" if name.startswith(("dispatch", "combine")) else "compute"


def pair(costs: Costs, step: Overlap) -> list[Phase]:
    """DualPipe's overlapped chunk (arXiv:2412.19437, figure 4): each lane has one order, and what it needs.

    Worked example: F = B = W = 1 and an all-to-all of 0.5 a pass: 3, where apart they are 1.5 + 2.5.
    """
    f = costs.computation(step.forward) / 2
    b, w = at(costs.backward, step.backward.stage) / 2, at(costs.weight, step.backward.stage) / 2
    forward, backward = costs.travel(step.forward) / 2, costs.travel(step.backward) / 2
    order: list[tuple[str, float, str | None]] = [  # name, time, what it waits for beside its lane
        ("combine back", backward, None), ("attention, forward", f, None), ("dispatch", forward, "attention, forward"),
        ("experts, backward", b, "combine back"), ("dispatch back", backward, "experts, backward"),
        ("experts, weights", w, None), ("experts, forward", f, "dispatch"), ("combine", forward, "experts, forward"),
        ("attention, backward", b, "dispatch back"), ("attention, weights", w, None),
    ]  # fmt: skip
    free = {"compute": 0.0, "all-to-all": 0.0}
    found: dict[str, Phase] = {}
    for name, time, need in order:
        lane = lane_of(name)
        start = max(free[lane], 0.0 if need is None else found[need].end)
        free[lane] = start + time
        found[name] = Phase(name, lane, start, start + time)
    return list(found.values())


@dataclass(frozen=True)
class Memory:
    """Bytes of a stage.

    activation: what one microbatch's forward leaves, until its gradient of the weights is done. parameters; gradients:
    those of a whole stage, from the first W or BW (the gradients of norms and biases, which a B has, are not counted
    before). message: of one transfer, from the moment in which its buffer is there. shards: ranks over
    which a sharded stage is cut; each keeps its piece of the parameters also while they are gathered.
    """

    activation: PerStage = 0.0
    parameters: PerStage = 0.0
    gradients: PerStage = 0.0
    message: float = 0.0
    shards: int = 1
