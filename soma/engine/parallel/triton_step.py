"""Attention of a shard on a GPU: the paged Triton kernels behind the interface of `soma.engine.paged.PagedStep`.

Shape letters: T new tokens, H query heads, K key/value heads, E head width.
"""

import torch
from torch import Tensor

from soma.engine.batch import Batch
from soma.engine.paged import PagedCache
from soma.model.config import ModelConfig
from soma.model.kernels.launch import unsupported
from soma.model.kernels.paged import paged_attention


class TritonStep:
    """One step's view of the cache: writes the new tokens, then attends. Reads nothing on the host."""

    @staticmethod
    def supports(config: ModelConfig, dtype: torch.dtype) -> bool:
        """Whether the kernels take a model's heads."""
        return not config.is_mla and unsupported(config.head_dim, dtype) is None

    def __init__(self, cache: PagedCache, batch: Batch) -> None:
        self.cache, self.batch = cache, batch
        self.block_T = batch.slots_T // batch.block_size
        self.place_T = batch.slots_T % batch.block_size

    def attend(
        self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor | None, window: int | None,
        scale: float | None = None, value_width: int | None = None,
    ) -> Tensor:  # fmt: skip
        """As `PagedStep.attend`: (1, T, H·E)."""
        assert v_BKTE is not None
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        for stored, new_BKTE in ((keys, k_BKTE), (values, v_BKTE)):
            stored.transpose(1, 2)[self.block_T, self.place_T] = new_BKTE[0].transpose(0, 1).to(stored.dtype)
        q_THE = q_BHTE[0].transpose(0, 1)
        batch = self.batch
        out_THE = paged_attention(
            q_THE, keys, values, batch.query_starts_S1, batch.lengths_S, batch.tables_SB, window, scale
        )
        return out_THE.flatten(1)[None]
