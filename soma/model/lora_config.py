"""What a PEFT adapter folder's `adapter_config.json` says, and which layers it means. Loads no torch.

LoRA (arXiv:2106.09685): beside a frozen weight W a layer has W + scale · B A, with A (r, in) and B (out, r). Layers are
called by their names in transformers (`model.layers.0.self_attn.q_proj`), for the patterns are about those.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from soma.base.errors import UserError

ALL_LINEAR = "all-linear"

# Keys that change what an adapter computes and that we do not have: absent, null, false or empty is fine.
REFUSED = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "block-diagonal LoRA", "kasa_config": "KaSA",
    "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA", "arrow_config": "Arrow routing",
    "alora_invocation_tokens": "activated LoRA", "layer_replication": "replicated layers",
    "modules_to_save": "layers saved whole", "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters on bare parameters (routed experts)", "lora_bias": "a bias in B",
}  # fmt: skip
# Ways to begin that leave the base weights alone. The others (PiSSA, OLoRA, LoftQ, CorDA, …) move a part of them into
# the adapter, which then fits no base that others have.
PLAIN_INITS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal")


class LoRAConfig(BaseModel):
    """An adapter's settings, by PEFT's names and with PEFT's meaning (peft.LoraConfig)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    r: int = Field(16, gt=0, description="rank of the update")
    lora_alpha: float = Field(16, description="the update is scaled by lora_alpha / r")
    use_rslora: bool = Field(False, description="scaled by lora_alpha / sqrt(r) instead (arXiv:2312.03732)")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="share of A's inputs that training sets to 0")
    target_modules: str | tuple[str, ...] = Field(
        ALL_LINEAR, description="layers: ends of their names, a regular expression for whole names, or all-linear"
    )
    exclude_modules: str | tuple[str, ...] | None = Field(None, description="layers left out, written in the same ways")
    layers_to_transform: int | tuple[int, ...] | None = Field(None, description="only these layers, by number")
    layers_pattern: str | tuple[str, ...] | None = Field(None, description="name of the list of layers")
    rank_pattern: dict[str, int] = Field({}, description="other ranks for layers whose names end in a pattern")
    alpha_pattern: dict[str, float] = Field({}, description="other lora_alpha, likewise")
    base_model_name_or_path: str | None = Field(None, description="the model that the adapter was made for")

    def rank(self, layer: str) -> int:
        """Rank of a layer's update."""
        return self.rank_pattern.get(pattern_of(self.rank_pattern, layer), self.r)

    def scale(self, layer: str) -> float:
        """Factor on B A. Worked: lora_alpha 16 at r 8 is 2, with use_rslora 5.657."""
        alpha = self.alpha_pattern.get(pattern_of(self.alpha_pattern, layer), self.lora_alpha)
        rank = self.rank(layer)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def selects(self, layer: str) -> bool:
        """Whether the adapter has a layer of this name (peft's `check_target_module_exists`)."""
        if self.exclude_modules and matches(self.exclude_modules, layer):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == ALL_LINEAR:
                return layer != "lm_head"
            return matches(self.target_modules, layer)
        return matches(self.target_modules, layer) and self._has_number(layer)

    def _has_number(self, layer: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == ():
            return True
        patterns = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", layer) for pattern in patterns or (r"[^.]*",))
        number = next((int(match[1]) for match in found if match), None)
        return number in (wanted if isinstance(wanted, tuple) else (wanted,))


def matches(names: str | tuple[str, ...], layer: str) -> bool:
    """Whether a regular expression fits the whole name, or one of several names is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in names)


def pattern_of(patterns: Iterable[str], layer: str) -> str:
    """The first pattern that fits the end of a layer's name, the name itself if none does."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), layer)


def parse_config(raw: Any, where: Path | str) -> LoRAConfig:
    """The settings in the dict of an adapter_config.json. UserError that names `where` and the key for what is not
    LoRA, not valid, or would compute something that we do not have."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: a JSON object is expected")
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {raw.get('peft_type')!r} is not supported, only 'LORA'")
    for key, meaning in REFUSED.items():
        if raw.get(key):
            raise UserError(f"{where}: {key} = {raw[key]!r} ({meaning}) is not supported")
    if raw.get("bias", "none") != "none":
        raise UserError(f"{where}: bias = {raw['bias']!r} (trained biases) is not supported, only 'none'")
    init = raw.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise UserError(
            f"{where}: init_lora_weights = {init!r} changes the base model's weights; convert the adapter to "
            "plain LoRA first (peft: path_initial_model_for_weight_conversion)"
        )
    try:
        config = LoRAConfig(**{key: value for key, value in raw.items() if value is not None})
        for pattern in (*config.rank_pattern, *config.alpha_pattern, config.target_modules, config.exclude_modules):
            if isinstance(pattern, str):
                re.compile(pattern)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {first['loc'][0]}: {first['msg']}") from None
    except re.error as error:
        raise UserError(f"{where}: {error.pattern!r} is no regular expression ({error.msg})") from None
    return config


def config_to_peft(config: LoRAConfig, *, fan_in_fan_out: bool) -> dict[str, Any]:
    """The dict of an adapter_config.json that peft reads. fan_in_fan_out: the base keeps its weights transposed."""
    raw = config.model_dump(mode="json")
    if config.lora_alpha == int(config.lora_alpha):
        raw["lora_alpha"] = int(config.lora_alpha)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "fan_in_fan_out": fan_in_fan_out, **raw,
    }  # fmt: skip
