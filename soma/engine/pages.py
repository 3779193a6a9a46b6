"""Memory that the processor looks up in steps of 2 MiB, for what a step reads from end to end: weights and the cache.

With pages of 4 KiB a decode step waits for page tables: a block of 16 tokens of one head is 2 KiB, and each lies
elsewhere. Linux gives large pages to those that ask (`transparent_hugepage`, `madvise`); elsewhere it is plain memory.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from soma.model.quantized import QuantizedLinear
from soma.model.transformer import Transformer

LARGE = 2 << 20
ALIGNMENT = 64


def zeros(shapes: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Zeros of these shapes and dtypes on the CPU, one behind the other; not real memory before they are written."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in shapes]
    steps = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    flat = allocate(sum(steps))
    found, start = [], 0
    for (shape, dtype), size, step in zip(shapes, sizes, steps, strict=True):
        found.append(flat[start : start + size].view(dtype).view(*shape))
        start += step
    return found


def allocate(nbytes: int) -> Tensor:
    """Zeros (nbytes), uint8."""
    if nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def gather(model: Transformer) -> None:
    """Move the rounded weights of a model on the CPU together, layer behind layer."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    tensors = [tensor for layer in layers for tensor in (layer.packed, layer.scales)]
    if not tensors or tensors[0].device.type != "cpu":
        return
    moved = iter(zeros([(tensor.shape, tensor.dtype) for tensor in tensors]))
    for layer in layers:  # one by one: the old memory is given back on the way
        layer.packed, layer.scales = next(moved).copy_(layer.packed), next(moved).copy_(layer.scales)
