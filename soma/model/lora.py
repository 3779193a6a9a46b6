"""LoRA (arXiv:2106.09685): low-rank updates beside frozen linear layers, in PEFT's folders.

Shape letters: K inputs of a layer, N outputs, R rank.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soma.base.artefact import read_json, write_json
from soma.base.errors import UserError
from soma.model.adapted import LowRank
from soma.model.config import ModelConfig
from soma.model.dropout import dropped, kept_share
from soma.model.layout import canonical_name, disk_layout
from soma.model.lora_config import LoRAConfig, config_to_peft, parse_config
from soma.model.safetensors_io import SafetensorsFile, write_safetensors
from soma.model.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """A linear layer as transformers has it: ours that make it up (GPT-2 joins q, k and v), and its sizes."""

    parts: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: its settings, and its updates by our names of the layers."""

    config: LoRAConfig
    layers: dict[str, LowRank]


@dataclass
class Switch:
    """Whether the forward passes of this process leave updates out."""

    off: bool = False


switch = Switch()


@contextmanager
def without_updates() -> Iterator[None]:
    """Inside, models compute what their frozen weights alone do: what they were before they had updates."""
    before, switch.off = switch.off, True
    try:
        yield
    finally:
        switch.off = before


class LoRALinear(nn.Module):
    """base(x) + scale · (x Aᵀ) Bᵀ: a frozen linear layer (quantized or not) with an update that can be trained.

    A and B are float32 over a base of lower precision, as in PEFT; what they make is rounded to the base's output.
    `dropout`: the share of x that training sets to 0 before A; it follows from `salt` and from the tokens
    (`soma.model.dropout`).
    """

    def __init__(
        self, base: nn.Module, lora_A: nn.Parameter, lora_B: nn.Parameter, scale: float, dropout: float = 0.0,
        salt: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A, self.lora_B, self.scale, self.dropout = lora_A, lora_B, scale, dropout
        # A tensor: layers that are compiled one by one would be compiled anew for each number. It has no state to save.
        self.salt = torch.tensor(salt, dtype=torch.int64, device="cpu")
        self.first_input = 0  # where a rank has some of the inputs: the number of its first, set from outside
        self.before: Tensor | None = None  # the base's weight, while the update is merged into it

    @property
    def in_features(self) -> int:
        return self.lora_A.size(1)

    @property
    def out_features(self) -> int:
        return self.lora_B.size(0)

    @property
    def bias(self) -> Tensor | None:
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def weight(self) -> Tensor:
        """The weight that the layer as a whole has (N, K), for who needs it as a matrix (MLA)."""
        dequantize = getattr(self.base, "dequantize", None)
        weight_NK = self.base.get_parameter("weight") if dequantize is None else dequantize(self.lora_A.dtype)
        return weight_NK if self.before is not None else weight_NK + self.update().to(weight_NK.dtype)

    def update(self) -> Tensor:
        """scale · B A, (N, K)."""
        return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.before is not None or switch.off:
            return y
        h, scale = x.to(self.lora_A.dtype), self.scale
        if self.training and self.dropout > 0:
            h = h.masked_fill(dropped(h.shape, self.salt, self.first_input, self.dropout), 0.0)
            scale /= kept_share(self.dropout)
        return y + (F.linear(F.linear(h, self.lora_A), self.lora_B) * scale).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base's weight. The old weight is kept, so that `unmerge` gives back the same bits.

        Raises UserError for a quantized base.
        """
        if not isinstance(self.base, nn.Linear):
            raise UserError("an adapter cannot be merged into quantized weights: load the model unquantized")
        if self.before is None:
            weight_NK = self.base.weight
            self.before = weight_NK.detach().clone()
            weight_NK.copy_(weight_NK.float() + self.update().float())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the update out of the base's weight again."""
        if self.before is not None:
            self.base.get_parameter("weight").copy_(self.before)
            self.before = None

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.size(0)}, scale={self.scale:g}"


