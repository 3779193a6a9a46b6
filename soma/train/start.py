"""The weights that a run starts from, brought into a model that has none yet, a tensor at a time.

A model is built without memory (on the meta device) and laid out over the ranks; then each rank takes its pieces. So no
rank ever holds more than its part of the model and one whole tensor.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from soma.model.config import ModelConfig
from soma.model.lora import chosen_targets, first_inputs
from soma.model.lora_config import LoRAConfig
from soma.model.reader import WeightReader
from soma.model.transformer import Transformer, first_weight
from soma.train.parallel.matrices import local_part

Fetch = Callable[[str], Tensor]


class Start:
    """Whole tensors of the model that training starts from, on the CPU, by the names of the model that is trained.

    model: a Hugging Face folder, or a shape: then they are fresh, from `seed`. lora: updates beside it, which begin at
    0 (A from `seed`). Raises UserError where the folder is no model's.
    """

    def __init__(self, model: ModelConfig | Path, seed: int, lora: LoRAConfig | None = None) -> None:
        self.reader = WeightReader(model) if isinstance(model, Path) else None
        self.config = model if isinstance(model, ModelConfig) else self.opened.config
        self.dtype = torch.float32 if self.reader is None else self.reader.dtype
        self.seed = seed
        self.targets: dict[str, tuple[str, int, int, int]] = {}  # of each of our layers: target, rank, rows, columns
        if lora is not None:
            for name, target in chosen_targets(self.config, lora).items():
                for rows, part in zip(target.rows, target.parts, strict=True):
                    self.targets[part] = (name, lora.rank(name), rows, target.columns)
        self.shapes = Transformer(self.config, device="meta").state_dict()

    @property
    def opened(self) -> WeightReader:
        """The folder."""
        assert self.reader is not None
        return self.reader

    def plain(self, name: str) -> Tensor:
        """A tensor of the plain model. It must not be written to."""
        if self.reader is not None:
            return self.reader(name)
        return first_weight(self.config, name, self.shapes[name].shape, self.seed)

    def __call__(self, name: str) -> Tensor:
        """A tensor of the model with updates, if there are any."""
        layer, _, kind = name.rpartition(".")
        if kind not in ("lora_A", "lora_B"):
            return self.plain(name.replace(".base.", "."))
        target, rank, rows, columns = self.targets[layer]
        return first_inputs(target, rank, columns, self.seed) if kind == "lora_A" else torch.zeros(rows, rank)

    def close(self) -> None:
        """Close the folder's files."""
        if self.reader is not None:
            self.reader.close()


@torch.no_grad()
def fill(model: Transformer, fetch: Fetch, device: torch.device, offload: bool = False) -> None:
    """Give all tensors of a model that have no memory yet memory on a device, and their numbers from `fetch(name)`.

    Tensors may be cut over ranks, and their modules wrapped; those that several modules share stay shared. `offload`:
    parameters get theirs in the CPU's memory, page-locked beside a GPU; buffers stay with what computes.
    """
    place = torch.device("cpu") if offload else device
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # with the old one, so that no other takes its id
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is None or not local_part(parameter).is_meta:
                continue
            if id(parameter) not in made:
                piece = own_piece(parameter, fetch(prefix + name), place, pinned=place.type != device.type)
                made[id(parameter)] = (parameter, nn.Parameter(piece, requires_grad=parameter.requires_grad))
            module._parameters[name] = made[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = own_piece(buffer, fetch(prefix + name), device)
    if model.rope is not None:
        model.rope.to(device)


def own_piece(tensor: Tensor, whole: Tensor, device: torch.device, pinned: bool = False) -> Tensor:
    """This rank's piece of a whole tensor, cut and in the dtype as `tensor` is, on a device; `pinned` (if it is cut):
    in page-locked memory."""
    if not isinstance(tensor, DTensor):
        return whole.to(device, tensor.dtype, copy=True)
    shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    for dimension, (length, first) in enumerate(zip(shape, start, strict=True)):
        whole = whole.narrow(dimension, min(first, whole.size(dimension)), length)
    piece = torch.empty(shape, dtype=tensor.dtype, device=device, pin_memory=pinned)
    piece.copy_(whole)
    return DTensor(piece, tensor._spec, requires_grad=False)
