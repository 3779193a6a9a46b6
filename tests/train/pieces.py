"""Whole tensors on rank 0 out of the pieces that the ranks hold, in one exchange, and whether all replicas are alike.

Nothing of it is the product's own way to bring tensors together: a piece lies where its placements say, and what
several ranks hold has to be the same to the last bit.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from soma.train.parallel.matrices import local_part

Piece = tuple[tuple[int, ...], np.ndarray]  # where it starts, and its numbers


def piece_of(tensor: Tensor) -> Piece:
    """What this rank holds of a tensor, in float32 on the CPU."""
    local = local_part(tensor).detach().to("cpu", torch.float32, copy=True)
    if not isinstance(tensor, DTensor):
        return (0,) * local.ndim, local.numpy()
    assert not any(isinstance(placement, Partial) for placement in tensor.placements), "not summed yet"
    _, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(start), local.numpy()


def collect(own: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> tuple[dict[str, Tensor], list[str]]:
    """On rank 0 all tensors of `shapes`, whole, and the names of those whose replicas are not alike; elsewhere nothing.
    `own`: what this rank has of them. All ranks call it together. What no rank has is NaN."""
    everyone = [{name: piece_of(tensor) for name, tensor in own.items() if name in shapes}]
    if dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
        mine, everyone = everyone[0], [{} for _ in range(ranks)]
        dist.gather_object(mine, everyone if dist.get_rank() == 0 else None)
        if dist.get_rank() != 0:
            return {}, []
    pieces = {name: [theirs[name] for theirs in everyone if name in theirs] for name in shapes}
    together = {name: put_together(pieces[name], shape) for name, shape in shapes.items()}
    return {name: tensor for name, (tensor, _) in together.items()}, [
        name for name, (_, is_alike) in together.items() if not is_alike
    ]


def put_together(pieces: Iterable[Piece], shape: torch.Size) -> tuple[Tensor, bool]:
    """The whole tensor, and whether pieces of the same place are the same."""
    whole, is_alike = np.full(shape, np.nan, np.float32), True
    for start, piece in pieces:
        place = tuple(slice(first, first + length) for first, length in zip(start, piece.shape, strict=True))
        if piece.size:
            is_alike &= bool(np.isnan(whole[place]).all()) or np.array_equal(whole[place], piece)
            whole[place] = piece
    return torch.from_numpy(whole), is_alike
