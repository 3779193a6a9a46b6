"""Tensors of which a rank has a run of elements, in row-major order, as DeepSpeed cuts them.

`torch.distributed.checkpoint` writes and reads rectangles, and a run of elements is a few of them: the end of a row,
whole rows, the beginning of a row. So a checkpoint of such tensors is as good as any other, for every other layout.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Run = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # first element and number of elements, offsets and sizes


def rectangles(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Run]:
    """The elements from `start` to `stop` of a tensor of `shape` as rectangles, in order; each is contiguous.

    Elements 2 to 10 of a (4, 3) matrix: (2, 1, (0, 2), (1, 1)), (3, 6, (1, 0), (2, 3)), (9, 1, (3, 0), (1, 1)).
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield start, stop - start, (start,)[: len(shape)], (stop - start,)[: len(shape)]
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:
        yield from within(last, start, stop, shape)
        return
    yield from within(first - 1, start, first * row, shape)
    if first < last:
        yield first * row, (last - first) * row, (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from within(last, last * row, stop, shape)


def within(index: int, start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Run]:
    """`rectangles` of elements that all lie in the row `index`."""
    before = index * prod(shape[1:])
    for at, count, offsets, sizes in rectangles(start - before, stop - before, shape[1:]):
        yield before + at, count, (index, *offsets), (1, *sizes)


class FlatPiece(Tensor):
    """A tensor of a whole one's shape of which this rank has `local`, the elements from `start` on (1-D). It takes part
    in checkpoints and nothing else."""

    local: Tensor
    start: int

    @staticmethod
    def __new__(cls, local: Tensor, start: int, shape: tuple[int, ...]) -> "FlatPiece":
        piece = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        piece.local, piece.start = local.detach(), start
        return piece

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} of a piece of a tensor")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FlatPiece({tuple(self.shape)}, {self.start} to {self.start + self.local.numel()})"

    def runs(self) -> Iterator[Run]:
        return rectangles(self.start, self.start + self.local.numel(), tuple(self.shape))

    # What follows is torch.distributed.checkpoint's protocol for tensors that are cut, which DTensor has as well.

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for _, _, offsets, sizes in self.runs()]

    def __create_write_items__(self, name: str, piece: "FlatPiece") -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD,
                      tensor_data=TensorWriteData(chunk, properties, self.shape))
            for chunk in self.__create_chunk_list__()
        ]  # fmt: skip

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for at, count, offsets, sizes in self.runs():
            if index.offset == torch.Size(offsets):
                return self.local.narrow(0, at - self.start, count).view(sizes)
        raise ValueError(f"{index} is not here")


def kept_piece(tensor: Tensor) -> Tensor:
    """A weight as a checkpoint takes it: where DeepSpeed's stage 3 has cut it, this rank's run of elements."""
    partition = getattr(tensor, "ds_tensor", None)
    return tensor.detach() if partition is None else kept_run(tensor, partition)


def kept_run(parameter: Any, partition: Tensor) -> FlatPiece:
    """This rank's `partition` of what has the shape of a parameter of DeepSpeed's stage 3. All ranks' partitions are of
    one size; the last ones are filled up."""
    total, size = parameter.ds_numel, partition.numel()
    start = min(parameter.ds_zero_partition_rank * size, total)
    return FlatPiece(partition.detach().view(-1)[: min(size, total - start)], start, tuple(parameter.ds_shape))
