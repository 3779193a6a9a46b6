"""A microbatch as every stage of a pipeline gets it. B sequences, T positions."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from soma.data.loader import Batch
from soma.train import loss


@dataclass(frozen=True, eq=False)
class Microbatch:
    """What every stage gets from the loader of its own rank: integers (B, T), and `rows`, the positions of all B·T that
    have a target. None for positions, documents or rows: 0…T-1, one document, all positions. `stamps` name the tokens
    to dropout.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None = None
    document_ids: Tensor | None = None
    rows: Tensor | None = None
    stamps: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, rows: slice, device: torch.device, isolate: bool = True) -> Self:
        """Rows of a loader's batch; without `isolate` documents see each other."""

        def move(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else torch.from_numpy(array).to(device, non_blocking=True)

        tokens, targets = move(batch.tokens[rows]), move(batch.targets[rows])
        assert tokens is not None
        assert targets is not None
        kept = move(loss.kept_rows(batch.targets[rows]))
        stamps = None if batch.stamps is None else move(batch.stamps[rows])
        if not isolate:
            return cls(tokens, targets, rows=kept, stamps=stamps)
        return cls(tokens, targets, move(batch.positions[rows]), move(batch.document_ids[rows]), kept, stamps)
