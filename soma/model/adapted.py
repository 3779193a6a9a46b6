"""Linear layers over which every row of a batch may have another adapter: many tuned models on one base at once.

A step's rows lie sorted by adapter, so that each adapter has one segment of them (Punica's SGMV, arXiv:2310.18547).
`adapters` says which, around a forward pass; outside of it a layer is its base. Measured on one CPU thread, 16 rows of
2,048 and three adapters of rank 16: 35 µs for slices, 62 for the same rows gathered by index, 78 for all adapters
stacked with a mask, 515 for a gathered A and B per row; the base's product takes 1,868.

Shape letters: K inputs of a layer, N outputs, R rank, T rows.
"""

# ruff: noqa: N815  (names carry their shape)

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LowRank:
    """An update of one layer: scale · B A."""

    a_RK: Tensor
    b_NR: Tensor
    scale: float


class Segment(NamedTuple):
    """Rows `first` to `end` have the adapter in this slot."""

    slot: int
    first: int
    end: int


segments: ContextVar[Sequence[Segment]] = ContextVar("segments", default=())  # a thread's own


@contextmanager
def adapters(chosen: Sequence[Segment]) -> Iterator[None]:
    """Rows of the forward passes inside have these adapters, those in no segment none."""
    before = segments.set(chosen)
    try:
        yield
    finally:
        segments.reset(before)


class AdaptedLinear(nn.Module):
    """base(x), plus the update of the row's adapter. `updates`: slot → (A (R, K), scale · B (N, R))."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.updates: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def weight(self) -> Tensor:
        """The base's."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        return self.adapt(x, self.base(x))

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the updates for x (…, K) to y (…, N), in place. Leading dimensions together are the rows."""
        for first, end, a_RK, b_NR in self.chosen():
            x_TK, y_TN = x.flatten(0, -2)[first:end], y.flatten(0, -2)[first:end]
            y_TN += F.linear(F.linear(x_TK, a_RK), b_NR)
        return y

    def chosen(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """First row, end, A and scale · B of each segment whose adapter changes this layer."""
        for slot, first, end in segments.get():
            update = self.updates.get(slot)
            if update is not None:
                yield first, end, *update


def adapt(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """y = base(x), made elsewhere, with the updates of a layer that has them."""
    return layer.adapt(x, y) if isinstance(layer, AdaptedLinear) else y
