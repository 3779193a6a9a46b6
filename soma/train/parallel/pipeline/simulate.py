"""Runs a schedule on paper: when every action starts and ends, who waits, who holds how much. Loads no torch."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from soma.train.parallel.pipeline.schedule import Action, Compute, Overlap, Schedule, actions_of


@dataclass(frozen=True)
class Costs:
    """Times, in any one unit. One number for all stages, or one for each stage of the model.

    forward: F. backward: the gradient of a stage's input alone. weight: that of its weights. transfer: from rank to
    rank, hidden behind computation of others. overlapped: of a forward and a full backward that run side by side
    (None: their sum, nothing gained). Times are those of a stage: a rank with two stages computes twice as long.
    """

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 1.0
    weight: float | Sequence[float] = 1.0
    transfer: float = 0.0
    overlapped: float | None = None

    def of(self, step: Compute) -> float:
        """How long a step takes."""
        if isinstance(step, Overlap):
            return self.of(step.forward) + self.of(step.backward) if self.overlapped is None else self.overlapped
        times = {"F": (self.forward,), "B": (self.backward,), "W": (self.weight,), "BW": (self.backward, self.weight)}
        return sum(time if isinstance(time, int | float) else time[step.stage] for time in times[step.kind])


@dataclass(frozen=True)
class Span:
    """A step on the time line."""

    step: Compute
    start: float
    end: float


@dataclass
class Timeline:
    """What a schedule does in time.

    spans: per rank. peaks: most activations that each rank held at once, in units of a rank's whole forward (a stage's
    activations count 1/stages_per_rank; they live from the start of the forward to the end of the weight gradient).
    """

    schedule: Schedule
    spans: list[list[Span]]
    peaks: list[float] = field(default_factory=list)

    @property
    def length(self) -> float:
        """From the first start to the last end."""
        return max(row[-1].end for row in self.spans if row)

    def busy(self, rank: int) -> float:
        return sum(span.end - span.start for span in self.spans[rank])

    @property
    def bubble(self) -> float:
        """Most idle time of any rank between its own first and last step: what each training step loses.

        (arXiv:2401.10241, which lets a rank begin its next step when its own work is done.)
        """
        ends = [(row[0].start, row[-1].end) for row in self.spans if row]
        return max(end - start - self.busy(rank) for rank, (start, end) in enumerate(ends))

    @property
    def idle_share(self) -> float:
        """Share of all ranks' time in which they wait. GPipe and 1F1B: (p-1)/(m+p-1)."""
        ranks = self.schedule.ranks
        return 1 - sum(self.busy(rank) for rank in range(ranks)) / (ranks * self.length)

    @property
    def peak(self) -> float:
        """The most activations on any rank."""
        return max(self.peaks)


class DeadlockError(ValueError):
    """A schedule that stops: `stuck` holds each rank's next step and what it waits for; `done` is how far each came."""

    def __init__(self, stuck: dict[int, tuple[Compute, Action]], done: list[int]) -> None:
        self.stuck, self.done = stuck, done
        lines = [f"rank {rank} cannot start {step}: it waits for {need}" for rank, (step, need) in stuck.items()]
        super().__init__("the schedule stops: " + "; ".join(lines))


def needs(action: Action, stages: int) -> Action | None:
    """What must be done before: of another stage, or of the same one. A `B` may come as part of a `BW`."""
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind == "F":
        return Action("F", stage - 1, microbatch) if stage else None
    if kind == "W":
        return Action("B", stage, microbatch)
    return Action("B", stage + 1, microbatch) if stage < stages - 1 else Action("F", stage, microbatch)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """The time line. A step starts when its rank is free and what it needs has arrived; sends cost the sender nothing.

    Raises DeadlockError where a rank would wait for ever. Worked number: 1F1B of 4 ranks and 8 microbatches with
    F = 1, B = W = 1 ends after (8 + 3)·3 = 33, idle share 3/11.
    """
    costs = costs or Costs()
    ready: dict[Action, float] = {}
    rows = [schedule.computing(rank) for rank in range(schedule.ranks)]
    spans: list[list[Span]] = [[] for _ in rows]
    places = [0] * schedule.ranks
    clocks = [0.0] * schedule.ranks
    waiting: dict[Action, list[int]] = {}
    todo = deque(range(schedule.ranks))
    while todo:
        rank = todo.popleft()
        row = rows[rank]
        while places[rank] < len(row):
            step = row[places[rank]]
            start, lacking = arrival(schedule, step, rank, ready, costs.transfer)
            if lacking is not None:
                waiting.setdefault(lacking, []).append(rank)
                break
            start = max(start, clocks[rank])
            clocks[rank] = end = start + costs.of(step)
            spans[rank].append(Span(step, start, end))
            places[rank] += 1
            for action in actions_of(step):
                for done in finished(action):
                    ready[done] = end
                    todo.extend(waiting.pop(done, []))
    if any(place < len(row) for place, row in zip(places, rows, strict=True)):
        stuck = {}
        for action, ranks in waiting.items():
            for rank in ranks:
                stuck[rank] = (rows[rank][places[rank]], action)
        raise DeadlockError(dict(sorted(stuck.items())), places)
    return Timeline(schedule, spans, [peak(schedule, row) for row in spans])


def finished(action: Action) -> list[Action]:
    """What others may wait for, now that `action` is over."""
    if action.kind == "BW":
        return [Action("B", action.stage, action.microbatch), Action("W", action.stage, action.microbatch)]
    return [action]


def arrival(
    schedule: Schedule, step: Compute, rank: int, ready: dict[Action, float], transfer: float
) -> tuple[float, Action | None]:
    """When all that a step needs is there, or what is lacking."""
    latest = 0.0
    for action in actions_of(step):
        wanted = [needs(action, schedule.stages)]
        if action.kind in ("B", "BW"):
            wanted.append(Action("F", action.stage, action.microbatch))
        for need in wanted:
            if need is None:
                continue
            if need not in ready:
                return latest, need
            is_remote = schedule.rank_of(need.stage, need.microbatch) != rank
            latest = max(latest, ready[need] + (transfer if is_remote else 0.0))
    return latest, None


def peak(schedule: Schedule, row: list[Span]) -> float:
    """Most activations alive at once on a rank, in units of its whole forward."""
    held = most = 0
    for span in row:
        actions = actions_of(span.step)
        held += sum(action.kind == "F" for action in actions)
        most = max(most, held)
        held -= sum(action.kind in ("W", "BW") for action in actions)
    return most / schedule.stages_per_rank
