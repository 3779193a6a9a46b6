"""What the links of a run did: sends, receives, gathers and reductions of a step, and how long its ranks stood still.

It is there where it is asked for (`PipelineStep.record`); an executor that is not asked runs as if this file did not
exist. Over Gloo a thread for each channel waits for the transfers that the rank itself does not wait for, since nothing
else says when they were through. Between GPUs no thread can see that, and to wait for a send would hold the stream up:
there a message is over when its reader has it, a gather when its stage has it, and a reduction, which runs in a stream
of FSDP2's own, is not seen.
"""

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from soma.train.parallel.pipeline.clock import Clock, Mark
from soma.train.parallel.pipeline.schedule import Action, Schedule
from soma.train.parallel.pipeline.simulate import Span, Timeline, Traffic, peak
from soma.train.parallel.pipeline.transfers import Channel
from soma.train.parallel.pipeline.transport import Transport
from soma.train.parallel.shard import StageShards, parameter_groups

CPU = torch.device("cpu")


class Watched:
    """A transfer over Gloo that another thread waits for: `over` is when it was through."""

    def __init__(self, work: dist.Work) -> None:
        self.work, self.over = work, 0.0
        self.ended = threading.Event()
        self.error: RuntimeError | None = None

    def watch(self) -> None:
        """What the other thread does: the only wait, because Gloo forgets a transfer that was waited for."""
        try:
            self.work.wait()
        except RuntimeError as error:
            self.error = error
        self.over = time.monotonic()
        self.ended.set()

    def is_completed(self) -> bool:
        return self.ended.is_set()

    def wait(self) -> bool:
        """As that of the transfer. Raises what it raised."""
        self.ended.wait()
        if self.error is not None:
            raise self.error
        return True


class Watcher:
    """A thread that waits for transfers, one after the other."""

    def __init__(self) -> None:
        self.todo: SimpleQueue[Watched | None] = SimpleQueue()
        self.thread = threading.Thread(target=self.run, name="links", daemon=True)
        self.thread.start()

    def run(self) -> None:
        while (watched := self.todo.get()) is not None:
            watched.watch()

    def close(self) -> None:
        """After the last."""
        self.todo.put(None)
        self.thread.join()


@dataclass
class End:
    """One end of a message, or a gather or reduction: when it was begun, and what tells when it was over."""

    name: str
    peer: int
    begun: Mark
    works: list[Watched] = field(default_factory=list)
    over: Mark | None = None  # at the latest


@dataclass(frozen=True)
class Moves:
    """What one rank noted of a step, in seconds: by message its peer, when its end was posted, and when it was over
    (None: not seen); and what its own lanes did."""

    sent: dict[Action, tuple[int, float, float | None]]
    received: dict[Action, tuple[int, float, float]]
    own: list[Traffic]


