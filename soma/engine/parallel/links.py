"""What the ranks of one model say to each other while they compute: sums within a stage, hidden states to the next
stage, logits to rank 0.

Sends do not wait. Hidden states and logits have a process group each: with NCCL the operations of one group happen in
order, and a stage that must hand out logits before it takes the next hidden states would wait for a rank 0 that hands
out hidden states before it takes logits.
"""

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from soma.model.shard import Shard

# Rank 0 watches its ranks and the clock; this is only for what it cannot see, such as a wrong port.
TIMEOUT = datetime.timedelta(minutes=60)


def join(shard: Shard, port: int, device: torch.device) -> None:
    """Enter the process group of all ranks, whose store rank 0 has opened on this machine at `port`."""
    store = dist.TCPStore("127.0.0.1", port, shard.world_size, False, timeout=TIMEOUT)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=shard.rank, world_size=shard.world_size, timeout=TIMEOUT)


class Links:
    """One rank's connections; the process group is there already, and every rank makes its `Links` at the same time."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        stages = [range(first, first + shard.tensors) for first in range(0, shard.world_size, shard.tensors)]
        groups = [dist.new_group(list(ranks)) for ranks in stages]
        self.stage, self.logits = groups[shard.stage], dist.new_group(list(range(shard.world_size)))
        self.sending: list[tuple[Any, Tensor]] = []  # a tensor must live until it is sent

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the tensor ranks of this stage, in place."""
        if self.shard.tensors > 1:
            dist.all_reduce(x, group=self.stage)
        return x

    def to_next(self, x: Tensor) -> None:
        """Send hidden states to the same place in the next stage."""
        self._send(x, self.shard.rank + self.shard.tensors, None)

    def from_before(self, x: Tensor) -> Tensor:
        """Hidden states of the stage before, into `x`."""
        dist.recv(x, self.shard.rank - self.shard.tensors)
        return x

    def give_logits(self, logits: Tensor) -> None:
        """Send logits to rank 0."""
        self._send(logits, 0, self.logits)

    def take_logits(self, logits: Tensor, rank: int) -> Tensor:
        """Logits of a rank of the last stage, into `logits`."""
        dist.recv(logits, rank, group=self.logits)
        return logits

    def _send(self, x: Tensor, rank: int, group: Any) -> None:
        x = x.contiguous()
        self.sending.append((dist.isend(x, rank, group=group), x))

    def sent(self) -> None:
        """Wait until all that was sent is out."""
        for work, _ in self.sending:
            work.wait()
        self.sending.clear()
