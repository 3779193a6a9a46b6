"""Keys and values of the tokens so far, preallocated: what prefill fills and decode reads."""

from typing import Protocol

import torch
from torch import Tensor

from soma.base.errors import UserError
from soma.model.config import ModelConfig


class FlatCache(Protocol):
    """A cache for a flat batch: one row (B = 1) holds the new tokens of many sequences, each at its own position.

    It knows which token belongs to which sequence, so it does the attention itself; `soma.engine.paged` has one.
    """

    def attend(
        self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor | None, window: int | None,
        scale: float | None = None, value_width: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Keep the new keys and values; attention of each token over its sequence so far, (1, T, H·V).

        Without values the first `value_width` numbers of a key are its value (MLA in the latent space).
        """
        ...


class KVCache:
    """Static cache of `capacity` tokens for `batch_size` sequences of equal length.

    Per layer: keys (B, K, capacity, head_dim) and values the same, K key/value heads. With MLA a layer keeps the
    normalized latent and the rotated shared key side by side, (B, 1, capacity, kv_lora_rank + qk_rope_head_dim),
    and no values: 576 numbers a token for DeepSeek-V3 instead of 128·(192 + 128) = 40,960.
    Sliding-window layers keep all tokens too; attention reads the window's part.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.batch_size, self.capacity, self.length = batch_size, capacity, 0
        if config.is_mla:
            assert config.kv_lora_rank is not None
            shape = (batch_size, 1, capacity, config.kv_lora_rank + config.qk_rope_head_dim)
        else:
            shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [] if config.is_mla else [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def check(self, batch_size: int, tokens: int) -> None:
        """Raise UserError if `tokens` more tokens of `batch_size` sequences do not fit."""
        if batch_size != self.batch_size:
            raise UserError(f"the cache holds {self.batch_size} sequences, the batch has {batch_size}")
        if self.length + tokens > self.capacity:
            raise UserError(
                f"{tokens} more tokens do not fit: the cache holds {self.length} of {self.capacity} tokens; "
                "make it with a larger capacity or shorten the prompt"
            )

    def append_keys(self, layer: int, k_BKTD: Tensor) -> Tensor:
        """Write T new keys of a layer behind the present length; a view of all keys, the new ones included."""
        end = self.length + k_BKTD.size(2)
        self.keys[layer][:, :, self.length : end] = k_BKTD
        return self.keys[layer][:, :, :end]

    def append(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new keys and values of a layer; views of all of them, the new ones included."""
        end = self.length + v_BKTD.size(2)
        self.values[layer][:, :, self.length : end] = v_BKTD
        return self.append_keys(layer, k_BKTD), self.values[layer][:, :, :end]

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.nbytes for tensor in [*self.keys, *self.values])
