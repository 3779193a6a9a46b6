"""Decode steps as CUDA graphs: one for each of a few batch sizes; a smaller batch is padded to the next of them.

Launching some three hundred kernels from Python takes longer than a small decode step; a replay is one launch. Padded
rows are sequences of one token in the cache's scratch block. Every graph reads the same input buffers and writes the
same output buffer, and all share one memory pool, the largest captured first.

Shape letters: S sequences (each with one new token), B blocks of a table, D model width.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from soma.engine.batch import Batch
from soma.engine.paged import PagedCache

PRIME = 7919  # scatters blocks
TUNING_LENGTH = 1024  # tokens of the sequences that kernels are tuned with

log = logging.getLogger("soma.engine")


def bucket_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph: 1, 2, 4, then multiples of 8, up to `most`. bucket_sizes(20) = 1 2 4 8 16 20."""
    sizes = [size for size in (1, 2, 4, *range(8, most, 8)) if size < most]
    return [*sizes, most]


class DecodeInputs:
    """Static tensors of a decode step of up to `most` sequences whose tables have `width` blocks.

    Rows beyond a batch's sequences are padding: one token in the scratch block.
    """

    def __init__(self, most: int, width: int, scratch: int, block_size: int, device: torch.device) -> None:
        self.block_size, self.scratch = block_size, scratch
        self.tokens_T, self.positions_T, self.slots_T = (
            torch.empty(most, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.lengths_S = torch.empty(most, dtype=torch.int32, device=device)
        self.tables_SB = torch.empty(most, width, dtype=torch.int32, device=device)
        self.query_starts_S1 = torch.arange(most + 1, dtype=torch.int32, device=device)
        self.clear()

    def clear(self) -> None:
        """Make every row padding."""
        self.tokens_T.zero_()
        self.positions_T.zero_()
        self.slots_T.fill_(self.scratch * self.block_size)
        self.lengths_S.fill_(1)
        self.tables_SB.fill_(self.scratch)

    def fill(self, length: int, num_blocks: int) -> None:
        """Make every row a sequence of `length` tokens in blocks all over the cache; writes still go to scratch."""
        self.lengths_S.fill_(length)
        self.positions_T.fill_(length - 1)
        blocks = torch.arange(self.tables_SB.numel(), dtype=torch.int32, device=self.tables_SB.device)
        self.tables_SB.copy_((blocks * PRIME % num_blocks).view_as(self.tables_SB))

    def rows(self, count: int) -> Batch:
        """The first `count` rows as a batch: views, so what is put in later is seen."""
        return Batch(
            self.tokens_T[:count], self.positions_T[:count], self.query_starts_S1[: count + 1], self.lengths_S[:count],
            self.tables_SB[:count], self.slots_T[:count], self.query_starts_S1[:count].long(), self.block_size, 1,
            self.tables_SB.size(1) * self.block_size,
        )  # fmt: skip

    def put(self, batch: Batch, size: int) -> None:
        """Copy a decode batch in and pad it to `size` rows."""
        count, width = batch.num_sequences, batch.tables_SB.size(1)
        self.tokens_T[:count].copy_(batch.tokens_T)
        self.positions_T[:count].copy_(batch.positions_T)
        self.slots_T[:count].copy_(batch.slots_T)
        self.lengths_S[:count].copy_(batch.lengths_S)
        self.tables_SB[:count, :width].copy_(batch.tables_SB)
        if size > count:
            self.tokens_T[count:size].zero_()
            self.positions_T[count:size].zero_()
            self.slots_T[count:size].fill_(self.scratch * self.block_size)
            self.lengths_S[count:size].fill_(1)
            self.tables_SB[count:size, :1].fill_(self.scratch)


class DecodeGraphs:
    """Captures `features` (a decode batch to its hidden states) for every bucket of batch sizes."""

    def __init__(
        self, features: Callable[[Batch], Tensor], cache: PagedCache, like_VD: Tensor, max_sequences: int,
        max_length: int,
    ) -> None:  # fmt: skip
        """like_VD: a tensor with the width, dtype and device of the hidden states."""
        self.device = like_VD.device
        self.width = -(-max_length // cache.block_size)
        self.sizes = bucket_sizes(max_sequences)
        self.inputs = DecodeInputs(max_sequences, self.width, cache.scratch, cache.block_size, self.device)
        self.out_SD = like_VD.new_empty(max_sequences, like_VD.size(1))
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        begin = time.monotonic()
        self.inputs.fill(min(max_length, TUNING_LENGTH), cache.num_blocks)
        for size in reversed(self.sizes):
            features(self.inputs.rows(size))  # compiles and tunes what this size needs
        torch.cuda.synchronize(self.device)
        self.inputs.clear()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self.sizes):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.out_SD[:size].copy_(features(self.inputs.rows(size)))
            self.graphs[size] = graph
        self.seconds = time.monotonic() - begin
        self.nbytes = free - torch.cuda.mem_get_info(self.device)[0]
        log.info("%d CUDA graphs: %.1f s, %.2f GiB", len(self.sizes), self.seconds, self.nbytes / 2**30)

    def fits(self, batch: Batch) -> bool:
        """Whether a graph can run this step: one new token for every sequence, the logits of each, no adapters."""
        rows, count = batch.logit_rows_R.numel(), batch.num_sequences
        if batch.adapters or not batch.num_tokens == count == rows:
            return False
        return count <= self.sizes[-1] and batch.tables_SB.size(1) <= self.width

    def features(self, batch: Batch) -> Tensor:
        """Hidden states (S, D) of a batch that fits; valid until the next call."""
        size = self.sizes[bisect_left(self.sizes, batch.num_sequences)]
        self.inputs.put(batch, size)
        self.graphs[size].replay()
        return self.out_SD[: batch.num_sequences]
