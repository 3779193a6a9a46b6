"""`quantization_config` of compressed-tensors: which layers are stored rounded, and how. Loads no torch.

Format: https://github.com/vllm-project/compressed-tensors (checked against version 0.20).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soma.base.errors import UserError

METHOD = "compressed-tensors"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized")
DENSE = (None, "dense")


@dataclass(frozen=True)
class Scheme:
    """How the weights of some layers are stored. group: columns that share a scale, 0 for whole rows, -1 for all."""

    format: str
    bits: int
    group: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Quantization:
    """All schemes of a model, and the layers that have none."""

    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...]

    def scheme_of(self, layer: str) -> Scheme | None:
        """The scheme of a linear layer, by its name on disk. A name goes before a pattern, a pattern before a class."""
        if any(specificity(text, layer) for text in self.ignore):
            return None
        ranked = [
            (specificity(text, layer), -place) for place, scheme in enumerate(self.schemes) for text in scheme.targets
        ]
        best, place = max(ranked, default=(0, 0))
        return self.schemes[-place] if best else None


def specificity(text: str, layer: str) -> int:
    """How closely a target means a linear layer: 3 its name, 2 a pattern (after "re:"), 1 its class, 0 not."""
    if text == layer:
        return 3
    if text.startswith("re:"):
        return 2 if re.match(text[3:], layer) else 0
    return int(text == "Linear")


def read_quantization(raw: Any, where: Path | str) -> Quantization:
    """The schemes in a `quantization_config`. UserError that names `where` and the scheme for what we do not have."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: quantization_config must be an object")
    if raw.get("quant_method") != METHOD:
        raise UserError(
            f"{where}: quantization_config has quant_method {raw.get('quant_method')!r}, which is not supported (only "
            f"{METHOD!r})"
        )
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if raw.get(key):
            raise UserError(f"{where}: quantization_config.{key} is not supported")
    if (raw.get("sparsity_config") or {}).get("format") not in DENSE:
        raise UserError(f"{where}: sparse weights ({raw['sparsity_config']['format']!r}) are not supported")
    if raw.get("quantization_status", "compressed") != "compressed":
        raise UserError(
            f"{where}: quantization_status {raw['quantization_status']!r}: only 'compressed' is a stored one"
        )
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{where}: quantization_config.config_groups is missing")
    schemes = [
        read_scheme(group, raw.get("format"), f"{where}: config_groups.{name}") for name, group in groups.items()
    ]
    return Quantization(tuple(schemes), tuple(raw.get("ignore") or ()))


def read_scheme(group: Any, common_format: Any, where: str) -> Scheme:
    """One of `config_groups`."""
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise UserError(f"{where} is not supported: weights that are not described in full (a preset's name?)")
    weights, format_ = group["weights"], group.get("format") or common_format
    if format_ not in FORMATS:
        raise UserError(f"{where}: format {format_!r} is not supported (supported: {', '.join(FORMATS)})")
    if group.get("output_activations"):
        raise UserError(f"{where}: output_activations are not supported")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    size = weights.get("group_size")
    strategy = strategy or ("group" if size and size > 0 else "channel" if size == -1 else "tensor")
    what = f"{kind}{bits} by {strategy}" + (f" of {size}" if strategy == "group" else "")
    expected = {"pack-quantized": ("int", (4, 8)), "int-quantized": ("int", (8,)), "float-quantized": ("float", (8,))}
    kinds, widths = expected[format_]
    if kind != kinds or bits not in widths or strategy not in ("tensor", "channel", "group"):
        raise UserError(f"{where}: weights {what} in format {format_!r} are not supported")
    if not weights.get("symmetric", True):
        raise UserError(f"{where}: weights {what} with zero points (symmetric false) are not supported")
    if weights.get("actorder") in (True, "group"):
        raise UserError(f"{where}: weights {what} with actorder 'group' (g_idx) are not supported")
    if strategy == "group" and (not isinstance(size, int) or size <= 0):
        raise UserError(f"{where}: group_size {size!r} is no number of columns")
    targets = group.get("targets") or []
    for target in targets:
        if target != "Linear" and not re.search(r"[.:]|^lm_head$", target) and target[:1].isupper():
            raise UserError(f"{where}: targets of class {target!r} are not supported, only 'Linear'")
    return Scheme(format_, bits, {"tensor": -1, "channel": 0}.get(strategy, size or 0), tuple(targets))


def write_quantization(schemes: list[Scheme], ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose layers have integer weights and activations as they are."""
    groups = {}
    for number, scheme in enumerate(schemes):
        strategy = "group" if scheme.group > 0 else "channel"
        weights = {
            "num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": strategy,
            "group_size": scheme.group or None, "dynamic": False,
        }  # fmt: skip
        groups[f"group_{number}"] = {
            "targets": list(scheme.targets), "weights": weights, "input_activations": None, "output_activations": None,
            "format": scheme.format,
        }  # fmt: skip
    return {
        "quant_method": METHOD, "format": schemes[0].format, "quantization_status": "compressed",
        "config_groups": groups, "ignore": ignore, "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip
