"""What takes the place of an all-to-all on one machine: copies of the same rows, over other hardware each.

Each is a `soma.train.parallel.exchange.Exchange`; P and Q are the rows that leave and arrive, D their width, R ranks, E
experts of a rank.
"""

from typing import Any

import torch
from torch import Tensor


class CopyExchange:
    """Copies on one device in place of an all-to-all between `ranks` ranks that are all like this one.

    Every rank sends what this one sends, so what arrives is as large as what leaves, and here it is what leaves. The
    result is that of experts of which number e of every rank has the weights of number e of this one. For one GPU: it
    shows what an exchange of this size costs beside computation, without a network.

    passes: how often the rows are copied: a network is slower than memory.
    """

    def __init__(self, ranks: int, passes: int = 1) -> None:
        assert passes > 0
        self.ranks, self.passes = ranks, passes

    def counts(self, sent_RE: Tensor) -> Tensor:
        return sent_RE.clone()

    def rows(self, x_PD: Tensor, to_R: list[int], from_R: list[int]) -> tuple[Tensor, None]:
        assert sum(to_R) == sum(from_R) == len(x_PD), (to_R, from_R, x_PD.shape)
        out_QD = torch.empty_like(x_PD)
        for _ in range(self.passes):
            out_QD.copy_(x_PD)
        return out_QD, None


class NoExchange(CopyExchange):
    """Nothing is moved: the time of the computation alone."""

    def rows(self, x_PD: Tensor, to_R: list[int], from_R: list[int]) -> tuple[Tensor, None]:
        return x_PD, None


class FewProcessors(CopyExchange):
    """Copies by a kernel that has some of a GPU's multiprocessors and leaves the others to the computation."""

    def __init__(self, ranks: int, passes: int, processors: int) -> None:
        super().__init__(ranks, passes)
        self.processors, self.kernel = processors, few_kernel()

    def rows(self, x_PD: Tensor, to_R: list[int], from_R: list[int]) -> tuple[Tensor, None]:
        out_QD = torch.empty_like(x_PD)
        words, target = x_PD.view(-1).view(torch.int64), out_QD.view(-1).view(torch.int64)
        for _ in range(self.passes):
            self.kernel[(self.processors,)](words, target, words.numel(), BLOCK=8192, num_warps=16)
        return out_QD, None


def few_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def copy(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        for first in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
            place = first + tl.arange(0, BLOCK)
            tl.store(target + place, tl.load(source + place, mask=place < count), mask=place < count)

    return copy


class ThroughHost(CopyExchange):
    """Copies to the CPU's memory and back: copy engines, no multiprocessors."""

    def __init__(self, ranks: int) -> None:
        super().__init__(ranks)
        self.room = torch.empty(0)

    def rows(self, x_PD: Tensor, to_R: list[int], from_R: list[int]) -> tuple[Tensor, None]:
        if self.room.shape != x_PD.shape:
            self.room = torch.empty(x_PD.shape, dtype=x_PD.dtype, pin_memory=True)
        self.room.copy_(x_PD, non_blocking=True)
        return torch.empty_like(x_PD).copy_(self.room, non_blocking=True), None


class ThroughPeer(CopyExchange):
    """Copies to a second GPU and back, by the copy engines."""

    def __init__(self, ranks: int, peer: torch.device) -> None:
        super().__init__(ranks)
        self.room = torch.empty(0, device=peer)

    def rows(self, x_PD: Tensor, to_R: list[int], from_R: list[int]) -> tuple[Tensor, None]:
        if self.room.shape != x_PD.shape:
            self.room = torch.empty(x_PD.shape, dtype=x_PD.dtype, device=self.room.device)
        self.room.copy_(x_PD, non_blocking=True)
        return torch.empty_like(x_PD).copy_(self.room, non_blocking=True), None
