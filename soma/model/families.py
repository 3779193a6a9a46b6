"""Hugging Face `config.json` ↔ ModelConfig, per family. Loads no torch.

A family is one `Family` entry: its class name, the keys that it calls otherwise, the values Hugging Face takes for keys
that are absent, and the options that change the numerics and that we do not have. `layout.py` has the tensor names.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from soma.base.errors import UserError
from soma.base.progress import current
from soma.model.config import ModelConfig

COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id",
)  # fmt: skip
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
NULL_MEANS_NONE = ("q_lora_rank", "sliding_window")  # other nulls mean the default
MLA = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
DEEPSEEK_ROUTER = (
    "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group", "topk_method",
    "routed_scaling_factor", "first_k_dense_replace", "norm_topk_prob",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How a family's config.json reads. `keys`: fields with Hugging Face's name; `renamed`: ours → theirs."""

    architecture: str
    keys: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=lambda: {"norm_eps": "rms_norm_eps"})
    defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)  # options with the only value we have
    written: dict[str, Any] = field(default_factory=dict)  # further keys that other programs need
    rope_theta: float = 10000.0
    window: str = "none"  # "plain": sliding_window; "optional": use_sliding_window; "layers": with layer_types too


LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "initializer_range": 0.02}
GPT2_RENAMED = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "norm_eps": "layer_norm_epsilon",
}  # fmt: skip
QWEN_ATTENTION = ("head_dim", "attention_bias")

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", ("head_dim", "attention_bias", "mlp_bias"),
        defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "MistralForCausalLM", ("head_dim",), window="plain",
        defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8,
                  "sliding_window": 4096},
        fixed={"attention_bias": (False,), "mlp_bias": (False,)},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", window="layers",
        defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 32768},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", QWEN_ATTENTION, window="layers",
        defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 32768, "head_dim": 128},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel", (), GPT2_RENAMED,
        defaults={"n_positions": 1024, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
                  "tie_word_embeddings": True, "activation_function": "gelu_new"},
        fixed={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
               "add_cross_attention": (False,)},
        written={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "mixtral": Family(
        "MixtralForCausalLM", ("head_dim", "num_experts_per_tok", "router_aux_loss_coef"),
        {"norm_eps": "rms_norm_eps", "num_experts": "num_local_experts"}, window="plain", rope_theta=1e6,
        defaults={**LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8,
                  "num_local_experts": 8, "num_experts_per_tok": 2},
        fixed={"router_jitter_noise": (0, 0.0)},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        (*QWEN_ATTENTION, "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef",
         "decoder_sparse_step", "mlp_only_layers"),
        {"norm_eps": "rms_norm_eps", "num_experts": "num_experts"}, window="optional",
        defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 4, "num_experts": 128,
                  "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False},
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM", ("attention_bias", "mlp_bias", *MLA, *DEEPSEEK_ROUTER),
        {"norm_eps": "rms_norm_eps", "num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
        defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 2048, "kv_lora_rank": 512, "q_lora_rank": 1536,
                  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
                  "n_shared_experts": 2, "moe_intermediate_size": 1407, "aux_loss_alpha": 0.001,
                  "norm_topk_prob": False},
        fixed={"norm_topk_prob": (False,), "scoring_func": ("softmax",), "moe_layer_freq": (1,),
               "topk_method": ("greedy", "group_limited_greedy")},
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM", ("attention_bias", "rope_interleave", *MLA, *DEEPSEEK_ROUTER),
        {"norm_eps": "rms_norm_eps", "num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"},
        defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 4096, "kv_lora_rank": 512, "q_lora_rank": 1536,
                  "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
                  "n_shared_experts": 1, "moe_intermediate_size": 2048, "aux_loss_alpha": 0.001, "norm_topk_prob": True,
                  "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
                  "first_k_dense_replace": 3},
        fixed={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,),
               "mlp_bias": (False,)},
        written={"scoring_func": "sigmoid", "num_nextn_predict_layers": 0},
    ),
}  # fmt: skip

