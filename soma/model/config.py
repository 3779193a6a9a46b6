"""The one description of a model's shape. Field names are those of Hugging Face configs. Loads no torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["llama", "gpt2", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"]
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

# What a family has that a Llama has not, where the user does not say otherwise.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen3": {"qk_norm": True},
    "gpt2": {
        "position_embedding": "learned", "norm": "layernorm", "activation": "gelu_tanh", "attention_bias": True,
        "mlp_bias": True, "tie_word_embeddings": True,
    },
    "mixtral": {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "qwen3_moe": {"qk_norm": True, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
    "deepseek_v2": {
        "num_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_interleave": True,
    },
    "deepseek_v3": {
        "num_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_interleave": True,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
    },
}  # fmt: skip


class ModelConfig(BaseModel):
    """Shape and numerics of a decoder-only transformer.

    What is left out is derived: `num_key_value_heads` from `num_attention_heads`, `head_dim` from `hidden_size`, and
    the traits of the family (biases, norms, router) from `FAMILY_DEFAULTS`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    family: Family = Field("llama", description="model family: names on disk and defaults of the fields below")
    vocab_size: int = Field(gt=0, description="rows of the token embedding")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    intermediate_size: int = Field(gt=0, description="inner width of the dense MLP")
    num_hidden_layers: int = Field(gt=0, description="transformer layers")
    num_attention_heads: int = Field(gt=0, description="query heads")
    num_key_value_heads: int = Field(0, ge=0, description="key/value heads: fewer than query heads is GQA, 1 is MQA")
    head_dim: int = Field(0, ge=0, description="width of one head; 0: hidden_size / num_attention_heads")
    max_position_embeddings: int = Field(2048, gt=0, description="context length the model is made for, in tokens")
    position_embedding: Literal["rope", "learned"] = Field("rope", description="how positions enter the model")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: dict[str, Any] | None = Field(
        None, description="rope_type (linear, dynamic, yarn, llama3) with its parameters, as in Hugging Face configs"
    )
    rope_interleave: bool = Field(False, description="MLA: rotary pairs are neighbours (x0,x1), not halves")
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalization layer")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of the normalization")
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = Field("swiglu", description="MLP: gated SiLU, or plain GELU")
    tie_word_embeddings: bool = Field(False, description="the output layer is the transposed token embedding")
    attention_bias: bool = Field(False, description="biases in the query, key and value projections")
    attention_output_bias: bool | None = Field(None, description="bias in the output projection; None: as the others")
    mlp_bias: bool = Field(False, description="biases in the MLP")
    qk_norm: bool = Field(False, description="RMSNorm on each head of queries and keys before RoPE")
    sliding_window: int | None = Field(None, gt=0, description="a token sees this many tokens, itself included")
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = Field(
        None, description="per layer: full or sliding attention; None: all sliding if sliding_window is set"
    )
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of initial weights")

    num_experts: int = Field(0, ge=0, description="routed experts of an MoE layer; 0: dense")
    num_experts_per_tok: int = Field(2, gt=0, description="routed experts that each token visits")
    moe_intermediate_size: int = Field(0, ge=0, description="inner width of one expert; 0: intermediate_size")
    n_shared_experts: int = Field(0, ge=0, description="experts every token visits, fused into one MLP")
    norm_topk_prob: bool = Field(False, description="weights of the chosen experts are scaled to sum to 1")
    router_aux_loss_coef: float = Field(0.001, ge=0, description="weight of the load-balancing loss")
    scoring_func: Literal["softmax", "sigmoid"] = Field("softmax", description="router scores")
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = Field(
        "greedy", description="how experts are chosen: over all, within the best groups (V2), with a score bias (V3)"
    )
    n_group: int = Field(1, gt=0, description="expert groups of group-limited routing")
    topk_group: int = Field(1, gt=0, description="groups that a token may choose from")
    routed_scaling_factor: float = Field(1.0, gt=0, description="factor on the weights of routed experts")
    first_k_dense_replace: int = Field(0, ge=0, description="so many first layers are dense")
    decoder_sparse_step: int = Field(1, gt=0, description="every so many layers are MoE")
    mlp_only_layers: tuple[int, ...] = Field((), description="layers that are dense, by index")

    kv_lora_rank: int | None = Field(None, gt=0, description="MLA: width of the key/value latent; None: no MLA")
    q_lora_rank: int | None = Field(None, gt=0, description="MLA: width of the query latent; None: direct projection")
    qk_nope_head_dim: int = Field(0, ge=0, description="MLA: head width without RoPE")
    qk_rope_head_dim: int = Field(0, ge=0, description="MLA: head width with RoPE, the key part shared by the heads")
    v_head_dim: int = Field(0, ge=0, description="MLA: head width of the values")

    bos_token_id: int | None = Field(None, description="id of the token that begins a text, for generation_config.json")
    eos_token_id: int | tuple[int, ...] | None = Field(None, description="id(s) that end a text")
    pad_token_id: int | None = Field(None, description="id of the padding token")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Family traits, then what follows from other fields."""
        if not isinstance(values, dict):
            return values
        family = values.get("family", "llama")
        values = {**FAMILY_DEFAULTS.get(family, {}), **values}
        heads, width = values.get("num_attention_heads"), values.get("hidden_size")
        if family == "gpt2" and isinstance(width, int):
            values.setdefault("intermediate_size", 4 * width)
        if not values.get("num_key_value_heads") and heads is not None:
            values["num_key_value_heads"] = heads
        if values.get("kv_lora_rank"):
            values["head_dim"] = values.get("qk_nope_head_dim", 0) + values.get("qk_rope_head_dim", 0)
        elif not values.get("head_dim") and isinstance(heads, int) and heads > 0 and isinstance(width, int):
            if width % heads:
                raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}: set head_dim")
            values["head_dim"] = width // heads
        if values.get("attention_output_bias") is None:
            values["attention_output_bias"] = values.get("attention_bias", False)
        if values.get("num_experts") and not values.get("moe_intermediate_size"):
            values["moe_intermediate_size"] = values.get("intermediate_size", 0)
        return values

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        rotary = self.qk_rope_head_dim if self.is_mla else self.head_dim
        if self.position_embedding == "rope" and (rotary < 2 or rotary % 2):
            raise ValueError(f"RoPE needs an even head width, not {rotary}: change head_dim or num_attention_heads")
        if self.is_mla and not self.v_head_dim:
            raise ValueError("MLA (kv_lora_rank) needs v_head_dim")
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling)
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        if self.num_experts:
            self._check_router()
        return self

    def _check_router(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}"
            )
        if self.topk_method != "greedy":
            if self.num_experts % self.n_group:
                raise ValueError(f"num_experts {self.num_experts} is not a multiple of n_group {self.n_group}")
            if self.topk_group > self.n_group:
                raise ValueError(f"topk_group {self.topk_group} is more than n_group {self.n_group}")
            if self.topk_group * (self.num_experts // self.n_group) < self.num_experts_per_tok:
                raise ValueError(
                    f"topk_group {self.topk_group} groups of {self.num_experts // self.n_group} experts cannot give "
                    f"num_experts_per_tok {self.num_experts_per_tok}"
                )

    @property
    def is_mla(self) -> bool:
        """Multi-head latent attention (DeepSeek)."""
        return self.kv_lora_rank is not None

    @property
    def attention_value_dim(self) -> int:
        """Width of one head of values."""
        return self.v_head_dim if self.is_mla else self.head_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All ids that end a text."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) routes to experts (rules of DeepSeek and Qwen3-MoE together)."""
        return (
            self.num_experts > 0
            and layer >= self.first_k_dense_replace
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    def window(self, layer: int) -> int | None:
        """Sliding window of layer `layer` in tokens, None for full attention."""
        if self.layer_types is not None and self.layer_types[layer] == "full_attention":
            return None
        return self.sliding_window


def check_rope_scaling(scaling: dict[str, Any]) -> None:
    """Raise ValueError if `rope_scaling` names a type that is not implemented or lacks a parameter of its type."""
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_scaling: rope_type {rope_type!r} is not supported (supported: {', '.join(ROPE_TYPES)})")
    needed = {
        "default": (), "linear": ("factor",), "dynamic": ("factor",),
        "yarn": ("factor", "original_max_position_embeddings"),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[rope_type]  # fmt: skip
    for key in needed:
        if not isinstance(scaling.get(key), int | float):
            raise ValueError(f"rope_scaling: rope_type {rope_type!r} needs a number for {key!r}")
