"""The global gradient norm where parameters are cut over ranks in several ways."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from soma.train.parallel.matrices import local_part


def cut_axes(tensor: Tensor) -> tuple[object, ...]:
    """The mesh and its dimensions that a tensor is cut along (its pieces there are different); () if it is whole."""
    if not isinstance(tensor, DTensor):
        return ()
    assert not any(isinstance(placement, Partial) for placement in tensor.placements), "a gradient is not summed yet"
    axes = tuple(axis for axis, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate))
    return (tensor.device_mesh, axes) if axes else ()


@torch.no_grad()
def total_norm(parameters: Iterable[nn.Parameter], stages: dist.ProcessGroup | None = None) -> Tensor:
    """The 2-norm of all gradients together, 0-d float32, the same on all ranks.

    Each piece is counted once: squares are summed over the ranks that hold different pieces, one all-reduce for each
    way of cutting, and at last over `stages` (pipeline ranks, which hold different layers).
    """
    pieces: dict[tuple[object, ...], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            pieces.setdefault(cut_axes(parameter.grad), []).append(local_part(parameter.grad))
    total: Tensor | None = None
    for key, parts in pieces.items():
        square = sum_of_squares(parts)
        if key:
            mesh, axes = key
            for axis in axes:  # type: ignore[attr-defined]
                dist.all_reduce(square, group=mesh.get_group(axis))  # type: ignore[attr-defined]
        total = square if total is None else total + square
    assert total is not None, "no parameter has a gradient"
    if stages is not None:
        dist.all_reduce(total, group=stages)
    return total.sqrt()


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of all numbers of some tensors, 0-d float32, in a few launches however many tensors there are."""
    full = [tensor for tensor in tensors if tensor.numel()]
    if not full:
        return torch.zeros((), device=tensors[0].device)
    return torch.stack(torch._foreach_norm(full, dtype=torch.float32)).square().sum()


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, stages: dist.ProcessGroup | None = None) -> Tensor:
    """Scale all gradients so that their norm is at most `limit`; returns the norm before, as `clip_grad_norm_` does."""
    norm = total_norm(parameters, stages)
    scale_gradients(parameters, norm, limit)
    return norm


@torch.no_grad()
def scale_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale gradients of the norm `norm` to one of at most `limit`, as `clip_grad_norm_` does."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    if factor.device.type == "cpu" and factor == 1.0:  # a GPU is not waited for, and multiplies by 1 in no time
        return
    torch._foreach_mul_([local_part(p.grad) for p in parameters if p.grad is not None and p.grad.numel()], factor)