# Options of any family that change what a model computes and that we have in one value only (absent or null is fine).
ONLY: dict[str, tuple[Any, ...]] = {
    "quantization_config": (), "compression_config": (), "vision_config": (), "audio_config": (),
    "is_encoder_decoder": (False,), "partial_rotary_factor": (1, 1.0), "attn_logit_softcapping": (),
    "final_logit_softcapping": (), "logit_scale": (1, 1.0), "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0), "attention_multiplier": (), "alibi": (False,), "clip_qkv": (),
    "no_rope_layers": ([],), "attention_chunk_size": (), "use_mrope": (False,),
}  # fmt: skip
# Keys that do not change what a model computes, for the note about keys that we do not know.
HARMLESS = {
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "attention_dropout",
    "hidden_act", "activation_function", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
    "use_sliding_window", "max_window_layers", "layer_types", "pretraining_tp", "_name_or_path", "auto_map",
    "output_router_logits", "router_aux_loss_coef", "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "head_dim",
    "qk_head_dim", "num_nextn_predict_layers", "ep_size", "seq_aux", "reorder_and_upcast_attn", "task_specific_params",
    "gradient_checkpointing", "num_local_experts", "return_dict", "output_hidden_states", "id2label", "label2id",
    "output_attentions", "problem_type", "chunk_size_feed_forward", "is_decoder", "_attn_implementation_autoset",
    "original_max_position_embeddings", "unsloth_version", "attention_bias", "mlp_bias", "num_experts",
}  # fmt: skip


def config_from_hf(raw: dict[str, Any], where: Path | str) -> ModelConfig:
    """ModelConfig for the dict of a config.json, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`).

    Raises UserError that names `where` and the key for an unknown family, a missing key, or an option that would
    change the numbers and that we do not have. Keys that are not known at all are noted and ignored.
    """
    name = raw.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not supported (supported: {', '.join(sorted(FAMILIES))})")
    family = FAMILIES[name]
    refuse_options(raw, family, where)
    given = {key: value for key, value in raw.items() if value is not None or key in NULL_MEANS_NONE}
    merged = {**family.defaults, **given}
    values: dict[str, Any] = {"family": name}
    for ours in (*COMMON, *family.keys, *family.renamed):
        theirs = family.renamed.get(ours, ours)
        if merged.get(theirs) is not None or (ours in NULL_MEANS_NONE and theirs in merged):
            values[ours] = merged[theirs]
        elif ours in REQUIRED or (ours == "intermediate_size" and name != "gpt2"):
            raise UserError(f"{where}: key {theirs!r} is missing")
    if name == "qwen3_moe" and "num_experts" not in raw and "num_local_experts" in raw:
        values["num_experts"] = raw["num_local_experts"]
    values["activation"] = read_activation(merged, name, where)
    if name == "deepseek_v3":
        values["topk_method"] = "noaux_tc"
    if name != "gpt2":
        values["rope_theta"], values["rope_scaling"] = read_rope(raw, family, values["max_position_embeddings"], where)
    values.update(read_window(merged, family, values["num_hidden_layers"]))
    unknown = sorted(set(raw) - HARMLESS - set(ONLY) - set(values) - set(family.renamed.values()) - set(family.fixed))
    unknown = [key for key in unknown if not key.startswith(("summary_", "_")) and key not in family.defaults]
    if unknown:
        current().note(f"{where}: keys not known, ignored: {', '.join(unknown)}")
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from None


def refuse_options(raw: dict[str, Any], family: Family, where: Path | str) -> None:
    """Raise UserError for an option whose value we do not implement."""
    for key, allowed in {**ONLY, **family.fixed}.items():
        value = raw.get(key)
        if value is not None and value not in allowed:
            have = f"only {' or '.join(map(repr, allowed))}" if allowed else "it must be absent"
            raise UserError(f"{where}: {key} = {short(value)} is not supported for {raw['model_type']} ({have})")


