"""What one step computes, as flat tensors: any mix of prompt chunks and single tokens of any number of sequences.

Shape letters: T new tokens of all sequences, S sequences, B blocks of the longest table, R rows of wanted logits.
"""

# ruff: noqa: N815  (names carry their shape)

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import torch
from torch import Tensor

from soma.model.adapted import Segment

ALIGNMENT = 64  # bytes, of each tensor in a packed transfer


@dataclass(frozen=True)
class Batch:
    """Tensors of one step, on the model's device, contiguous. Positions, slots and rows are int64, the others int32.

    Sequence s owns the tokens `query_starts_S1[s]` to `query_starts_S1[s + 1]`; after the step `lengths_S[s]` of its
    tokens are in the cache, these included, in the blocks `tables_SB[s]` (padded with 0). Token t goes to
    `slots_T[t]` = block · block size + place in the block.
    """

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64
    query_starts_S1: Tensor  # int32
    lengths_S: Tensor  # int32
    tables_SB: Tensor  # int32
    slots_T: Tensor  # int64
    logit_rows_R: Tensor  # int64
    block_size: int
    longest_query: int  # most new tokens of one sequence
    longest: int  # most tokens of one sequence in the cache
    adapters: tuple[Segment, ...] = ()  # of the tokens; those in no segment have none
    row_adapters: tuple[Segment, ...] = ()  # of the rows of logits

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.numel()

    @property
    def num_sequences(self) -> int:
        return self.lengths_S.numel()


def make_batch(
    tokens: Iterable[Sequence[int]], starts: Sequence[int], counts: Sequence[int], tables: Sequence[np.ndarray],
    logit_rows: np.ndarray, block_size: int, device: torch.device | str = "cpu",
    adapters: Sequence[int | None] = (),
) -> Batch:  # fmt: skip
    """The batch of S sequences: `counts[s]` new tokens each, after `starts[s]` tokens that are in the cache.

    tokens: the new ones of each sequence. tables: int32 block ids of each sequence, the new tokens' blocks included.
    logit_rows: int64 (R), places among the T tokens, ascending. adapters: the slot of each sequence's adapter, those of
    one adapter side by side; empty if no sequence has one.
    """
    starts_S, counts_S = np.asarray(starts, dtype=np.int64), np.asarray(counts, dtype=np.int64)
    ends_S = np.cumsum(counts_S)
    total = int(ends_S[-1])
    tokens_T = np.fromiter(chain.from_iterable(tokens), dtype=np.int64, count=total)
    row_T = np.repeat(np.arange(len(counts_S)), counts_S)
    positions_T = np.arange(total) + (starts_S - ends_S + counts_S)[row_T]
    tables_SB = np.zeros((len(counts_S), max(map(len, tables))), dtype=np.int32)
    for row, table in enumerate(tables):
        tables_SB[row, : len(table)] = table
    slots_T = tables_SB[row_T, positions_T // block_size].astype(np.int64) * block_size + positions_T % block_size
    lengths_S = starts_S + counts_S
    query_starts_S1 = np.concatenate(([0], ends_S)).astype(np.int32)

    arrays = (tokens_T, positions_T, slots_T, logit_rows, query_starts_S1, lengths_S.astype(np.int32), tables_SB)
    tokens, positions, slots, rows, query_starts, lengths, padded_tables = to_device(arrays, device)
    return Batch(
        tokens, positions, query_starts, lengths, padded_tables, slots, rows, block_size, int(counts_S.max()),
        int(lengths_S.max()), *segments_of(adapters, query_starts_S1, logit_rows),
    )  # fmt: skip


def to_device(arrays: Sequence[np.ndarray], device: torch.device | str) -> list[Tensor]:
    """The arrays as tensors on `device`: for a GPU in one asynchronous copy out of page-locked memory."""
    if str(device) == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]).tolist()
    packed = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    flat = packed.numpy()
    starts = [0, *ends[:-1]]
    for start, array in zip(starts, arrays, strict=True):
        flat[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


def segments_of(
    adapters: Sequence[int | None], starts_S1: np.ndarray, logit_rows: np.ndarray
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Segments of tokens and of rows: `adapters` of the sequences, whose tokens begin at `starts_S1`."""
    tokens, first = [], 0
    for slot, members in groupby(adapters):
        after = first + len(list(members))
        if slot is not None:
            tokens.append(Segment(slot, int(starts_S1[first]), int(starts_S1[after])))
        first = after
    rows = [Segment(slot, *np.searchsorted(logit_rows, bounds).tolist()) for slot, *bounds in tokens]
    return tuple(tokens), tuple(row for row in rows if row.first < row.end)
