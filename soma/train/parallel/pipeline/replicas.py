"""Parameters that lie on more than one rank of a pipeline: their gradients are summed, their norms count once."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from soma.train.parallel.groups import make_groups
from soma.train.parallel.norm import scale_gradients, total_norm
from soma.train.parallel.pipeline.schedule import Schedule
from soma.train.parallel.pipeline.stage import holders

BUCKET = 64 * 2**20  # bytes that are summed at a time


class Replicas:
    """Who holds what. `model` is the part of this rank."""

    def __init__(
        self, model: nn.Module, schedule: Schedule, layers: Sequence[Sequence[int]], group: dist.ProcessGroup,
        tied: bool,
    ) -> None:  # fmt: skip
        self.model, self.schedule, self.layers, self.tied = model, schedule, layers, tied
        self.group, self.rank = group, dist.get_rank(group)
        shared = {self.holders(name) for name, _ in model.named_parameters()}
        members = {
            ranks: tuple(sorted(dist.get_global_rank(group, rank) for rank in ranks))
            for ranks in shared
            if len(ranks) > 1
        }
        groups = make_groups(members.values())
        self.groups = {ranks: groups[members[ranks]] for ranks in sorted(members)}

    def holders(self, name: str) -> tuple[int, ...]:
        """The ranks that have a parameter or buffer."""
        return holders(self.schedule, self.layers, name, self.tied)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give every copy of a parameter the sum of the copies' gradients."""
        if not self.groups:
            return
        shared = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and len(self.holders(name)) > 1:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                shared[name] = parameter.grad
        self.sum_tensors(shared)

    @torch.no_grad()
    def sum_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Sum tensors, named like parameters or buffers, in place over those who have them."""
        for ranks, group in self.groups.items():
            bucket: list[Tensor] = []
            for name, tensor in tensors.items():
                if self.holders(name) == ranks:
                    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                    full = sum(other.nbytes for other in bucket) >= BUCKET
                    if bucket and (full or own.dtype != bucket[0].dtype):
                        sum_together(bucket, group)
                        bucket = []
                    bucket.append(own)
            if bucket:
                sum_together(bucket, group)

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """Clip the norm of all gradients over all ranks; returns it as it was. Each parameter counts once."""
        named = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        own = [parameter for name, parameter in named.items() if self.holders(name)[0] == self.rank]
        if own:
            norm = total_norm(own, self.group)
        else:  # all of this rank's are copies
            norm = torch.zeros((), device=next(self.model.parameters()).device)
            dist.all_reduce(norm, group=self.group)
            norm = norm.sqrt()
        scale_gradients(list(named.values()), norm, limit)
        return norm


def sum_together(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """One all-reduce for several tensors of a dtype, in place."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
