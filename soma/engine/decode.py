"""Running the model for inference: prefill of a chunk, decode of one token.

Shapes: T tokens, D model width, V vocabulary; the batch is one sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from soma.model.cache import KVCache
from soma.model.transformer import Transformer


class Runner:
    """One model, ready for inference. Call it under `torch.inference_mode()`."""

    def __init__(self, model: Transformer) -> None:
        self.model = model.fuse()
        self.device, self.dtype = model.device, model.dtype

    def prefill(self, ids: Sequence[int], cache: KVCache) -> Tensor:
        """Append tokens to the cache; hidden states (T, D) after the final norm."""
        tokens_BT = torch.tensor([list(ids)], device=self.device)
        return self.model.features(tokens_BT, cache=cache)[0][0]

    def logits(self, x_TD: Tensor) -> Tensor:
        """Scores of the vocabulary (T, V)."""
        return self.model.logits(x_TD)

    def decode(self, token: int, cache: KVCache) -> Tensor:
        """Append one token to the cache; the scores (V) of the one that follows it."""
        return self.model(torch.tensor([[token]], device=self.device), cache=cache)[0, 0]