def targets(config: ModelConfig) -> dict[str, Target]:
    """The linear layers of a model by their names in transformers. Routed experts and routers are none there."""
    meta = Transformer(config, device="meta")
    linear = {name: module for name, module in meta.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for entry in disk_layout(config, meta.state_dict()):
        parts = tuple(name.removesuffix(".weight") for name, _ in entry.parts)
        if all(part in linear for part in parts):
            rows = tuple(linear[part].out_features for part in parts)
            found[entry.name.removesuffix(".weight")] = Target(parts, rows, linear[parts[0]].in_features)
    return found


def read_adapter(folder: str | Path, model: ModelConfig) -> Adapter:
    """A PEFT folder (adapter_config.json, adapter_model.safetensors) for a model of this config, on the CPU.

    Raises UserError: no such folder or file, a kind of adapter that we have not, layers that the model has not, shapes
    that do not fit.
    """
    folder = Path(folder)
    path, weights = folder / CONFIG, folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG} there, so it is not an adapter's folder")
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder}: only pickled weights (adapter_model.bin) there; convert them to safetensors")
    config = parse_config(read_json(path), path)
    file = SafetensorsFile(weights)
    try:
        pairs = pair_up(file, model)
        known, layers = targets(model), {}
        for name, (a_name, b_name) in sorted(pairs.items()):
            if name not in known:
                raise UserError(f"{weights}: adapts {name!r}: {why_unknown(name, model)}")
            target, rank = known[name], config.rank(name)
            for tensor, shape in ((a_name, (rank, target.columns)), (b_name, (sum(target.rows), rank))):
                if file.tensors[tensor][1] != shape:
                    raise UserError(f"{weights}: tensor {tensor!r} has shape {list(file.tensors[tensor][1])}, expected "
                                    f"{list(shape)} (rank {rank} on this model)")  # fmt: skip
            a_RK, b_NR = file.read(a_name), file.read(b_name)
            if a_RK.dtype not in FLOATS or b_NR.dtype not in FLOATS:
                raise UserError(f"{weights}: tensor {a_name!r} or its lora_B is no float (dtype {a_RK.dtype})")
            for part, piece_NR in zip(target.parts, b_NR.split(target.rows), strict=True):
                layers[part] = LowRank(a_RK, piece_NR, config.scale(name))
    finally:
        file.close()
    if not layers:
        raise UserError(f"{weights}: there is no lora_A in it")
    return Adapter(config, layers)


def why_unknown(name: str, model: ModelConfig) -> str:
    """What is wrong with a layer that is none of `targets`."""
    if name == "lm_head":
        return "this model's output layer is its embedding, which cannot be adapted"
    if ".experts." in name:
        return "routed experts cannot be adapted"
    return f"a {model.family} of this config has no such linear layer"


def pair_up(file: SafetensorsFile, model: ModelConfig) -> dict[str, tuple[str, str]]:
    """The layers that a file adapts, each with its tensors A and B.

    Beside an adapted output layer peft also saves the frozen base's own weight (`base_layer`): not read.
    """
    halves: dict[str, dict[str, str]] = {}
    for tensor in file.tensors:
        if tensor.endswith("lm_head.base_layer.weight"):
            continue
        layer, _, kind = tensor.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not tensor.startswith(PREFIX) or kind not in ("lora_A", "lora_B"):
            raise UserError(f"{file.path}: tensor {tensor!r} is not supported: only lora_A and lora_B of linear layers")
        halves.setdefault(canonical_name(model, layer + ".").removesuffix("."), {})[kind] = tensor
    for layer, pair in halves.items():
        if len(pair) < 2:
            raise UserError(f"{file.path}: layer {layer!r} has {next(iter(pair))} alone")
    return {layer: (pair["lora_A"], pair["lora_B"]) for layer, pair in halves.items()}


def add_lora(model: Transformer, config: LoRAConfig, seed: int = 0) -> None:
    """Freeze a model and give the layers that `config` selects an update that can be trained. It begins at 0.

    A is uniform in ±1/sqrt(K) (Kaiming with a = sqrt(5), PEFT's default), drawn from (seed, layer); B is 0. A joint
    layer of transformers (GPT-2's c_attn) has one A, which ours share. Raises UserError if no layer is selected.
    """
    model.requires_grad_(False)
    for name, target in chosen_targets(model.config, config).items():
        pieces = [torch.zeros(rows, config.rank(name)) for rows in target.rows]
        a_RK = first_inputs(name, config.rank(name), target.columns, seed)
        _attach(model, target, a_RK, pieces, config.scale(name), config.lora_dropout)


def chosen_targets(model: ModelConfig, config: LoRAConfig) -> dict[str, Target]:
    """The targets that `config` selects. Raises UserError if there are none."""
    chosen = {name: target for name, target in targets(model).items() if config.selects(name)}
    if not chosen:
        raise UserError(f"target_modules {config.target_modules!r} selects no linear layer of a {model.family}")
    return chosen


