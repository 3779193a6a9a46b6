"""Weights that are cut over ranks, used by modules that know nothing of it; and the collectives of Megatron.

A cut weight is a DTensor in the module's parameter list (so checkpoints, norms and optimizers know the whole), but the
module's own code, `self.weight`, sees this rank's piece as a plain tensor. All communication is then explicit: `enter`
before a block and `leave` after it (the f and g of Megatron-LM, arXiv:1909.08053, figure 3; with sequence parallelism
those of arXiv:2205.05198, figure 5).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

View = Callable[[Tensor], Tensor]
_classes: dict[type[nn.Module], type[nn.Module]] = {}


def cut(module: nn.Module, name: str, mesh: DeviceMesh, placements: Sequence[Placement], partial: bool = False,
        view: View | None = None) -> None:  # fmt: skip
    """Replace a parameter, the same whole tensor on all ranks, by this rank's piece of it, as a DTensor.

    `partial`: ranks that hold the same piece (Replicate) use it for different parts of a sum, so its gradient is the
    sum over them; else each of them computes the whole gradient. `view`: what the module's code sees of the piece.
    """
    whole = module._parameters[name]
    assert whole is not None
    piece = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)
    module._parameters[name] = nn.Parameter(piece, requires_grad=whole.requires_grad)
    if not isinstance(module, Localized):
        module.__class__ = local_class(type(module))
        module.__dict__["local_views"] = {}
    module.__dict__["local_views"][name] = (len(placements), partial, view)


def local_class(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` as a class whose parameters may be cut."""
    if kind not in _classes:
        _classes[kind] = type(f"Localized{kind.__name__}", (Localized, kind), {})
    return _classes[kind]


class Localized(nn.Module):
    """Mixed into a module's class by `cut`: its DTensor parameters read as this rank's pieces."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if not isinstance(value, DTensor):
            return value
        axes, partial, view = self.__dict__["local_views"][name]
        if len(value.placements) != axes:  # cut further by FSDP, which asks for it between two uses
            return value
        grads: list[Placement] = list(value.placements)
        if partial:
            grads = [Partial() if isinstance(placement, Replicate) else placement for placement in grads]
        piece = value.to_local(grad_placements=grads)
        return piece if view is None else view(piece)


def shard_offset(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """Start and size of a rank's piece of `length` rows, as DTensor cuts them. 10 over 4: (0,3) (3,3) (6,3) (9,1)."""
    size, start = Shard.local_shard_size_and_offset(length, ranks, rank)
    return int(start), int(size)


# --- Collectives that have a gradient. x is (B, T, …); along T sequence parallelism cuts. ---


class _Enter(torch.autograd.Function):
    """Forward: nothing, or gather along T. Backward: sum over the ranks, and with `gather` keep this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, gather: bool) -> Tensor:
        ctx.group, ctx.gather = group, gather
        return gather_sequence(x, group) if gather else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0]
        return (scatter_sequence(grad, ctx.group) if ctx.gather else summed(grad, ctx.group)), None, None


class _Leave(torch.autograd.Function):
    """Forward: sum over the ranks, and with `scatter` keep this rank's part along T. Backward: nothing, or gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, scatter: bool) -> Tensor:
        ctx.group, ctx.scatter = group, scatter
        return scatter_sequence(x, group) if scatter else summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return (gather_sequence(grads[0], ctx.group) if ctx.scatter else grads[0]), None, None


class _Sum(torch.autograd.Function):
    """Sum over the ranks in both directions: every rank's loss depends on every rank's x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return summed(grads[0], ctx.group), None


class _ScaleGradient(torch.autograd.Function):
    """The value as it is, its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def enter(x_BTD: Tensor, group: dist.ProcessGroup, gather: bool) -> Tensor:
    """Into a block whose ranks each compute a part of its sum. With `gather`, x is this rank's part of T."""
    return _Enter.apply(x_BTD, group, gather)


def leave(x_BTD: Tensor, group: dist.ProcessGroup, scatter: bool) -> Tensor:
    """Out of such a block: the sum of the parts. With `scatter`, this rank's part of T."""
    return _Leave.apply(x_BTD, group, scatter)


def sum_both_ways(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks; gradients are summed too."""
    return _Sum.apply(x, group)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient times `factor`."""
    return _ScaleGradient.apply(x, factor)


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A new tensor: the sum over the ranks."""
    out = x.contiguous().clone()
    dist.all_reduce(out, group=group)
    return out


def gather_sequence(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts of T one after the other: (B, T·ranks, …)."""
    ranks = dist.get_world_size(group)
    x = x_BTD.contiguous()
    out = x.new_empty(ranks, *x.shape)
    dist.all_gather_into_tensor(out.view(-1), x.view(-1), group=group)
    return out.transpose(0, 1).reshape(x.size(0), ranks * x.size(1), *x.shape[2:])


def scatter_sequence(x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of T of the sum over the ranks: (B, T/ranks, …)."""
    ranks = dist.get_world_size(group)
    B, T = x_BTD.shape[:2]
    parts = x_BTD.reshape(B, ranks, T // ranks, *x_BTD.shape[2:]).transpose(0, 1).contiguous()
    out = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_tensor(out.view(-1), parts.view(-1), group=group)
    return out