class LinkLog:
    """What a rank's links do in a step, noted as it happens."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)
        self.watchers: dict[Hashable, Watcher] = {}
        self.sent: dict[Action, End] = {}
        self.received: dict[Action, End] = {}
        self.shards: list[End] = []
        self.waits: list[tuple[str, Mark, Mark]] = []

    def begin(self) -> None:
        """A new step."""
        self.sent, self.received, self.shards, self.waits = {}, {}, [], []

    def watch(self, lane: Hashable, work: dist.Work) -> Watched:
        """Have the thread of a channel, or of the shards, wait for a transfer."""
        if lane not in self.watchers:
            self.watchers[lane] = Watcher()
        watched = Watched(work)
        self.watchers[lane].todo.put(watched)
        return watched

    def finish(self) -> None:
        """All of the step is through."""
        while self.watchers:
            self.watchers.popitem()[1].close()

    def moves(self, clock: Clock) -> Moves:
        """The step in seconds on the clock that timed its actions."""

        def over(end: End) -> float | None:
            seen = [max(watched.over for watched in end.works)] if end.works else []  # by a thread: maybe a little late
            return min(seen + ([] if end.over is None else [clock.seconds(end.over)]), default=None)

        def begun(end: End) -> float:
            return clock.seconds(end.begun)

        own = [Traffic("wait", name, clock.seconds(start), clock.seconds(end)) for name, start, end in self.waits]
        free = 0.0  # as in the simulation one begins when the one before it is through
        for end in self.shards:
            last = over(end)
            if last is not None:
                own.append(Traffic("shards", end.name, min(max(begun(end), free), last), last))
                free = last
        sent = {message: (end.peer, begun(end), over(end)) for message, end in self.sent.items()}
        received = {message: (end.peer, begun(end), cast(float, over(end))) for message, end in self.received.items()}
        return Moves(sent, received, own)


class RecordedTransport(Transport):
    """Transfers that are noted in `links`."""

    def __init__(
        self, schedule: Schedule, group: dist.ProcessGroup, buffer: Callable[[int], Tensor],
        groups: Mapping[Channel, dist.ProcessGroup] | None = None, *, when_needed: bool = False,
        device: torch.device = CPU,
    ) -> None:  # fmt: skip
        super().__init__(schedule, group, buffer, groups, when_needed=when_needed)
        self.links = LinkLog(device)

    def begin(self) -> None:
        self.links.begin()
        super().begin()

    def finish(self) -> None:
        super().finish()
        self.links.finish()

    def send(self, message: Action, reader: int, value: Tensor) -> None:
        self.links.sent[message] = End(str(message), reader, self.links.clock.now())
        super().send(message, reader, value)

    def post(self, message: Action, source: int) -> None:
        self.links.received[message] = End(str(message), source, self.links.clock.now())
        super().post(message, source)

    def start(
        self, move: Callable[..., Any], tensor: Tensor, other: int, channel: Channel, message: Action
    ) -> dist.Work:  # fmt: skip
        work = super().start(move, tensor, other, channel, message)
        if self.links.clock.on_gpu:
            return work
        watched = self.links.watch(channel, work)
        noted = self.links.sent if channel[0] == self.rank else self.links.received
        noted[message].works.append(watched)
        return cast(dist.Work, watched)

    def receive(self, message: Action) -> Tensor:
        asked, end = self.links.clock.now(), self.links.received.get(message)
        is_there = end is not None and all(watched.is_completed() for watched in end.works)
        value = super().receive(message)
        here = self.links.received[message].over = self.links.clock.now()
        if not is_there:
            self.links.waits.append((f"{message} of rank {self.source_of[message]}", asked, here))
        return value

    def shards(self, stages: Mapping[int, StageShards]) -> dict[int, StageShards]:
        """The same shards, noted."""
        return {stage: RecordedShards(shards, stage, self.links) for stage, shards in stages.items()}


class RecordedShards(StageShards):
    """A stage's shards, whose gathers and reductions are noted. It shares the modules of those that it stands for."""

    def __init__(self, shards: StageShards, stage: int, links: LinkLog) -> None:
        self.modules, self.handles, self.stage, self.links = shards.modules, shards.handles, stage, links

    def unshard(self) -> None:
        end = End(f"unshard{self.stage}", -1, self.links.clock.now())
        super().unshard()
        if not self.links.clock.on_gpu:
            end.works = [self.links.watch("shards", work) for work in self.gathers()]
        self.links.shards.append(end)

    def gathers(self) -> list[dist.Work]:
        """The collectives that `unshard` has begun."""
        results = [group._all_gather_result for module in self.modules for group in parameter_groups(module)]
        works = [result.all_gather_work for result in results if result is not None]
        return [work for work in works if work is not None]

    def ready(self) -> None:
        if not self.handles:
            return
        asked = self.links.clock.now()
        super().ready()
        here = self.links.clock.now()
        self.links.waits.append((f"unshard{self.stage}", asked, here))
        next(end for end in reversed(self.links.shards) if end.name == f"unshard{self.stage}").over = here

    def reduce(self) -> None:
        """Over Gloo FSDP2 has no reduction that goes on beside the computation: the rank stands still."""
        begun = self.links.clock.now()
        super().reduce()
        if self.links.clock.on_gpu:
            return
        over = self.links.clock.now()
        self.links.shards.append(End(f"reduce{self.stage}", -1, begun, over=over))
        self.links.waits.append((f"reduce{self.stage}", begun, over))


def gather_timeline(
    schedule: Schedule, clock: Clock, group: dist.ProcessGroup, links: LinkLog | None = None
) -> Timeline:  # fmt: skip
    """All ranks' spans of the last run, on every rank, and what their links did where that was noted: seconds since the
    first of them. For ranks of one machine."""
    rows: list[tuple[list[Span], Moves | None]] = [([], None)] * schedule.ranks
    dist.all_gather_object(rows, (clock.spans(), None if links is None else links.moves(clock)), group=group)
    moves = [noted for _, noted in rows if noted is not None]
    traffic = on_links(moves) if moves else []
    zero = min([row[0].start for row, _ in rows if row] + [entry.start for row in traffic for entry in row])
    spans = [[Span(span.step, span.start - zero, span.end - zero) for span in row] for row, _ in rows]
    traffic = [[since(zero, entry) for entry in row] for row in traffic]
    return Timeline(schedule, spans, [peak(schedule, row) for row in spans], traffic)


def on_links(moves: Sequence[Moves]) -> list[list[Traffic]]:
    """Both ends of every message, in each rank's lanes.

    As in the simulation a message is on its way from the moment in which it was posted on both ends and the one before
    it had come, until it was through: on the reader's end when it was there, on the sender's when it had left.
    """
    traffic = [list(noted.own) for noted in moves]
    free: dict[Channel, float] = {}
    for rank, noted in enumerate(moves):
        for message, (source, opened, there) in noted.received.items():
            _, posted, left = moves[source].sent[message]
            channel = (source, rank)
            start = min(max(posted, opened, free.get(channel, posted)), there)
            free[channel] = there
            left = there if left is None else max(left, start)
            traffic[source].append(
                Traffic("send", f"{message} to rank {rank}", start, left, message, rank, posted)
            )  # fmt: skip
            traffic[rank].append(
                Traffic("receive", f"{message} of rank {source}", start, there, message, source, opened)
            )  # fmt: skip
    return [sorted(row, key=lambda entry: entry.start) for row in traffic]


def since(zero: float, entry: Traffic) -> Traffic:
    """The same, in seconds since `zero`."""
    posted = None if entry.posted is None else entry.posted - zero
    return Traffic(entry.lane, entry.name, entry.start - zero, entry.end - zero, entry.message, entry.peer, posted)
