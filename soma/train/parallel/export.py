"""A Hugging Face folder out of a model that is cut over ranks: one tensor at a time is whole, rank 0 writes it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from soma.model.config import ModelConfig
from soma.model.hub import save_tensors
from soma.model.layout import disk_layout
from soma.model.transformer import Transformer
from soma.train.parallel.apply import Parallel


class Gather:
    """Brings tensors of a parallel model together, by name; all ranks must ask for the same ones in the same order."""

    def __init__(self, parallel: Parallel, shapes: Mapping[str, Tensor]) -> None:
        self.parallel, self.tensors, self.shapes = parallel, parallel.model.state_dict(), shapes
        self.name, self.last = "", torch.empty(0)

    @torch.no_grad()
    def __call__(self, name: str) -> Tensor:
        """The whole tensor in the dtype of `shapes`, on the CPU. The last one is remembered (experts come in a row)."""
        if name != self.name:
            tensor = self.parallel.share(self.tensors.get(name), name, self.shapes[name])
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            self.name, self.last = name, tensor.to("cpu", self.shapes[name].dtype)
        return self.last


def save_whole(
    parallel: Parallel, config: ModelConfig, dtype: torch.dtype, directory: Path, tokenizer: Path | None
) -> None:
    """Write the model as `hub.save_model` does, under `config`, in `dtype`. All ranks call it; rank 0 writes.

    Besides its own pieces a rank holds one whole tensor at a time (an MoE layer's experts are three).
    """
    shapes = Transformer(config, device="meta").to(dtype).state_dict()
    fetch = Gather(parallel, shapes)
    if parallel.mesh.rank == 0:
        save_tensors(config, shapes, fetch, directory, tokenizer)
        return
    for entry in disk_layout(config, shapes):
        for name, _ in entry.parts:
            fetch(name)
