"""Runs a schedule on paper: when every step starts and ends, who waits, who holds how much. Loads no torch."""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from soma.train.parallel.pipeline.costs import Costs, Memory, at
from soma.train.parallel.pipeline.lower import lower
from soma.train.parallel.pipeline.schedule import Action, Compute, Schedule, ShardAction, Step, Transfer, actions_of
from soma.train.parallel.pipeline.transfers import Channel, made_by, needed_by

Lane = Literal["send", "receive", "shards", "all-to-all", "wait"]


@dataclass(frozen=True)
class Span:
    """A step on the time line."""

    step: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Traffic:
    """What a rank's links do meanwhile. A message is there on both of its ends.

    message, peer: of a send or receive, what it is and the rank at its other end. Of a measured run there is also
    `posted`, the moment in which this end was, and the lane "wait": what the rank stands still for.
    """

    lane: Lane
    name: str
    start: float
    end: float
    message: Action | None = None
    peer: int | None = None
    posted: float | None = None


@dataclass
class Timeline:
    """What a schedule does in time.

    spans: per rank. peaks: most activations that each rank held at once, in units of a rank's whole forward (a stage's
    activations count 1/stages_per_rank; they live from the start of the forward to the end of the weight gradient).
    traffic: per rank, that of more than no time. held: per rank the bytes from each moment on, in order of time.
    exposed: per rank how long steps stand still for an all-to-all. sent: per rank the bytes that leave it, those of
    messages, gathers ("unshard") and reductions; in a gather or reduction over n ranks each passes on n - 1 pieces.
    """

    schedule: Schedule
    spans: list[list[Span]]
    peaks: list[float] = field(default_factory=list)
    traffic: list[list[Traffic]] = field(default_factory=list)
    held: list[list[tuple[float, float]]] = field(default_factory=list)
    exposed: list[float] = field(default_factory=list)
    sent: list[dict[str, float]] = field(default_factory=list)

    @property
    def length(self) -> float:
        """From the first start to the last end, of steps and of what is under way then."""
        ends = [row[-1].end for row in self.spans if row]
        return max(ends + [traffic.end for row in self.traffic for traffic in row])

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

    @property
    def peak_bytes(self) -> list[float]:
        """The most bytes that each rank held at once."""
        return [max(held for _, held in row) for row in self.held]


class DeadlockError(ValueError):
    """A schedule that stops: `stuck` holds each rank's next step and what it waits for; `done` is how far each came."""

    def __init__(self, stuck: dict[int, tuple[Step, str]], done: list[int]) -> None:
        self.stuck, self.done = stuck, done
        lines = [f"rank {rank} cannot start {step}: it waits for {need}" for rank, (step, need) in stuck.items()]
        super().__init__("the schedule stops: " + "; ".join(lines))


class LongerError(Exception):
    """A schedule that takes longer than was asked for."""


def simulate(
    schedule: Schedule, costs: Costs | None = None, memory: Memory | None = None, within: float = math.inf
) -> Timeline:  # fmt: skip
    """The time line of a schedule; one that is not lowered is, without shards.

    A step starts when its rank is free, what it needs has arrived and its stages are gathered. Sends, receives and
    shard actions do not hold their rank up (but for reductions over Gloo: `Costs.reduce_stops`). A message leaves when
    it is made, its link is free, and its receive open. It takes memory on its sender until it has left, and on its
    reader from when it leaves: an open buffer that nothing has been written to has no pages yet.

    Raises DeadlockError where a rank would wait for ever, LongerError as soon as it is sure that it takes longer than
    `within`. Worked number: 1F1B of 4 ranks and 8 microbatches with F = 1, B = W = 1 ends after (8 + 3)·3 = 33, idle
    share 3/11.
    """
    plan = lower(schedule) if schedule.zero is None else schedule
    return Simulation(plan, costs or Costs(), memory or Memory(), within).run()