def first_inputs(name: str, rank: int, columns: int, seed: int) -> Tensor:
    """A of a target that has not been trained, (R, K)."""
    generator = torch.Generator().manual_seed(hashed(f"{seed}/{name}"))
    return (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)


def hashed(text: str) -> int:
    """A number below 2^63."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def load_lora(model: Transformer, folder: str | Path) -> LoRAConfig:
    """Freeze a model and put the updates of a PEFT folder beside its layers, to be used or trained further.

    Raises UserError: see `read_adapter`.
    """
    adapter = read_adapter(folder, model.config)
    model.requires_grad_(False)
    for target in targets(model.config).values():
        if target.parts[0] in adapter.layers:
            updates = [adapter.layers[part] for part in target.parts]
            pieces = [update.b_NR for update in updates]
            _attach(model, target, updates[0].a_RK, pieces, updates[0].scale, adapter.config.lora_dropout)
    return adapter.config


def _attach(
    model: Transformer, target: Target, a_RK: Tensor, pieces: list[Tensor], scale: float, dropout: float
) -> None:
    """Wrap the layers of a target; A is one parameter for all of them, and what is dropped before it is the same."""
    lora_A: nn.Parameter | None = None
    salt = hashed(target.parts[0])
    for part, b_NR in zip(target.parts, pieces, strict=True):
        parent, _, name = part.rpartition(".")
        base = model.get_submodule(part)
        assert not isinstance(base, LoRALinear), f"{part} has an update already"
        like = next(tensor for tensor in (*base.parameters(), *base.buffers()))
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        if lora_A is None:
            lora_A = nn.Parameter(a_RK.to(like.device, dtype, copy=True))
        lora_B = nn.Parameter(b_NR.to(like.device, dtype, copy=True))
        setattr(model.get_submodule(parent), name, LoRALinear(base, lora_A, lora_B, scale, dropout, salt))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have an update, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def shared_inputs(model: nn.Module) -> list[list[LoRALinear]]:
    """The layers that have one A together (GPT-2's q, k and v), in lists."""
    sharing: dict[int, list[LoRALinear]] = {}
    for layer in lora_layers(model).values():
        sharing.setdefault(id(layer._parameters["lora_A"]), []).append(layer)
    return [layers for layers in sharing.values() if len(layers) > 1]


def save_lora(model: Transformer, config: LoRAConfig, folder: str | Path) -> None:
    """Write a model's updates as a PEFT folder. `config` is the one that they were made or loaded with."""
    layers = lora_layers(model)
    chosen = {name: target for name, target in targets(model.config).items() if target.parts[0] in layers}
    for name, target in chosen.items():
        parts = [layers[part] for part in target.parts]
        assert all(part.lora_A is parts[0].lora_A and part.scale == config.scale(name) for part in parts), name
    tensors = model.state_dict()
    save_updates(model.config, config, chosen, tensors, tensors.__getitem__, folder)


def save_updates(
    model: ModelConfig, config: LoRAConfig, chosen: Mapping[str, Target], shapes: Mapping[str, Tensor],
    fetch: Callable[[str], Tensor], folder: str | Path,
) -> None:  # fmt: skip
    """`save_lora` for updates of the targets `chosen` that `fetch(name)` brings one by one.

    `shapes` has the tensors of a model with updates, by name, with the shape and dtype of each (meta ones will do).
    """
    assert chosen, "the model has no updates"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    specs: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    parts: list[list[str]] = []
    for name, target in chosen.items():
        columns = shapes[f"{target.parts[0]}.lora_A"]
        rows = [f"{part}.lora_B" for part in target.parts]
        specs += [
            (f"{PREFIX}{name}.lora_A.weight", columns.dtype, tuple(columns.shape)),
            (f"{PREFIX}{name}.lora_B.weight", columns.dtype, (sum(target.rows), columns.size(0))),
        ]
        parts += [[f"{target.parts[0]}.lora_A"], rows]
    tensors = (torch.cat([fetch(name).detach().cpu() for name in names]) for names in parts)
    write_safetensors(folder / WEIGHTS, specs, tensors)
    write_json(folder / CONFIG, config_to_peft(config, fan_in_fan_out=model.family == "gpt2"))


def merge_lora(model: Transformer) -> None:
    """Add all updates to the weights (`LoRALinear.merge`). Raises UserError for quantized layers."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: Transformer) -> None:
    """Take all updates out of the weights again, to the same bits."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove_lora(model: Transformer) -> None:
    """Put the plain layers back. Updates that were merged stay in the weights; the others are gone."""
    for path, layer in lora_layers(model).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.base)
