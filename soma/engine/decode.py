"""Running the model for inference: prefill of a chunk, decode of one token.

Shapes: T tokens, D model width, V vocabulary; the batch is one sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from soma.engine import native_decode as native
from soma.model.cache import KVCache
from soma.model.transformer import Transformer


class Runner:
    """One model, ready for inference on caches of up to `max_length` tokens. Call it under `torch.inference_mode()`.

    Prefill runs the `Transformer`. So does decode, unless the model is one that `native.NativeDecoder` can run (and
    `use_native` is left as it is): then a step is one call into C.
    """

    def __init__(self, model: Transformer, max_length: int, *, use_native: bool = True) -> None:
        self.model = model.fuse()
        self.device, self.dtype = model.device, model.dtype
        self.native: native.NativeDecoder | None = None
        if use_native and native.unsupported(model) is None and (built := native.library(model.dtype)) is not None:
            self.native = native.NativeDecoder(model, built, max_length)

    def prefill(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        """Append tokens to the cache; hidden states (T, D) after the final norm."""
        tokens_BT = torch.tensor([list(ids)], device=self.device)
        return self.model.features(tokens_BT, cache=cache)[0][0]

    def logits(self, x_TD: Tensor) -> Tensor:
        """Scores of the vocabulary (T, V)."""
        return self.model.logits(x_TD)

    def decode(self, token: int, cache: KVCache) -> Tensor:
        """Append one token to the cache; the scores (V) of the one that follows it."""
        if self.native is not None:
            return self.native(token, cache)
        return self.model(torch.tensor([[token]], device=self.device), cache=cache)[0, 0]