def short(value: Any) -> str:
    """A value's repr, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_activation(merged: dict[str, Any], name: str, where: Path | str) -> str:
    key = "activation_function" if name == "gpt2" else "hidden_act"
    known = (
        {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"} if name == "gpt2"
        else {"silu": "swiglu", "swish": "swiglu"}
    )  # fmt: skip
    if merged[key] not in known:
        raise UserError(f"{where}: {key} = {merged[key]!r} is not supported for {name} (supported: {', '.join(known)})")
    return known[merged[key]]


def read_rope(
    raw: dict[str, Any], family: Family, context: int, where: Path | str
) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling from either spelling."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise UserError(f"{where}: rope_parameters per layer type are not supported")
    scaling = {key: value for key, value in given.items() if value is not None}
    theta = scaling.pop("rope_theta", None) or raw.get("rope_theta") or family.rope_theta
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor other than 1 is not supported")
    rope_type = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    scaling.pop("type", None)
    if rope_type == "default":
        return float(theta), None
    if rope_type in ("yarn", "llama3"):
        scaling.setdefault("original_max_position_embeddings", raw.get("original_max_position_embeddings") or context)
    if rope_type == "yarn" and "factor" not in scaling:
        scaling["factor"] = context / scaling["original_max_position_embeddings"]
    return float(theta), {"rope_type": rope_type, **scaling}


def read_window(merged: dict[str, Any], family: Family, layers: int) -> dict[str, Any]:
    """sliding_window and layer_types by the family's rule."""
    window = merged.get("sliding_window")
    if family.window == "none" or window is None:
        return {}
    if family.window == "plain":
        return {"sliding_window": window}
    if not merged.get("use_sliding_window", False):
        return {}
    if family.window == "optional":
        return {"sliding_window": window}
    types = merged.get("layer_types")
    if types is None:
        first = merged.get("max_window_layers", 28)
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    return {"sliding_window": window, "layer_types": tuple(types)}


def config_to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The dict of a config.json that transformers 4.5x and 5 both read: `rope_theta` and `rope_scaling` spelled apart.

    Raises UserError that names the fields if the family's config cannot say what this ModelConfig says (a Llama with
    LayerNorm, for instance).
    """
    family = FAMILIES[config.family]
    out: dict[str, Any] = {"architectures": [family.architecture], "model_type": config.family, "torch_dtype": dtype}
    for ours in (*COMMON, *family.keys, *family.renamed):
        if config.family == "gpt2" and ours == "num_key_value_heads":
            continue
        value = getattr(config, ours)
        out[family.renamed.get(ours, ours)] = list(value) if isinstance(value, tuple) else value
    if config.family == "gpt2":
        out["activation_function"] = "gelu_new" if config.activation == "gelu_tanh" else "gelu"
    else:
        out["hidden_act"] = "silu"
        out["rope_theta"], out["rope_scaling"] = config.rope_theta, config.rope_scaling
    if family.window != "none":
        out["sliding_window"] = config.sliding_window
    if family.window in ("optional", "layers"):
        out["use_sliding_window"] = config.sliding_window is not None
    if family.window == "layers" and config.sliding_window is not None:
        sliding = [config.window(layer) is not None for layer in range(config.num_hidden_layers)]
        out["layer_types"] = ["sliding_attention" if each else "full_attention" for each in sliding]
        out["max_window_layers"] = sliding.index(True) if any(sliding) else len(sliding)
    out.update(family.written)
    check_expressible(config, out)
    return out


def check_expressible(config: ModelConfig, raw: dict[str, Any]) -> None:
    """Raise UserError unless reading `raw` gives a model that computes the same as `config`."""
    read = config_from_hf(raw, f"the config.json of family {config.family!r}")
    ours, theirs = config.model_dump(), read.model_dump()
    for values, source in ((ours, config), (theirs, read)):
        values["layer_types"] = tuple(source.window(layer) for layer in range(source.num_hidden_layers))
        values["rope_scaling"] = normal_scaling(source.rope_scaling)
    if not config.num_experts:  # router settings of a dense model mean nothing
        for key in ("num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef"):
            ours.pop(key), theirs.pop(key)
    lost = [key for key in ours if ours[key] != theirs[key]]
    if lost:
        listed = ", ".join(f"{key}={short(ours[key])}" for key in lost)
        raise UserError(f"family {config.family!r} on disk cannot say: {listed}; choose another family or drop them")


def normal_scaling(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """rope_scaling with one spelling of its type."""
    if scaling is None:
        return None
    rest = {key: value for key, value in scaling.items() if key not in ("type", "rope_type", "rope_theta")}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    return None if rope_type == "default" else {"rope_type": rope_type, **rest}
