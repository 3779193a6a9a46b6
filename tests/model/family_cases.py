"""Small random configs of every family, as keyword arguments of transformers' config classes."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BASE = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
GPT2 = {
    "vocab_size": 131, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLA = {
    **BASE, "num_key_value_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "moe_intermediate_size": 40, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
V3 = {**MLA, "n_group": 4, "topk_group": 2, "q_lora_rank": 20}
DEEPSEEK_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}

# name → (transformers' model_type, config arguments)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", BASE),
    "llama-tied-bias": ("llama", {**BASE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-mqa-head-dim": ("llama", {**BASE, "num_key_value_heads": 1, "head_dim": 32}),
    "llama-linear": ("llama", {**BASE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-dynamic": ("llama", {
        **BASE, "max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    }),
    "llama-yarn": ("llama", {**BASE, "rope_scaling": YARN}),
    "llama-llama3": ("llama", {**BASE, "rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "mistral": ("mistral", {**BASE, "sliding_window": None}),
    "mistral-window": ("mistral", {**BASE, "sliding_window": 7, "head_dim": 24}),
    "qwen2": ("qwen2", BASE),
    "qwen2-tied-window": ("qwen2", {
        **BASE, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
    }),
    "qwen2-yarn": ("qwen2", {**BASE, "rope_scaling": YARN}),
    "qwen3": ("qwen3", {**BASE, "head_dim": 24}),
    "qwen3-tied-bias-layers": ("qwen3", {
        **BASE, "head_dim": 16, "tie_word_embeddings": True, "attention_bias": True,
        "use_sliding_window": True, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied-inner": ("gpt2", {
        **GPT2, "tie_word_embeddings": False, "n_inner": 100, "activation_function": "gelu",
    }),
    "mixtral": ("mixtral", {**BASE, "num_local_experts": 4}),
    "mixtral-window-tied": ("mixtral", {
        **BASE, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 6, "tie_word_embeddings": True,
    }),
    "qwen3-moe": ("qwen3_moe", {
        **BASE, "head_dim": 24, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "norm_topk_prob": True,
    }),
    "qwen3-moe-sparse": ("qwen3_moe", {
        **BASE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "norm_topk_prob": False, "decoder_sparse_step": 2,
        "attention_bias": True, "use_sliding_window": True, "sliding_window": 9,
    }),
    "qwen3-moe-mlp-only": ("qwen3_moe", {
        **BASE, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 40, "mlp_only_layers": [1],
    }),
    "deepseek-v2": ("deepseek_v2", {**MLA, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek-v2-groups": ("deepseek_v2", {
        **MLA, "q_lora_rank": 20, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 4.0,
        "n_shared_experts": 2,
    }),
    "deepseek-v2-yarn-bias": ("deepseek_v2", {
        **MLA, "q_lora_rank": 20, "attention_bias": True, "rope_scaling": DEEPSEEK_YARN,
    }),
    "deepseek-v3": ("deepseek_v3", V3),
    "deepseek-v3-yarn": ("deepseek_v3", {
        **V3, "rope_scaling": DEEPSEEK_YARN, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    }),
    "deepseek-v3-halves": ("deepseek_v3", {
        **V3, "q_lora_rank": None, "rope_interleave": False, "tie_word_embeddings": True,
    }),
}  # fmt: skip


def reference(name: str, directory: Path) -> Any:
    """transformers' model of a case with random float32 weights, saved in `directory`.

    Weights are wide enough that attention is far from uniform, so that a wrong rotation or window shows.
    """
    model_type, arguments = CASES[name]
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(arguments))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in tensor_name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            is_norm = "norm" in tensor_name or ".ln_" in tensor_name
            tensor.copy_(1 + 0.2 * noise if is_norm and tensor_name.endswith("weight") else 0.15 * noise)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(directory)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 131, shape, generator=torch.Generator().manual_seed(seed))
