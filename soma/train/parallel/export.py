"""A Hugging Face folder out of a model that is cut over ranks: one tensor at a time is whole, rank 0 writes it."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from soma.model.config import ModelConfig
from soma.model.hub import save_tensors
from soma.model.layout import disk_layout
from soma.model.lora import add_lora, chosen_targets, save_updates
from soma.model.lora_config import LoRAConfig
from soma.model.reader import WeightReader
from soma.model.transformer import Transformer
from soma.train.parallel.apply import Parallel

Fetch = Callable[[str], Tensor]


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


class Merged:
    """The plain model's tensors out of one with updates: weight + scale · B A, added in float32.

    `fetch` brings the tensors of the model with updates, `shapes` has the plain one's. `base`, if given, brings those
    of the model that training started from, where the layers below the updates are rounded: what an update learned of
    the rest holds for both.
    """

    def __init__(
        self, model: ModelConfig, config: LoRAConfig, fetch: Fetch, base: Fetch | None, shapes: Mapping[str, Tensor]
    ) -> None:
        self.fetch, self.base, self.shapes = fetch, base, shapes
        self.scales = {
            part: config.scale(name) for name, target in chosen_targets(model, config).items() for part in target.parts
        }
        self.name, self.last = "", torch.empty(0)

    @torch.no_grad()
    def __call__(self, name: str) -> Tensor:
        """A tensor by the plain model's name, on the CPU."""
        if name != self.name:
            self.name, self.last = name, self.made(name).to(self.shapes[name].dtype)
        return self.last

    def made(self, name: str) -> Tensor:
        layer, _, kind = name.rpartition(".")
        is_adapted = layer in self.scales
        if self.base is not None:
            tensor = self.base(name)
        else:
            tensor = self.fetch(f"{layer}.base.{kind}" if is_adapted else name)
        if not is_adapted or kind != "weight":
            return tensor
        b_NR, a_RK = self.fetch(f"{layer}.lora_B"), self.fetch(f"{layer}.lora_A")
        return tensor.float() + (self.scales[layer] * (b_NR @ a_RK)).float()


def save_whole(
    parallel: Parallel, config: ModelConfig, dtype: torch.dtype, directory: Path, tokenizer: Path | None
) -> None:
    """Write the model as `hub.save_model` does, under `config`, in `dtype`. All ranks call it; rank 0 writes.

    Besides its own pieces a rank holds one whole tensor at a time (an MoE layer's experts are three).
    """
    shapes = Transformer(config, device="meta").to(dtype).state_dict()
    write(parallel.mesh.rank == 0, Gather(parallel, shapes), shapes, config, directory, tokenizer)


def save_merged(
    parallel: Parallel, lora: LoRAConfig, start: Path | None, config: ModelConfig, dtype: torch.dtype, adapter: Path,
    directory: Path, tokenizer: Path | None,
) -> None:  # fmt: skip
    """Write a model's updates as a PEFT folder, and the model with them merged as `save_whole` does.

    start: the folder whose weights the updates are added to, None for those below them.
    """
    twin = Transformer(config, device="meta", dtype=torch.float32)
    add_lora(twin, lora)
    shapes, is_main = twin.state_dict(), parallel.mesh.rank == 0
    fetch, chosen = Gather(parallel, shapes), chosen_targets(config, lora)
    if is_main:
        save_updates(config, lora, chosen, shapes, fetch, adapter)
    else:
        for target in chosen.values():
            for name in (f"{target.parts[0]}.lora_A", *(f"{part}.lora_B" for part in target.parts)):
                fetch(name)
    plain = Transformer(config, device="meta").to(dtype).state_dict()
    with ExitStack() as opened:
        base: Fetch | None = None
        if start is not None:  # the others have nothing to read: they take part in bringing the updates together
            base = opened.enter_context(WeightReader(start)) if is_main else lambda name: torch.zeros(())
        merged = Merged(config, lora, fetch, base, plain)
        write(is_main, merged, plain, config, directory, tokenizer)


def write(
    is_main: bool, fetch: Fetch, shapes: Mapping[str, Tensor], config: ModelConfig, directory: Path,
    tokenizer: Path | None,
) -> None:  # fmt: skip
    """On rank 0 the folder; the others fetch along."""
    if is_main:
        save_tensors(config, dict(shapes), fetch, directory, tokenizer)
        return
    for entry in disk_layout(config, shapes):
        for name, _ in entry.parts:
            fetch(name)
