"""Requests for one model gathered into batches along the first axis (`soma.serve.batching`)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from soma.base.errors import UserError
from soma.serve.batching import Batcher, power_of_two
from soma.serve.errors import ApiError
from soma.serve.v2.datatypes import Tensors
from soma.serve.v2.model import V2Model


class BatchedModel(V2Model):
    """Another model, called with batches. All of its inputs and outputs have the batch as their first axis (-1).

    Requests share a batch if the other sizes of their tensors and their parameters are the same. Options as of
    `Batcher`; `pad` fills batches up to a power of two with copies of the last row. `executions` counts batches.
    Raises UserError for a model without a batch axis.
    """

    def __init__(self, model: V2Model, *, pad: bool = False, **options: Any) -> None:
        for spec in (*model.inputs, *model.outputs):
            if not spec.shape or spec.shape[0] != -1:
                raise UserError(f"batching needs -1 as the first size of every tensor; {spec.name} has "
                                f"{list(spec.shape)}")  # fmt: skip
        self.model, self.pad = model, pad
        self.inputs, self.outputs, self.labels, self.platform = (
            model.inputs,
            model.outputs,
            model.labels,
            model.platform,
        )
        try:
            self.batcher: Batcher[tuple[Tensors, Mapping[str, Any]], Tensors] = Batcher(self.run, pad=pad, **options)
        except ValueError as error:
            raise UserError(f"batching: {error}") from None

    @property
    def ready(self) -> bool:
        return self.model.ready

    @property
    def executions(self) -> int:
        return self.batcher.batches

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """The outputs for these rows, computed together with those of others."""
        rows = {len(array) for array in tensors.values()}
        if len(rows) != 1 or 0 in rows:
            raise ApiError(400, f"the inputs have {sorted(rows)} rows; a batch has the same number of all, at least 1")
        shapes = tuple(sorted((name, array.shape[1:]) for name, array in tensors.items()))
        key = (shapes, repr(sorted(parameters.items())))
        return await self.batcher.submit((tensors, parameters), rows.pop(), key)

    async def run(self, calls: list[tuple[Tensors, Mapping[str, Any]]]) -> list[Tensors]:
        """A batch."""
        sizes = [len(next(iter(tensors.values()))) for tensors, _ in calls]
        count = sum(sizes)
        padding = power_of_two(count, self.batcher.max_batch) - count if self.pad else 0
        whole = {
            name: np.concatenate([tensors[name] for tensors, _ in calls] + [calls[-1][0][name][-1:]] * padding)
            for name in calls[0][0]
        }
        made = self.model.check_outputs(await self.model.infer(whole, calls[0][1]))
        for name, array in made.items():
            if len(array) != count + padding:
                raise ValueError(f"{name} has {len(array)} rows for {count + padding}")
        ends = np.cumsum(sizes)
        return [
            {name: array[end - size : end] for name, array in made.items()}
            for size, end in zip(sizes, ends, strict=True)
        ]  # fmt: skip

    def close(self) -> None:
        self.model.close()
