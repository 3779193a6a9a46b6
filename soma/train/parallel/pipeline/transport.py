"""Point-to-point transfers of a pipeline over `torch.distributed`."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from soma.train.parallel import watch
from soma.train.parallel.groups import make_groups
from soma.train.parallel.pipeline.schedule import Action, Schedule, Transfer
from soma.train.parallel.pipeline.transfers import Channel, sends


class Transport:
    """One rank's ends of all channels of a lowered schedule.

    Sends are asynchronous and keep their tensor alive until it is known to have left. Gloo tells that only to who
    waits, so between CPUs that is the end of the step. Receives are posted where the schedule has them, into buffers
    made by `buffer(microbatch)`: what comes over a wire has that shape.

    groups: of each channel, from `open_channels`; None: `group` for all.
    when_needed: post no receive before it is needed. Between GPUs: a posted receive is a kernel that waits there, and
    CUDA loads a kernel that is new (another shape of a product is enough) only when no other runs, so the one that
    waits for this rank's next message would keep this rank from making it.
    """

    def __init__(
        self, schedule: Schedule, group: dist.ProcessGroup, buffer: Callable[[int], Tensor],
        groups: Mapping[Channel, dist.ProcessGroup] | None = None, *, when_needed: bool = False,
    ) -> None:  # fmt: skip
        self.group, self.buffer, self.rank = group, buffer, dist.get_rank(group)
        self.orders = sends(schedule)
        self.groups = dict.fromkeys(self.orders, group) if groups is None else groups
        self.number = {
            (channel, message): place for channel, order in self.orders.items() for place, message in enumerate(order)
        }
        self.source_of = {
            message: source for (source, reader), order in self.orders.items() if reader == self.rank
            for message in order
        }  # fmt: skip
        self.when_needed = when_needed
        self.sending: deque[tuple[dist.Work, Tensor, int]] = deque()
        self.posted: dict[Action, tuple[dist.Work, Tensor]] = {}
        self.put_off: dict[int, deque[Action]] = {source: deque() for source in self.source_of.values()}

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
        work = self.start(dist.irecv, buffer, sender, channel, message)
        self.posted[message] = (work, buffer)
        watch.received[sender] += self.when_needed

    def start(
        self, move: Callable[..., Any], tensor: Tensor, other: int, channel: Channel, message: Action
    ) -> dist.Work:  # fmt: skip
        """Begin one end of a message."""
        return start(move, tensor, other, self.groups[channel], self.number[channel, message])

    def receive(self, message: Action) -> Tensor:
        """What `message` names, as soon as it is here. Raises RuntimeError, with who waits for what, on a time-out."""
        source = self.source_of[message]
        while message not in self.posted:
            self.post(self.put_off[source].popleft(), source)
        work, buffer = self.posted.pop(message)
        try:
            with watch.waiting(dist.get_global_rank(self.group, source), f"the receipt of {message}"):
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
        work = self.start(dist.isend, value, target, channel, message)
        self.sending.append((work, value, target))
        watch.sent[target] += self.when_needed

    def finish(self) -> None:
        """All has left and all has come."""
        assert not self.posted, f"never read: {[str(message) for message in self.posted]}"
        while self.sending:
            work, _, target = self.sending.popleft()
            with watch.waiting(target, "the sending of a microbatch"):
                work.wait()


def start(move: Callable[..., Any], tensor: Tensor, other: int, group: dist.ProcessGroup, tag: int) -> dist.Work:
    """Begin a send or a receive. Over NCCL as a batch of one: alone it would make the group a second communicator."""
    if tensor.is_cuda:
        return dist.batch_isend_irecv([dist.P2POp(move, tensor, other, group, tag)])[0]
    work: dist.Work | None = move(tensor, other, group=group, tag=tag)
    assert work is not None
    return work


def open_channels(
    schedule: Schedule, group: dist.ProcessGroup, device: torch.device
) -> dict[Channel, dist.ProcessGroup]:  # fmt: skip
    """A process group for each of this rank's channels; all ranks of the world call it together.

    No two directions share one. What is started on one communicator of NCCL runs in that order, so they would wait for
    each other. Gloo's thread, when it wakes for a message while the rank's own holds the lock of their connection,
    does not wait but asks again: where both are on one core, until its time slice of some milliseconds is over. So a
    connection of ours carries messages in one direction alone, and all that comes back are the receives.
    """
    rank = dist.get_rank(group)
    mine = [channel for channel in sorted(sends(schedule)) if rank in channel]
    if device.type == "cuda":
        return open_gpu_channels(mine, group)
    everyone = tuple(dist.get_global_rank(group, rank) for rank in range(dist.get_world_size(group)))
    down, up = (make_groups([everyone], "gloo")[everyone] for _ in range(2))
    return {(source, target): up if source < target else down for source, target in mine}


def open_gpu_channels(mine: Sequence[Channel], group: dist.ProcessGroup) -> dict[Channel, dist.ProcessGroup]:
    """Communicators of two ranks. Each is used once, in an order that is the same everywhere: that connects its ranks,
    which a rank must not wait for in the middle of a step.
    """
    rank = dist.get_rank(group)
    ends = {channel: tuple(dist.get_global_rank(group, end) for end in channel) for channel in mine}
    groups = {
        is_up: make_groups((tuple(sorted(pair)) for pair in ends.values() if (pair[0] < pair[1]) == is_up), "nccl")
        for is_up in (True, False)
    }
    found = {}
    for channel in mine:
        source, target = ends[channel]
        found[channel] = groups[source < target][min(source, target), max(source, target)]
        word = torch.zeros(1, device=torch.device("cuda", torch.cuda.current_device()))
        move, other = (dist.isend, target) if channel[0] == rank else (dist.irecv, source)
        start(move, word, other, found[channel], 0).wait()
    torch.cuda.synchronize()
    return found
