"""The processes that train together. With one process every function here is the identity."""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """This process's rank among `size` data-parallel processes (a process group must be there when size > 1)."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and models."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum of `value` over all ranks."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def sum_int(self, value: int, device: torch.device) -> int:
        """Sum of a number over all ranks; `device` is where the process group works."""
        return value if self.size == 1 else int(self.sum(torch.tensor(value, device=device)))

    def agree(self, value: Value) -> Value:
        """Rank 0's `value` on every rank: decisions that rest on a clock are made once."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def reduce_gradients(model: nn.Module, world: World) -> None:
    """Sum the gradients over the ranks; each rank's loss is already divided by the global count."""
    if world.size == 1:
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
