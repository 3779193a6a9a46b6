"""Whole matrices out of cut ones, for an optimizer that must see them whole (Muon).

Every rank holds a rectangle of each matrix. The matrices are dealt out to the ranks; each rank collects its own, works
on them, and sends every rank its rectangle of the result: two all-to-all exchanges in which each number travels once.
Gathering all matrices everywhere would send each number to every rank, and repeat the work there.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from soma.train.parallel.groups import Ranks, make_groups

Box = tuple[tuple[int, ...], tuple[int, ...]]  # a rank's rectangle: its shape, and where it starts
Work = Callable[[Tensor], Tensor]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's piece of a tensor that may be cut, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_as(tensor: Tensor) -> tuple[Any, ...]:
    """How a tensor is cut: mesh and placements; () if it is whole."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()


class WholeMatrices:
    """Runs work on whole matrices that are cut over ranks. It remembers rectangles from call to call.

    parameters: all that it will be asked for. All ranks of the world must make one together.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        cut = [each for each in parameters if isinstance(each, DTensor) and not whole_matrices(each)]
        self.groups = make_groups(sharers(each.device_mesh, cut_axes(each)) for each in cut if len(cut_axes(each)) > 1)
        self.boxes: dict[Any, list[Box]] = {}

    def map(self, work: Work, parameters: Sequence[Tensor], directions: Sequence[Tensor]) -> Sequence[Tensor]:
        """`work` on `directions`: this rank's pieces of tensors that are cut as `parameters` are.

        All parameters have one shape and are cut alike: (M, N) matrices or (E, M, N) stacks. `work` takes and gives
        (…, M, N). Returns this rank's pieces of the results. All ranks of their mesh must call it together.
        """
        first = parameters[0]
        if not isinstance(first, DTensor) or whole_matrices(first):
            return work(torch.stack(list(directions))).unbind()
        axes = cut_axes(first)
        mesh = first.device_mesh
        group = mesh.get_group(axes[0]) if len(axes) == 1 else self.groups[sharers(mesh, axes)]
        boxes = self.rectangles(first, group)
        ranks = dist.get_world_size(group)
        owned = [range(owner, len(directions), ranks) for owner in range(ranks)]
        wholes = collect(directions, owned, boxes, tuple(first.shape), group)
        results = work(wholes) if len(wholes) else wholes
        return spread(results, owned, boxes, group)

    def rectangles(self, tensor: DTensor, group: dist.ProcessGroup) -> list[Box]:
        """Each rank's rectangle of a tensor that is cut like this one."""
        key = (tuple(tensor.shape), *cut_as(tensor))
        if key not in self.boxes:
            mine = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            boxes: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(boxes, mine, group=group)
            self.boxes[key] = boxes
        return self.boxes[key]


def sharers(mesh: DeviceMesh, axes: tuple[int, ...]) -> Ranks:
    """This rank and all that differ from it along `axes` of a mesh."""
    lines = mesh.mesh.movedim(axes, tuple(range(-len(axes), 0))).flatten(-len(axes))
    return next(tuple(line) for line in lines.reshape(-1, lines.size(-1)).tolist() if dist.get_rank() in line)


def whole_matrices(tensor: DTensor) -> bool:
    """Whether a rank's piece is made of whole matrices: only the first dimension of an (E, M, N) stack is cut."""
    return tuple(tensor.to_local().shape[-2:]) == tuple(tensor.shape[-2:]) and all(
        isinstance(placement, Replicate) or (tensor.ndim > 2 and getattr(placement, "dim", 0) == 0)
        for placement in tensor.placements
    )


def cut_axes(tensor: DTensor) -> tuple[int, ...]:
    """The dimensions of its mesh that a tensor is cut along."""
    return tuple(axis for axis, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate))


def collect(
    pieces: Sequence[Tensor], owned: Sequence[range], boxes: Sequence[Box], shape: tuple[int, ...],
    group: dist.ProcessGroup,
) -> Tensor:  # fmt: skip
    """The whole tensors that this rank owns, (owned, *shape), from all ranks' pieces."""
    rank = dist.get_rank(group)
    mine = owned[rank]
    sent = torch.cat([pieces[index].reshape(-1) for indices in owned for index in indices])
    counts = [len(indices) * pieces[0].numel() for indices in owned]
    sizes = [len(mine) * _numel(box) for box in boxes]
    got = exchange(sent, counts, sizes, group)
    wholes = sent.new_empty(len(mine), *shape)
    for box, part in zip(boxes, got.split(sizes), strict=True):
        region(wholes, box).copy_(part.view(len(mine), *box[0]))
    return wholes


def spread(wholes: Tensor, owned: Sequence[range], boxes: Sequence[Box], group: dist.ProcessGroup) -> list[Tensor]:
    """This rank's pieces of all tensors, from their owners: the way back of `collect`."""
    rank = dist.get_rank(group)
    sent = torch.cat([region(wholes, box).reshape(-1) for box in boxes])
    counts = [len(owned[rank]) * _numel(box) for box in boxes]
    shape, _ = boxes[rank]
    sizes = [len(indices) * _numel(boxes[rank]) for indices in owned]
    got = exchange(sent, counts, sizes, group)
    pieces: dict[int, Tensor] = {}
    for indices, part in zip(owned, got.split(sizes), strict=True):
        pieces |= dict(zip(indices, part.view(len(indices), *shape).unbind(), strict=True))
    return [pieces[index] for index in range(len(pieces))]


def exchange(sent: Tensor, counts: list[int], sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all of a flat tensor: `counts` numbers to each rank, `sizes` from each."""
    got = sent.new_empty(sum(sizes))
    dist.all_to_all_single(got, sent, sizes, counts, group=group)
    return got


def region(wholes: Tensor, box: Box) -> Tensor:
    """The view of a rectangle in each of a stack of tensors."""
    for dimension, (size, start) in enumerate(zip(*box, strict=True)):
        wholes = wholes.narrow(dimension + 1, start, size)
    return wholes


def _numel(box: Box) -> int:
    size = 1
    for length in box[0]:
        size *= length
    return size
