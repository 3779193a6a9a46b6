"""Rounded weights on disk in compressed-tensors' formats: read into layers that multiply with them, and written.

Shape letters: N rows (outputs), K columns (inputs), G groups of columns.

Integers of 4 and 8 bits become `QuantizedLinear`, the C kernels' format: exactly where the scales are float16 numbers
(bfloat16 scales above 2^-14 are), otherwise with scales rounded to 11 bits, which moves a weight by at most 2^-11 of
itself. Everything else (FP8, groups that are no multiple of 32, scales too small for float16) becomes `ScaledLinear`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soma.base.errors import UserError
from soma.model.compressed_config import Quantization, Scheme, write_quantization
from soma.model.config import ModelConfig
from soma.model.layout import Entry, disk_layout
from soma.model.quantized import GROUP, QuantizedLinear, unpack
from soma.model.safetensors_io import DTYPES, SafetensorsFile
from soma.model.transformer import Transformer

Location = Mapping[str, tuple[SafetensorsFile, str]]
SCALES = (torch.float32, torch.float16, torch.bfloat16)
LEFT_OUT = (".input_scale", ".input_zero_point", ".weight_zero_point")  # activations are not rounded; zeros
SMALLEST_HALF = 2.0**-14  # below it float16 has fewer bits


class ScaledLinear(nn.Module):
    """x Wᵀ + bias with W = values · scales in any group, made anew for each product.

    `values` (N, K): int8, or the bytes of float8_e4m3fn as uint8. `scales` (N, G) float32, one for `group` columns.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, values_NK: Tensor, scales_NG: Tensor, group: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = values_NK.shape
        self.group, self.is_float = group, values_NK.dtype == torch.float8_e4m3fn
        self.register_buffer("values", values_NK.view(torch.uint8) if self.is_float else values_NK)
        self.register_buffer("scales", scales_NG.float())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)  # whatever dtype the model is cast to
        return self

    @property
    def weight(self) -> Tensor:
        """The weight (N, K) in float32."""
        return self.dequantize()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K), rounded once."""
        values = self.values.view(torch.float8_e4m3fn) if self.is_float else self.values
        scales = self.scales.repeat_interleave(self.group, dim=1)[:, : self.in_features]
        return (values.float() * scales).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group={self.group}, float8={self.is_float}"


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Integers (N, K) int8 from int32 words (N, ⌈K·bits/32⌉): the lowest bits first, with 2^(bits-1) added.

    Worked: in 4 bits the word 0x76543210 is -8, -7, …, -1.
    """
    octets = packed.contiguous().view(torch.uint8)
    if bits == 4:
        octets = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)
    return (octets[:, :columns].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def pack_int32(values_NK: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_int32`; missing columns of the last word are 0 bits."""
    octets = (values_NK.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    octets = F.pad(octets, (0, -octets.size(1) % (32 // bits)))
    if bits == 4:
        octets = octets[:, 0::2] | (octets[:, 1::2] << 4)
    return octets.contiguous().view(torch.int32)


def take(location: Location, name: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A tensor of the files; UserError if it is missing or of another dtype."""
    if name not in location:
        raise UserError(f"tensor {name!r}, which the quantization_config asks for, is missing")
    file, disk_name = location[name]
    dtype = file.tensors[disk_name][0]
    if DTYPES[dtype] not in dtypes:
        raise UserError(
            f"{file.path}: tensor {disk_name!r} has dtype {dtype}, which does not fit its quantization scheme"
        )
    return file.read(disk_name)


def read_weight(location: Location, layer: str, scheme: Scheme, rows: int, columns: int) -> tuple[Tensor, Tensor, int]:
    """Values (N, K), scales (N, G) and the columns that share one, of a layer (its name on disk).

    Raises UserError that names the tensor for one that is missing or has another shape or dtype.
    """
    if scheme.format == "pack-quantized":
        packed = take(location, f"{layer}.weight_packed", (torch.int32,))
        shape = take(location, f"{layer}.weight_shape", (torch.int64, torch.int32)).tolist()
        words = -(-columns * scheme.bits // 32)
        if shape != [rows, columns] or packed.shape != (rows, words):
            raise UserError(f"tensor '{layer}.weight_packed' holds {shape}, expected {[rows, columns]}")
        values = unpack_int32(packed, scheme.bits, columns)
    else:
        kind = torch.int8 if scheme.format == "int-quantized" else torch.float8_e4m3fn
        values = take(location, f"{layer}.weight", (kind,))
        if values.shape != (rows, columns):
            raise UserError(f"tensor '{layer}.weight' has shape {list(values.shape)}, expected {[rows, columns]}")
    scales = take(location, f"{layer}.weight_scale", SCALES)
    group = scheme.group if scheme.group > 0 else columns
    groups = -(-columns // group)
    if scheme.group < 0 and scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(rows, 1)
    if scheme.group == 0 and scales.shape == (rows,):
        scales = scales[:, None]
    if scales.shape != (rows, groups):
        raise UserError(f"tensor '{layer}.weight_scale' has shape {list(scales.shape)}, expected {[rows, groups]}")
    return values, scales, group


def make_layer(values: Tensor, scales: Tensor, group: int, bits: int) -> QuantizedLinear | ScaledLinear:
    """The layer that multiplies with rounded weights: in the C kernels' format if that can hold them."""
    sizes = scales.float().abs()
    holds = ((sizes == 0) | (sizes >= SMALLEST_HALF)) & (sizes < 65504)
    fits = values.dtype == torch.int8 and (group % GROUP == 0 or group == values.size(1))
    if fits and bool(holds.all()):
        return QuantizedLinear(values, scales.half(), bits, group=group)
    return ScaledLinear(values, scales, group)


def load_compressed(
    model: Transformer, layout: list[Entry], location: Location, quantization: Quantization, dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[Entry], dict[str, tuple[SafetensorsFile, str]], Callable[[Mapping[str, Tensor]], None]]:  # fmt: skip
    """Give a meta model the layers that are stored rounded.

    Returns the entries and the tensors that are stored as they are, and what fills the rounded routed experts, which
    are stacked here and are rounded no longer, into the model's tensors once these have memory.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = model.state_dict()
    rest, used, experts = [], set[str](), []
    for entry in layout:
        layer, (name, expert) = entry.name.removesuffix(".weight"), entry.parts[0]
        scheme = quantization.scheme_of(layer) if entry.name.endswith(".weight") else None
        if scheme is None or f"{layer}.weight_scale" not in location:
            rest.append(entry)
            continue
        used |= {f"{layer}.{kind}" for kind in ("weight_packed", "weight_shape", "weight_scale", "weight")}
        path = name.removesuffix(".weight")
        if expert is not None:
            experts.append((layer, name, expert, scheme))
            continue
        if path not in linear or len(entry.parts) > 1 or entry.transposed:
            raise UserError(f"layer {layer!r} of a {model.config.family} cannot be quantized")
        bias = linear[path].bias
        values, scales, group = read_weight(location, layer, scheme, *shapes[name].shape)
        made = make_layer(values, scales, group, scheme.bits).to(device)
        made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, made)

    def fill_experts(targets: Mapping[str, Tensor]) -> None:
        for layer, name, expert, scheme in experts:
            target = targets[name][expert]
            values, scales, group = read_weight(location, layer, scheme, *target.shape)
            target.copy_(ScaledLinear(values, scales, group).dequantize(dtype))

    plain = {name: place for name, place in location.items() if name not in used and not name.endswith(LEFT_OUT)}
    return rest, plain, fill_experts


def to_dense(model: Transformer) -> int:
    """Turn `ScaledLinear` layers into plain ones of the model's dtype; how many there were."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, ScaledLinear)]
    for path, module in found:
        with torch.device("meta"):
            layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        layer.weight = nn.Parameter(module.dequantize(model.dtype), requires_grad=False)
        layer.bias = module.bias  # type: ignore[assignment]
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return len(found)


def stored(
    model: Transformer,
) -> tuple[ModelConfig, dict[str, Tensor], Callable[[str], Tensor], dict[str, Any] | None]:
    """What a folder of the model holds: its config, all tensors by name (their shapes and dtypes), how each is made,
    and its quantization_config, None if no layer is rounded.

    A rounded copy of a tied embedding becomes an output layer of its own. Raises UserError for GPT-2, whose layers
    compressed-tensors does not know, and for layers that are not integers.
    """
    plain = model.state_dict()
    rounded = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if scaled := [name for name, module in model.named_modules() if isinstance(module, ScaledLinear)]:
        raise UserError(
            f"layer {scaled[0]!r} cannot be stored as it is: only weights of 4 and 8 bits in groups of 32 can"
        )
    if not rounded:
        return model.config, plain, plain.__getitem__, None
    if model.config.family == "gpt2":
        raise UserError("a quantized gpt2 cannot be stored: compressed-tensors has no transposed layers")
    config = model.config.model_copy(update={"tie_word_embeddings": False}) if "lm_head" in rounded else model.config
    tensors: dict[str, Tensor] = {}
    makers: dict[str, Callable[[], Tensor]] = {}
    for name in Transformer(config, device="meta").state_dict():
        path = name.removesuffix(".weight")
        if path not in rounded:
            tensors[name] = plain[name]
            continue
        for kind, shape, dtype in stored_shapes(rounded[path]):
            tensors[f"{path}.{kind}"] = torch.empty(shape, dtype=dtype, device="meta")
            makers[f"{path}.{kind}"] = lambda layer=rounded[path], kind=kind: stored_tensor(layer, kind)  # type: ignore[misc]

    def fetch(name: str) -> Tensor:
        return makers[name]() if name in makers else plain[name]

    return config, tensors, fetch, quantization_of(config, rounded)


def stored_group(layer: QuantizedLinear) -> int:
    """Columns that share a scale on disk: those of the layer if they divide its columns, else 32; 0 for whole rows.

    Raises UserError if 32 does not divide them either: compressed-tensors has no shorter last group.
    """
    columns = layer.in_features
    if layer.group == columns and columns % GROUP:
        return 0
    if columns % GROUP:
        raise UserError(
            f"layers of {columns} columns are no multiple of 32: compressed-tensors cannot store their groups"
        )
    return GROUP if columns % layer.group else layer.group


def stored_shapes(layer: QuantizedLinear) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """The tensors of a rounded layer on disk."""
    rows, columns = layer.out_features, layer.in_features
    return [
        ("weight_packed", (rows, -(-columns * layer.bits // 32)), torch.int32),
        ("weight_scale", (rows, columns // (stored_group(layer) or columns)), torch.float16),
        ("weight_shape", (2,), torch.int64),
    ]


def stored_tensor(layer: QuantizedLinear, kind: str) -> Tensor:
    """One of `stored_shapes`."""
    rows, columns = layer.out_features, layer.in_features
    if kind == "weight_shape":
        return torch.tensor([rows, columns])
    if kind == "weight_packed":
        return pack_int32(unpack(layer.packed, layer.bits, rows, columns), layer.bits)
    fine = layer.scales.transpose(1, 2).flatten(0, 1)[:rows]
    return fine[:, :: -(-(stored_group(layer) or columns) // GROUP)].contiguous()


def quantization_of(config: ModelConfig, rounded: Mapping[str, QuantizedLinear]) -> dict[str, Any]:
    """The quantization_config of these layers: the most frequent scheme for the class, the others by name."""
    places = {
        entry.parts[0][0].removesuffix(".weight"): entry.name.removesuffix(".weight")
        for entry in disk_layout(config, Transformer(config, device="meta").state_dict())
        if entry.parts[0][1] is None and entry.name.endswith(".weight")
    }
    members: dict[tuple[int, int], list[str]] = {}
    for path, layer in rounded.items():
        members.setdefault((layer.bits, stored_group(layer)), []).append(places[path])
    ranked = sorted(members.items(), key=lambda item: -len(item[1]))
    schemes = [
        Scheme("pack-quantized", bits, group, ("Linear",) if place == 0 else tuple(names))
        for place, ((bits, group), names) in enumerate(ranked)
    ]
    linear = [
        name for name, module in Transformer(config, device="meta").named_modules() if isinstance(module, nn.Linear)
    ]
    ignore = [places[name] for name in linear if name not in rounded]
    if config.num_experts:
        ignore += [r"re:.*\.experts\.\d+\..*", r"re:.*\.gate$"]
    return write_quantization(schemes, ignore)
