"""The paged key/value cache and the plain PyTorch attention over it: the reference that faster backends are held to.

Shape letters: N blocks, K key/value heads, H query heads, G query heads per key/value head, E head width, V width of
a value, T new tokens, S sequences, L tokens in the cache.
"""

from itertools import islice, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from soma.base.errors import UserError
from soma.engine.batch import Batch
from soma.engine.pages import zeros
from soma.model.config import ModelConfig
from soma.model.formulas import kv_cache_bytes

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0  # the largest number of the format
CACHE_DTYPES = {"fp8": FP8, "int8": torch.int8}


def cache_dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The cache's dtype for a model of `dtype`: its own for "auto". Raises UserError for an unknown name."""
    if name != "auto" and name not in CACHE_DTYPES:
        raise UserError(f"cache_dtype {name!r}: expected one of auto, {', '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES.get(name, dtype)


class PagedCache:
    """Per layer keys and values (N, K, block_size, E). With MLA keys alone: (N, 1, block_size, latent + rotary).

    N is one more than `num_blocks`: rows that pad a batch write to the block `scratch`, which no sequence has. In
    float8_e4m3fn (`FP8`) numbers are stored without scales, those beyond ±448 as ±448. In int8 each token and head has
    a float32 scale, in `key_scales` and `value_scales` (N, K, block_size), which are empty lists otherwise; UserError
    for MLA, whose latent and rotary parts cannot share a scale.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if dtype == torch.int8 and config.is_mla:
            raise UserError("cache_dtype 'int8': not for latent attention (MLA), whose cache is small as it is")
        self.config, self.num_blocks, self.block_size = config, num_blocks, block_size
        self.scratch, self.dtype = num_blocks, dtype
        if config.is_mla:
            assert config.kv_lora_rank is not None
            shape = (num_blocks + 1, 1, block_size, config.kv_lora_rank + config.qk_rope_head_dim)
        else:
            shape = (num_blocks + 1, config.num_key_value_heads, block_size, config.head_dim)
        layers = config.num_hidden_layers
        counts = (layers, 0 if config.is_mla else layers, *[layers if dtype == torch.int8 else 0] * 2)
        kinds = ((shape, dtype), (shape, dtype), (shape[:-1], torch.float32), (shape[:-1], torch.float32))
        wanted = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
        made = iter(
            zeros(wanted) if torch.device(device).type == "cpu"
            else [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in wanted]
        )  # fmt: skip
        self.keys, self.values, self.key_scales, self.value_scales = (list(islice(made, count)) for count in counts)

    @staticmethod
    def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block in all layers."""
        rows = 2 * config.num_hidden_layers * config.num_key_value_heads * block_size
        return kv_cache_bytes(config, block_size, dtype.itemsize) + (rows * 4 if dtype == torch.int8 else 0)


def round_rows(x_TKE: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 in -127…127 and their float32 scales (T, K): largest magnitude / 127."""
    x_TKE = x_TKE.float()
    scale_TK = x_TKE.abs().amax(-1) / 127
    inverse_TK = torch.where(scale_TK > 0, 1 / scale_TK, 0)
    return (x_TKE * inverse_TK[..., None]).round().clamp(-127, 127).to(torch.int8), scale_TK


class PagedStep:
    """One step's view of the cache, given to the `Transformer` as its cache: writes the new tokens, then attends."""

    def __init__(self, cache: PagedCache, batch: Batch) -> None:
        self.cache, self.batch = cache, batch
        self.block_T = batch.slots_T // batch.block_size
        self.place_T = batch.slots_T % batch.block_size
        starts, lengths = batch.query_starts_S1.tolist(), batch.lengths_S.tolist()
        counts = [end - start for start, end in pairwise(starts)]
        # Sequences with one new token go together, the others one by one.
        single = [s for s, count in enumerate(counts) if count == 1]
        self.single_S = torch.tensor(single, dtype=torch.int64, device=batch.slots_T.device)
        self.several = [(s, starts[s], starts[s + 1], lengths[s]) for s, count in enumerate(counts) if count > 1]
        self.single_T = batch.query_starts_S1[self.single_S].long()
        self.masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(
        self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor | None, window: int | None,
        scale: float | None = None, value_width: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Write the new tokens' keys and values of a layer; attention over all cached ones, (1, T, H·V).

        The batch is 1, T flat. Without values (MLA) the first `value_width` numbers of a key are its value.
        """
        q_THE = q_BHTE[0].transpose(0, 1)
        self.write(layer, k_BKTE[0].transpose(0, 1), None if v_BKTE is None else v_BKTE[0].transpose(0, 1))
        T, H, E = q_THE.shape
        scale = E**-0.5 if scale is None else scale
        width = E if value_width is None else value_width
        out_THV = q_THE.new_empty(T, H, width)
        if len(self.single_S):
            out_THV[self.single_T] = self._attend_single(layer, q_THE[self.single_T], window, scale, width)
        for s, start, end, length in self.several:
            out_THV[start:end] = self._attend_several(layer, q_THE[start:end], s, length, window, scale, width)
        return out_THV.reshape(1, T, H * width)

    def write(self, layer: int, k_TKE: Tensor, v_TKE: Tensor | None) -> None:
        """Put the new tokens' keys and values of a layer into their slots."""
        self._put(self.cache.keys, self.cache.key_scales, layer, k_TKE)
        if v_TKE is not None:
            self._put(self.cache.values, self.cache.value_scales, layer, v_TKE)

    def _put(self, rows: list[Tensor], scales: list[Tensor], layer: int, new_TKE: Tensor) -> None:
        stored = rows[layer]
        if stored.dtype == FP8:
            new_TKE = new_TKE.clamp(-FP8_MOST, FP8_MOST)
        if scales:
            new_TKE, scale_TK = round_rows(new_TKE)
            scales[layer].transpose(1, 2)[self.block_T, self.place_T] = scale_TK
        stored.transpose(1, 2)[self.block_T, self.place_T] = new_TKE.to(stored.dtype)

    def _read(self, layer: int, table: Tensor, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the blocks of one or more tables, (…, K, L, E)."""
        keys = self._get(self.cache.keys, self.cache.key_scales, layer, table, dtype)
        if not self.cache.values:
            return keys, keys[..., :width]
        return keys, self._get(self.cache.values, self.cache.value_scales, layer, table, dtype)

    @staticmethod
    def _get(rows: list[Tensor], scales: list[Tensor], layer: int, table: Tensor, dtype: torch.dtype) -> Tensor:
        found = rows[layer][table]
        if scales:
            found = found * scales[layer][table][..., None]
        return found.transpose(-4, -3).flatten(-3, -2).to(dtype)

    def _attend_single(
        self, layer: int, q_SHE: Tensor, window: int | None, scale: float, width: int
    ) -> Tensor:  # fmt: skip
        """One query for each of S sequences, their keys padded to the longest."""
        if (-1, window) not in self.masks:
            lengths_S1 = self.batch.lengths_S[self.single_S][:, None]
            longest = int(lengths_S1.max())
            key_L = torch.arange(-(-longest // self.batch.block_size) * self.batch.block_size, device=q_SHE.device)
            mask_SL = key_L < lengths_S1
            if window is not None:
                mask_SL &= key_L >= lengths_S1 - window
            self.masks[-1, window] = mask_SL[:, None, None]
        mask_S11L = self.masks[-1, window]
        table_SB = self.batch.tables_SB[self.single_S, : mask_S11L.size(-1) // self.batch.block_size]
        k_SKLE, v_SKLV = self._read(layer, table_SB, q_SHE.dtype, width)
        q_SKGE = q_SHE.view(len(q_SHE), k_SKLE.size(1), -1, q_SHE.size(-1))
        out_SKGV = F.scaled_dot_product_attention(q_SKGE, k_SKLE, v_SKLV, attn_mask=mask_S11L, scale=scale)
        return out_SKGV.reshape(len(q_SHE), -1, width)

    def _attend_several(
        self, layer: int, q_THE: Tensor, sequence: int, length: int, window: int | None, scale: float, width: int
    ) -> Tensor:  # fmt: skip
        """The T last queries of one sequence of `length` tokens."""
        if (sequence, window) not in self.masks:
            query_T1 = torch.arange(length - len(q_THE), length, device=q_THE.device)[:, None]
            key_L = torch.arange(length, device=q_THE.device)
            mask_TL = key_L <= query_T1
            if window is not None:
                mask_TL &= key_L > query_T1 - window
            self.masks[sequence, window] = mask_TL
        table_B = self.batch.tables_SB[sequence, : -(-length // self.batch.block_size)]
        k_KLE, v_KLV = self._read(layer, table_B, q_THE.dtype, width)
        out_HTV = F.scaled_dot_product_attention(
            q_THE.transpose(0, 1)[None], k_KLE[None, :, :length], v_KLV[None, :, :length],
            attn_mask=self.masks[sequence, window], scale=scale, enable_gqa=k_KLE.size(0) != q_THE.size(1),
        )[0]  # fmt: skip
        return out_HTV.transpose(0, 1)
