"""Runs a step's batch on the model with the fastest backend that can."""

import torch
from torch import Tensor

from soma.engine.backends.choose import make_backend
from soma.engine.batch import Batch
from soma.engine.paged import PagedCache
from soma.model.transformer import Transformer


class Runner:
    """One model over one paged cache. Call it under `torch.inference_mode()`, one step at a time.

    backend: a name of `soma.engine.backends.choose.BACKENDS`. `name` is that of the one in use, `reason` why it is the
    reference where a faster one was looked for. graphs: see `make_backend`.
    """

    def __init__(
        self, model: Transformer, cache: PagedCache, *, backend: str = "auto", graphs: tuple[int, int] | None = None
    ) -> None:
        self.model, self.cache = model.fuse(), cache
        with torch.inference_mode():
            self.backend, self.name, self.reason = make_backend(backend, model, cache, graphs)

    def step(self, batch: Batch) -> Tensor:
        """Append the batch's tokens to the cache; the logits (R, V) of the rows that it asks for."""
        return self.backend.step(batch)
