"""Tensor names on disk, per family. One table serves loading and saving. Loads no torch.

Our names are those of a Hugging Face Llama without the leading `model.`; experts are stacked, one tensor for all.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from soma.model.config import ModelConfig


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: our tensors (name, expert index or None) joined along their first dimension.

    `transposed`: the file holds the transpose (GPT-2's Conv1D).
    """

    name: str
    parts: tuple[tuple[str, int | None], ...]
    transposed: bool = False


MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
GPT2_OUTER = {
    "embed_tokens.weight": "transformer.wte.weight", "embed_positions.weight": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight", "norm.bias": "transformer.ln_f.bias", "lm_head.weight": "lm_head.weight",
}  # fmt: skip
GPT2_LAYER = {
    "input_layernorm": ("ln_1", False), "post_attention_layernorm": ("ln_2", False),
    "self_attn.o_proj": ("attn.c_proj", True),
    "mlp.up_proj": ("mlp.c_fc", True), "mlp.down_proj": ("mlp.c_proj", True),
}  # fmt: skip

# Tensors that old or larger checkpoints carry and that hold nothing we need.
TOLERATED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")


def disk_layout(config: ModelConfig, names: Iterable[str]) -> list[Entry]:
    """Entries for all of our tensor names (`Transformer.state_dict()` keys), in a fixed order."""
    if config.family == "gpt2":
        return gpt2_layout(list(names))
    entries = []
    for name in names:
        if name.startswith("lm_head."):
            entries.append(Entry(name, ((name, None),)))
        elif match := re.fullmatch(r"(layers\.\d+)\.mlp\.experts\.(\w+)", name):
            for expert in range(config.num_experts):
                disk = f"model.{match[1]}.mlp.experts.{expert}.{match[2]}.weight"
                if config.family == "mixtral":
                    disk = f"model.{match[1]}.block_sparse_moe.experts.{expert}.{MIXTRAL[match[2]]}.weight"
                entries.append(Entry(disk, ((name, expert),)))
        elif config.family == "mixtral" and name.endswith("mlp.gate.weight"):
            entries.append(Entry("model." + name.replace("mlp.gate", "block_sparse_moe.gate"), ((name, None),)))
        else:
            entries.append(Entry("model." + name, ((name, None),)))
    return entries


def gpt2_layout(names: list[str]) -> list[Entry]:
    entries = []
    for name in names:
        if name in GPT2_OUTER:
            entries.append(Entry(GPT2_OUTER[name], ((name, None),)))
            continue
        match = re.fullmatch(r"(layers\.(\d+)\.)(.+)\.(weight|bias)", name)
        assert match, name
        prefix, layer, module, kind = match.groups()
        if module == "self_attn.q_proj":
            parts = tuple((f"{prefix}self_attn.{each}_proj.{kind}", None) for each in "qkv")
            entries.append(Entry(f"transformer.h.{layer}.attn.c_attn.{kind}", parts, kind == "weight"))
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            disk, transposed = GPT2_LAYER[module]
            disk_name = f"transformer.h.{layer}.{disk}.{kind}"
            entries.append(Entry(disk_name, ((name, None),), transposed and kind == "weight"))
    return entries


def canonical_name(config: ModelConfig, name: str) -> str:
    """A tensor name as `disk_layout` spells it: GPT-2 files come with and without the leading `transformer.`."""
    if config.family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return "transformer." + name
    return name


def is_tolerated(config: ModelConfig, name: str) -> bool:
    """Whether a tensor that the model does not have may be in a file all the same."""
    if TOLERATED.fullmatch(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
        return True
    # DeepSeek-V3 appends the layers of its multi-token prediction head, which the language model does not use.
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return config.family == "deepseek_v3" and layer is not None and int(layer[1]) >= config.num_hidden_layers
