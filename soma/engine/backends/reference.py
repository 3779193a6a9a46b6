"""The `Transformer` itself over `PagedStep`: every family, every device, every dtype."""

from torch import Tensor

from soma.engine.batch import Batch
from soma.engine.paged import PagedCache, PagedStep
from soma.model.adapted import adapters
from soma.model.transformer import Transformer


class ReferenceModel:
    """What the other backends are held to."""

    def __init__(self, model: Transformer, cache: PagedCache) -> None:
        self.model, self.cache = model, cache

    def step(self, batch: Batch) -> Tensor:
        """Append the batch's tokens to the cache; the logits (R, V) of the rows that it asks for."""
        tokens_BT, positions_BT = batch.tokens_T[None], batch.positions_T[None]
        with adapters(batch.adapters):
            x_BTD, _ = self.model.features(tokens_BT, positions_BT, cache=PagedStep(self.cache, batch))
        with adapters(batch.row_adapters):
            return self.model.logits(x_BTD[0, batch.logit_rows_R])
