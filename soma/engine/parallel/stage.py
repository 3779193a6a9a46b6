"""One rank's share of a step: its layers over its part of the cache. A backend like those of `soma.engine.backends`.

Shape letters: T tokens of a microbatch, R rows whose logits are wanted, D model width, V a rank's part of the
vocabulary.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soma.engine.batch import Batch
from soma.engine.paged import PagedCache, PagedStep
from soma.engine.parallel.links import Links
from soma.model.cache import FlatCache
from soma.model.config import ModelConfig
from soma.model.transformer import Masks, Transformer


class StageModel:
    """A shard of a model over its part of the cache.

    `whole` is the config of the whole model. Every rank must run the same steps.
    """

    def __init__(self, model: Transformer, cache: PagedCache, links: Links, whole: ModelConfig) -> None:
        self.model, self.cache, self.links, self.whole = model.fuse(), cache, links, whole
        self.shard = links.shard
        self.make_step = step_maker(model)
        self.vocabulary = self.shard.vocabulary(whole)
        if self.shard.tensors > 1:
            for layer in model.layers:
                layer.get_submodule("self_attn").register_forward_hook(self._sum)
                layer.get_submodule("mlp").register_forward_hook(self._sum)

    def _sum(self, module: nn.Module, inputs: object, out: "Tensor | tuple[Tensor, None]") -> object:
        """Add up what the tensor ranks' heads, or parts of the MLP or of the experts, have to say."""
        if isinstance(out, tuple):
            return (self.links.sum(out[0]), *out[1:])
        return self.links.sum(out)

    def step(self, parts: Sequence[Batch]) -> Tensor | None:
        """Run microbatches one after the other, so that the stages overlap; on rank 0 the logits of all of them."""
        mine = [self.forward(part) for part in parts]
        if self.shard.rank == 0:
            given = [self._collect(part, logits) for part, logits in zip(parts, mine, strict=True)]
            self.links.sent()
            return torch.cat(given) if len(given) > 1 else given[0]
        for part, logits_RV in zip(parts, mine, strict=True):
            assert (logits_RV is not None) == (self.shard.is_last and len(part.logit_rows_R) > 0)
        self.links.sent()
        return None

    def forward(self, batch: Batch) -> Tensor | None:
        """This stage's layers. Logits (R, V) in the last stage, if any are wanted; on other ranks than 0 sent off."""
        x_BTD = self._embed(batch) if self.shard.is_first else self.links.from_before(self._empty(batch))
        model = self.model
        rope = None
        if model.rope is not None:
            cos, sin = model.rope(batch.positions_T[None], x_BTD.dtype)
            rope = (cos[:, None], sin[:, None])
        masks: Masks = dict.fromkeys(model.windows)
        step = self.make_step(self.cache, batch)
        for layer in model.layers:
            x_BTD, _ = layer(x_BTD, rope, masks, None, step)
        if not self.shard.is_last:
            self.links.to_next(x_BTD)
            return None
        if len(batch.logit_rows_R) == 0:
            return None
        logits_RV = model.logits(model.norm(x_BTD)[0, batch.logit_rows_R])
        if self.shard.rank > 0 and len(self.vocabulary):
            self.links.give_logits(logits_RV)
        return logits_RV

    def _embed(self, batch: Batch) -> Tensor:
        """Embeddings (1, T, D): each rank looks up the tokens of its range, the others' rows are zeros."""
        local_BT = batch.tokens_T[None] - self.vocabulary.start
        is_other_BT = (local_BT < 0) | (local_BT >= len(self.vocabulary))
        x_BTD = self._empty(batch).zero_()
        if len(self.vocabulary):
            x_BTD = F.embedding(local_BT.masked_fill(is_other_BT, 0), self.model.embed_tokens.weight)
            x_BTD.masked_fill_(is_other_BT[..., None], 0)
        self.links.sum(x_BTD)
        if self.model.rope is None:
            x_BTD = x_BTD + self.model.embed_positions(batch.positions_T[None])
        return x_BTD

    def _empty(self, batch: Batch) -> Tensor:
        """Room for hidden states (1, T, D)."""
        return torch.empty(
            1, batch.num_tokens, self.whole.hidden_size, dtype=self.model.dtype, device=batch.tokens_T.device
        )

    def _collect(self, batch: Batch, mine: Tensor | None) -> Tensor:
        """On rank 0: the logits (R, whole vocabulary) of a microbatch."""
        rows, each = len(batch.logit_rows_R), len(self.vocabulary)
        logits = torch.empty(rows, self.whole.vocab_size, dtype=self.model.dtype, device=batch.tokens_T.device)
        if rows == 0:
            return logits
        last = self.shard.tensors * (self.shard.stages - 1)
        for place in range(self.shard.tensors):
            start = place * each
            width = max(0, min(each, self.whole.vocab_size - start))
            if last + place == 0:
                assert mine is not None
                logits[:, :width] = mine
            elif width:
                part = torch.empty(rows, width, dtype=logits.dtype, device=logits.device)
                logits[:, start : start + width] = self.links.take_logits(part, last + place)
        return logits


def step_maker(model: Transformer) -> Callable[[PagedCache, Batch], FlatCache]:
    """What attends over the paged cache: Triton kernels on a GPU where they can, else plain PyTorch."""
    if model.device.type == "cuda" and find_spec("triton") is not None:
        from soma.engine.parallel.triton_step import TritonStep

        if TritonStep.supports(model.config, model.dtype):
            return TritonStep
    return PagedStep