class Link:
    """A channel: messages that wait for their turn, in the order of the sends, and what was opened for them."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Action, float]] = deque()
        self.opened: dict[Action, float] = {}
        self.free = 0.0


class Simulation:
    """Goes from rank to rank, as far as each can. Who waits for what is data, so the order in which it does is not."""

    def __init__(self, schedule: Schedule, costs: Costs, memory: Memory, within: float) -> None:
        self.schedule, self.costs, self.memory, self.within = schedule, costs, memory, within
        ranks = range(schedule.ranks)
        self.clocks = [0.0 for _ in ranks]
        self.times: dict[tuple[str, int], float] = {}  # of single actions, by kind and stage
        self.left = [sum(self.time(step) for step in schedule.computing(rank)) for rank in ranks]
        self.lanes = [0.0 for _ in ranks]  # when a rank's gathers and reductions are through
        self.done: dict[Action, float] = {}  # for the rank that did it
        self.arrived: dict[Action, float] = {}  # for the rank that reads it
        self.gathered: dict[tuple[int, int], float] = {}  # rank, stage
        self.links: defaultdict[Channel, Link] = defaultdict(Link)
        self.waiting: dict[tuple[str, Action], int] = {}
        self.spans: list[list[Span]] = [[] for _ in ranks]
        self.traffic: list[list[Traffic]] = [[] for _ in ranks]
        self.changes: list[list[tuple[float, float]]] = [[] for _ in ranks]  # of bytes
        self.whole: set[tuple[int, int]] = set()  # rank, stage with gradients that are not reduced
        self.pieces: set[tuple[int, int]] = set()
        self.exposed = [0.0 for _ in ranks]
        self.sent = [dict.fromkeys(("messages", "unshard", "reduce"), 0.0) for _ in ranks]
        self.has_more = bool(costs.all_to_all) or memory != Memory()
        self.todo = deque(ranks)

    def time(self, step: Compute) -> float:
        """How long a step takes."""
        if not isinstance(step, Action):
            return self.costs.of(step)
        key = step.kind, step.stage
        if key not in self.times:
            self.times[key] = self.costs.of(step)
        return self.times[key]

    def run(self) -> Timeline:
        schedule = self.schedule
        places = [0] * schedule.ranks
        for rank in range(schedule.ranks):
            parts = self.memory.shards if schedule.zero else 1
            self.change(rank, 0.0, sum(at(self.memory.parameters, s) for s in schedule.stages_of(rank)) / parts)
        while self.todo:
            rank = self.todo.popleft()
            row = schedule.steps[rank]
            while places[rank] < len(row) and self.take(rank, row[places[rank]]):
                places[rank] += 1
        if any(place < len(row) for place, row in zip(places, schedule.steps, strict=True)):
            stuck = {
                rank: (schedule.steps[rank][places[rank]], f"{need}" + (" to arrive" if how == "arrived" else ""))
                for (how, need), rank in self.waiting.items()
            }
            raise DeadlockError(dict(sorted(stuck.items())), places)
        peaks = [peak(schedule, row) for row in self.spans]
        return Timeline(schedule, self.spans, peaks, self.traffic, self.held(), self.exposed, self.sent)

    def take(self, rank: int, step: Step) -> bool:
        """Do a rank's next step, or note what it waits for."""
        now = self.clocks[rank]
        if isinstance(step, ShardAction):
            self.shard(rank, step, now)
        elif isinstance(step, Transfer):
            channel = (rank, step.peer) if step.kind == "send" else (step.peer, rank)
            link = self.links[channel]
            if step.kind == "send":
                link.queue.append((step.message, now))
                self.change(rank, now, self.memory.message)
                self.sent[rank]["messages"] += self.memory.message
            else:
                link.opened[step.message] = now
            self.carry(channel, link)
        else:
            return self.compute(rank, step)
        return True

    def compute(self, rank: int, step: Compute) -> bool:
        """A step that computes, if all that it needs is there."""
        start, messages = self.clocks[rank], 0
        for action in actions_of(step):
            need = needed_by(self.schedule, action)
            remote = need is not None and self.schedule.rank_of(need.stage, need.microbatch) != rank
            if need is not None:
                there = self.arrived if remote else self.done
                if need not in there:
                    self.waiting["arrived" if remote else "done", need] = rank
                    return False
                start = max(start, there[need])
            own = own_need(action)
            if own is not None and own not in self.done:
                self.waiting["done", own] = rank
                return False
            start = max(start, self.gathered.get((rank, action.stage), 0.0))
            messages += remote
        self.change(rank, start, -messages * self.memory.message)
        if start + self.left[rank] > self.within:
            raise LongerError
        end = self.clocks[rank] = start + self.time(step)
        self.left[rank] -= end - start
        self.spans[rank].append(Span(step, start, end))
        if self.has_more:
            self.note(rank, step, start, end)
        for action in actions_of(step):
            self.done[made_by(action)] = end
            self.wake("done", made_by(action))
        return True

    def note(self, rank: int, step: Compute, start: float, end: float) -> None:
        """Trips to experts, and what a step allocates and frees."""
        phases = self.costs.phases(step)
        for phase in phases:
            if phase.lane == "all-to-all":
                self.traffic[rank].append(Traffic("all-to-all", phase.name, start + phase.start, start + phase.end))
        if phases:
            self.exposed[rank] += end - start - sum(self.costs.computation(action) for action in actions_of(step))
        for action in actions_of(step):
            activation, stage = at(self.memory.activation, action.stage), (rank, action.stage)
            if action.kind == "F":
                self.change(rank, start, activation)
                continue
            if action.kind == "B":
                continue
            if stage not in self.whole:
                self.whole.add(stage)
                self.change(rank, start, at(self.memory.gradients, action.stage))
            self.change(rank, end, -activation)

    def shard(self, rank: int, step: ShardAction, now: float) -> None:
        """Gather, cut or reduce a stage."""
        stage = (rank, step.stage)
        parameters, gradients = at(self.memory.parameters, step.stage), at(self.memory.gradients, step.stage)
        if step.kind == "reshard":
            self.gathered.pop(stage)
            self.change(rank, now, -parameters)
            return
        time = at(self.costs.unshard if step.kind == "unshard" else self.costs.reduce, step.stage)
        start = max(now, self.lanes[rank])
        end = self.lanes[rank] = start + time
        if time:
            self.traffic[rank].append(Traffic("shards", str(step), start, end))
        whole = parameters if step.kind == "unshard" else gradients
        self.sent[rank][step.kind] += whole * (self.memory.shards - 1) / self.memory.shards
        if step.kind == "unshard":
            self.gathered[stage] = end
            self.change(rank, now, parameters)
            return
        if stage not in self.pieces:
            self.pieces.add(stage)
            self.change(rank, now, gradients / self.memory.shards)
        self.whole.discard(stage)
        self.change(rank, end, -gradients)
        if self.costs.reduce_stops:
            self.clocks[rank] = end

    def carry(self, channel: Channel, link: Link) -> None:
        """Move a link's messages on as far as both of their ends are ready."""
        (source, reader), time = channel, self.costs.over(channel)
        while link.queue and link.queue[0][0] in link.opened:
            message, sent = link.queue.popleft()
            start = max(sent, link.opened.pop(message), link.free)
            end = link.free = self.arrived[message] = start + time
            if time:
                self.traffic[source].append(Traffic("send", f"{message} to rank {reader}", start, end, message, reader))
                name = f"{message} of rank {source}"
                self.traffic[reader].append(Traffic("receive", name, start, end, message, source))
            self.change(reader, start, self.memory.message)
            self.change(source, end, -self.memory.message)
            self.wake("arrived", message)

    def wake(self, how: str, what: Action) -> None:
        rank = self.waiting.pop((how, what), None)
        if rank is not None:
            self.todo.append(rank)

    def change(self, rank: int, time: float, count: float) -> None:
        if count:
            self.changes[rank].append((time, count))

    def held(self) -> list[list[tuple[float, float]]]:
        """The bytes of every rank over time; what is freed at a moment makes room for what is allocated in it."""
        rows = []
        for changes in self.changes:
            held, row = 0.0, [(0.0, 0.0)]
            for time, count in sorted(changes, key=lambda change: change[0]):
                held += count
                row.append((time, held))
            rows.append(row)
        return rows


def own_need(action: Action) -> Action | None:
    """What the same stage must have done before."""
    if action.kind == "F":
        return None
    return Action("B" if action.kind == "W" else "F", action.stage, action.microbatch)


def peak(schedule: Schedule, row: Sequence[Span]) -> float:
    """Most activations alive at once on a rank, in units of its whole forward."""
    return most_held([span.step for span in row]) / schedule.stages_per_rank


def most_held(steps: Sequence[Compute]) -> int:
    """Most activations of a stage alive at once when these steps run in order."""
    held = most = 0
    for step in steps:
        actions = actions_of(step)
        held += sum(action.kind == "F" for action in actions)
        most = max(most, held)
        held -= sum(action.kind in ("W", "BW") for action in actions)
    return most
