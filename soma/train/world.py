"""The processes that train together. With one process every function here is the identity."""

from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from soma.train.parallel.config import Layout
from soma.train.parallel.mesh import Mesh, make_mesh

Value = TypeVar("Value")
ALONE = Mesh(Layout(dp=1))


@dataclass(frozen=True)
class World:
    """This process's rank among `size` (a process group must be there when size > 1), and what each has of the work.

    The mesh says it; without one given, all is with one process.
    """

    rank: int = 0
    size: int = 1
    mesh: Mesh = ALONE

    @classmethod
    def join(cls, layout: Layout, device_type: str) -> "World":
        """The world of the default process group, laid out; raises UserError where the layout does not fit it."""
        size = dist.get_world_size() if dist.is_initialized() else 1
        mesh = make_mesh(layout.resolve(size), device_type)
        return cls(mesh.rank, size, mesh)

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and models."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the `data_size` equal shares of a batch's rows is this process's."""
        return self.mesh.data_rank

    @property
    def data_size(self) -> int:
        """Shares that a batch's rows are divided into."""
        return self.mesh.layout.data_ranks

    def sum(self, value: Tensor) -> Tensor:
        """Sum of `value` over all ranks that have different tokens."""
        group = self.mesh.group("tokens")
        if group is not None:
            dist.all_reduce(value, group=group)
        return value

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
