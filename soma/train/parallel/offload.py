"""Training with parameters, gradients and optimizer state in the CPU's memory (`layout: cpu_offload`).

As ZeRO-Offload (arXiv:2101.06840), by FSDP2's `CPUOffloadPolicy`: a layer's parameters come to the GPU for its forward
and for its backward pass, its gradients go back while the next one computes, and the optimizer is the CPU's. `shard`
applies it, `start` fills the CPU's memory in place of the GPU's; here is what it needs around it.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soma.base import machine
from soma.base.errors import UserError
from soma.train.parallel.config import Layout
from soma.train.parallel.matrices import local_part


@contextmanager
def offloading(layout: Layout, device_type: str) -> Iterator[None]:
    """Around a run whose layout may offload. FSDP2 wants a process group, so a process alone gets one for this time,
    with a back end for either memory; and the optimizer gets the processors. Raises UserError without a GPU.
    """
    if not layout.cpu_offload:
        yield
        return
    if device_type != "cuda":
        raise UserError("layout: cpu_offload takes weights off a GPU, and this run has none: leave it out")
    threads, alone = torch.get_num_threads(), not dist.is_initialized()
    torch.set_num_threads(optimizer_threads(machine.cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if alone:
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if alone:
            dist.destroy_process_group()


def optimizer_threads(cores: int, ranks: int) -> int:
    """Threads of one of `ranks` on a machine with `cores`. (`torchrun` gives each rank one: an update of a billion
    parameters then takes seconds.) Worked number: 8 ranks on 96 cores: 12."""
    return max(1, cores // ranks)


class Sums:
    """Gradients of the microbatches of a step, added up in the CPU's memory by its processors.

    Left to FSDP2, a second microbatch's gradients are copied through memory that is not page-locked, one tensor at a
    time, and added while the GPU waits. So what a microbatch leaves is taken away before the next one's backward pass.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.sums: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Add what the last backward pass has left, and leave nothing."""
        fresh = {p: p.grad for p in self.parameters if p.grad is not None}
        again = [p for p in fresh if p in self.sums]
        if again:
            torch._foreach_add_([local_part(self.sums[p]) for p in again], [local_part(fresh[p]) for p in again])
        self.sums = fresh | self.sums
        for parameter in fresh:
            parameter.grad = None

    def give(self) -> None:
        """Put the sums where the optimizer looks for gradients."""
        if not self.sums:  # one microbatch: they are there
            return
        self.take()
        for parameter, total in self.sums.items():
            parameter.grad = total
        self.sums = {}
