"""Runs a step's batch on the model: through C where that is possible, else through the `Transformer` itself.

Shapes: T tokens of the step, R rows whose logits are wanted, D model width, V vocabulary.
"""

from torch import Tensor

from soma.engine.batch import Batch
from soma.engine.native import NativeModel
from soma.engine.paged import PagedCache, PagedStep
from soma.model.transformer import Transformer


class Runner:
    """One model over one paged cache. Call it under `torch.inference_mode()`, one step at a time.

    A step is one call into C where `NativeModel` can run the model (and `use_native` is left as it is).
    """

    def __init__(self, model: Transformer, cache: PagedCache, *, use_native: bool = True) -> None:
        self.model, self.cache = model.fuse(), cache
        self.native: NativeModel | None = None
        if use_native and NativeModel.supports(model) is None:
            self.native = NativeModel(model, cache.keys, cache.values, cache.block_size)

    def step(self, batch: Batch) -> Tensor:
        """Append the batch's tokens to the cache; the logits (R, V) of the rows that it asks for."""
        if self.native is not None:
            return self.native.step(batch)
        tokens_BT, positions_BT = batch.tokens_T[None], batch.positions_T[None]
        x_BTD, _ = self.model.features(tokens_BT, positions_BT, cache=PagedStep(self.cache, batch))
        return self.model.logits(x_BTD[0, batch.logit_rows_R])
