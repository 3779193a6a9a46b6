"""Small random float32 models of every family that the engine serves, wide enough that a wrong detail shows."""

from typing import Any

import torch

from soma.model.config import ModelConfig
from soma.model.transformer import Transformer

V = 203
BASE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
MLA: dict[str, Any] = {
    **BASE, "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "moe_intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 3,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "llama-linear": {**BASE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama-dynamic": {**BASE, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama-llama3": {**BASE, "rope_scaling": LLAMA3},
    "llama-yarn": {**BASE, "rope_scaling": YARN},
    "gpt2": {"family": "gpt2", **{key: BASE[key] for key in BASE if key not in (
        "num_key_value_heads", "intermediate_size")}},
    "mistral-window": {"family": "mistral", **BASE, "sliding_window": 21},
    "qwen2": {"family": "qwen2", **BASE},
    "qwen3": {"family": "qwen3", **BASE, "head_dim": 24},
    "mixed-windows": {"family": "qwen3", **BASE, "sliding_window": 19,
                      "layer_types": ("sliding_attention", "full_attention", "sliding_attention")},
    "mixtral": {"family": "mixtral", **BASE, **EXPERTS},
    "qwen3_moe": {"family": "qwen3_moe", **BASE, **EXPERTS, "norm_topk_prob": True},
    "deepseek_v2": {"family": "deepseek_v2", **MLA},
    "deepseek_v3": {"family": "deepseek_v3", **MLA, "n_group": 4, "topk_group": 2, "q_lora_rank": 20},
}  # fmt: skip


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model of a family with random weights, biases and gains."""
    model = Transformer(ModelConfig(**FAMILIES[name]), dtype=dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            with torch.no_grad():
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()
