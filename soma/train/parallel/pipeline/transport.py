"""Point-to-point transfers of a pipeline over `torch.distributed`."""

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from soma.train.parallel.groups import make_groups
from soma.train.parallel.pipeline.schedule import Action, Schedule, Transfer
from soma.train.parallel.pipeline.transfers import sends
from soma.train.parallel.watch import waiting


class Transport:
    """One rank's ends of all channels of a lowered schedule.

    Sends are asynchronous and keep their tensor alive until it has left. Receives are posted where the schedule has
    them, into buffers made by `buffer(microbatch)`: what comes over a wire has that shape. Over NCCL every channel has
    a communicator of its own, since those of two directions on one would wait for each other. A posted receive is a
    kernel that waits there, and CUDA loads a kernel that is new only when no other runs: so the first step, in which
    most are new, posts each receive when it is needed.
    """

    def __init__(self, schedule: Schedule, group: dist.ProcessGroup, buffer: Callable[[int], Tensor]) -> None:
        self.group, self.buffer, self.rank = group, buffer, dist.get_rank(group)
        self.orders = sends(schedule)
        self.groups = dict.fromkeys(self.orders, group)
        self.number = {
            (channel, message): place for channel, order in self.orders.items() for place, message in enumerate(order)
        }
        self.source_of = {
            message: source for (source, reader), order in self.orders.items() if reader == self.rank
            for message in order
        }  # fmt: skip
        self.when_needed = dist.get_backend(group) == "nccl"
        if self.when_needed:
            self.open_channels()
        self.sending: deque[tuple[dist.Work, Tensor, int]] = deque()
        self.posted: dict[Action, tuple[dist.Work, Tensor]] = {}
        self.put_off: dict[int, deque[Action]] = {source: deque() for source in self.source_of.values()}

    def open_channels(self) -> None:
        """A communicator for each channel, used once in an order that is the same everywhere."""
        device = torch.device("cuda", torch.cuda.current_device())
        mine = [channel for channel in self.orders if self.rank in channel]
        ends = {channel: tuple(dist.get_global_rank(self.group, rank) for rank in channel) for channel in mine}
        groups = {
            is_up: make_groups((tuple(sorted(pair)) for pair in ends.values() if (pair[0] < pair[1]) == is_up), "nccl")
            for is_up in (True, False)
        }
        for channel in mine:
            source, target = ends[channel]
            self.groups[channel] = groups[source < target][min(source, target), max(source, target)]
            word = torch.zeros(1, device=device)
            move, other = (dist.isend, target) if channel[0] == self.rank else (dist.irecv, source)
            work = move(word, other, group=self.groups[channel])
            assert work is not None
            work.wait()
        torch.cuda.synchronize()

    def begin(self) -> None:
        """A new step."""
        assert not self.sending
        assert not self.posted

    def open(self, receive: Transfer) -> None:
        """Post a receive."""
        if self.when_needed:
            self.put_off[receive.peer].append(receive.message)
        else:
            self.post(receive.message, receive.peer)

    def post(self, message: Action, source: int) -> None:
        """Open a buffer for a message of the rank `source`."""
        channel = (source, self.rank)
        buffer = self.buffer(message.microbatch)
        sender = dist.get_global_rank(self.group, source)
        work = dist.irecv(buffer, sender, group=self.groups[channel], tag=self.number[channel, message])
        assert work is not None
        self.posted[message] = (work, buffer)

    def receive(self, message: Action) -> Tensor:
        """What `message` names, as soon as it is here. Raises RuntimeError, with who waits for what, on a time-out."""
        source = self.source_of[message]
        while message not in self.posted:
            self.post(self.put_off[source].popleft(), source)
        work, buffer = self.posted.pop(message)
        try:
            with waiting(dist.get_global_rank(self.group, source), f"the receipt of {message}"):
                work.wait()
        except RuntimeError as error:
            who = f"pipeline rank {self.rank} waits for {message} of rank {source}"
            raise RuntimeError(f"{who}: {error}") from error
        return buffer

    def send(self, message: Action, reader: int, value: Tensor) -> None:
        """Start a transfer; `value` must not change any more."""
        while self.sending and self.sending[0][0].is_completed():
            self.sending.popleft()
        channel = (self.rank, reader)
        value = value.contiguous()
        target = dist.get_global_rank(self.group, reader)
        work = dist.isend(value, target, group=self.groups[channel], tag=self.number[channel, message])
        assert work is not None
        self.sending.append((work, value, target))

    def finish(self) -> None:
        """All has left and all has come."""
        assert not self.posted, f"never read: {[str(message) for message in self.posted]}"
        while self.sending:
            work, _, target = self.sending.popleft()
            with waiting(target, "the sending of a microbatch"):
                work.wait()
        self.when_needed = False
