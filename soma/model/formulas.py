"""Parameters, FLOPs and cache memory of a model, from its config alone. Loads no torch.

Worked numbers, for Llama-2-7B (32 layers of 4096, 32 heads, inner width 11008, 32000 tokens): 6,738,415,616
parameters; 524,288 bytes of keys and values a token in 16 bits; 46.1 GFLOP a trained token at 4096 tokens.
"""

from soma.model.config import ModelConfig


def linear(width_in: int, width_out: int, bias: bool | None = False) -> int:
    """Parameters of a linear layer."""
    return (width_in + bool(bias)) * width_out


def attention_matrices(config: ModelConfig) -> int:
    """Parameters of one attention block's projections."""
    D, H, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
    query, output = H * config.head_dim, linear(H * config.attention_value_dim, D, config.attention_output_bias)
    if not config.is_mla:
        return linear(D, query + 2 * config.num_key_value_heads * config.head_dim, bias) + output
    assert config.kv_lora_rank is not None
    latent = linear(D, config.kv_lora_rank + config.qk_rope_head_dim, bias)
    latent += config.kv_lora_rank * H * (config.qk_nope_head_dim + config.v_head_dim)
    if config.q_lora_rank is None:
        return linear(D, query) + latent + output
    return linear(D, config.q_lora_rank, bias) + linear(config.q_lora_rank, query) + latent + output


def mlp_matrices(config: ModelConfig, inner: int) -> int:
    """Parameters of one dense MLP of inner width `inner`."""
    ups = 2 if config.activation == "swiglu" else 1
    return linear(config.hidden_size, ups * inner, config.mlp_bias) + linear(inner, config.hidden_size, config.mlp_bias)


def moe_matrices(config: ModelConfig, experts: int) -> int:
    """Parameters of one MoE block with `experts` of its routed experts counted, router and shared experts included."""
    D, inner = config.hidden_size, config.moe_intermediate_size
    shared = mlp_matrices(config, inner * config.n_shared_experts) if config.n_shared_experts else 0
    return D * config.num_experts + experts * 3 * D * inner + shared


def layer_matrices(config: ModelConfig, active: bool) -> int:
    """Parameters of the matrices of all layers; `active`: only the routed experts that one token visits."""
    total = 0
    for layer in range(config.num_hidden_layers):
        total += attention_matrices(config)
        if config.is_moe_layer(layer):
            total += moe_matrices(config, config.num_experts_per_tok if active else config.num_experts)
        else:
            total += mlp_matrices(config, config.intermediate_size)
    return total


def norm_parameters(config: ModelConfig) -> int:
    """Parameters of all norms."""
    width = config.hidden_size * (2 if config.norm == "layernorm" else 1)
    inside = 2 * config.head_dim if config.qk_norm and not config.is_mla else 0
    if config.is_mla:
        assert config.kv_lora_rank is not None
        inside = config.kv_lora_rank + (config.q_lora_rank or 0)
    return config.num_hidden_layers * (2 * width + inside) + width


def embedding_parameters(config: ModelConfig) -> int:
    """Parameters of the token and position embeddings, without the output layer."""
    positions = config.max_position_embeddings if config.position_embedding == "learned" else 0
    return (config.vocab_size + positions) * config.hidden_size


def parameter_count(config: ModelConfig) -> int:
    """All trained parameters; a tied output layer counts once. (DeepSeek-V3's score biases are no parameters.)"""
    output = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return embedding_parameters(config) + layer_matrices(config, active=False) + norm_parameters(config) + output


def active_parameter_count(config: ModelConfig) -> int:
    """Parameters that one token passes through: `parameter_count` with K routed experts a layer in place of all."""
    idle = layer_matrices(config, active=False) - layer_matrices(config, active=True)
    return parameter_count(config) - idle


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """FLOPs of training on one token (forward and backward), by the convention of PaLM (arXiv:2204.02311, appendix B).

    6 per parameter of every matrix that a token is multiplied with, the output layer included (tied or not), lookups
    and norms not; plus 6·H·(query width + value width)·S a layer for attention, S = sequence_length or the layer's
    window if that is shorter. Causal attention is not halved and recomputation not counted.
    """
    matrices = layer_matrices(config, active=True) + config.vocab_size * config.hidden_size
    widths = config.num_attention_heads * (config.head_dim + config.attention_value_dim)
    windows = [config.window(layer) or sequence_length for layer in range(config.num_hidden_layers)]
    seen = sum(min(sequence_length, window) for window in windows)
    return 6 * matrices + 6 * widths * seen


def kv_cache_bytes(config: ModelConfig, tokens: int, bytes_per_value: int = 2) -> int:
    """Bytes that the cache of `tokens` tokens takes (all sequences together); MLA caches its latent."""
    if config.is_mla:
        assert config.kv_lora_rank is not None
        values = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        values = 2 * config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * tokens * values * bytes_per_value
