"""The formulas against the model itself, and their worked numbers."""

import pytest
from family_cases import CASES

from soma.model.cache import KVCache
from soma.model.config import ModelConfig
from soma.model.families import config_from_hf
from soma.model.formulas import active_parameter_count, flops_per_token, kv_cache_bytes, parameter_count
from soma.model.transformer import Transformer

LLAMA_2_7B = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=4096,
)  # fmt: skip


def test_worked_numbers_of_llama_2_7b() -> None:
    assert parameter_count(LLAMA_2_7B) == active_parameter_count(LLAMA_2_7B) == 6_738_415_616
    assert kv_cache_bytes(LLAMA_2_7B, 1) == 524_288
    # 6 · (parameters - embedding - norms) + 12 · layers · width · length
    by_hand = 6 * (6_738_415_616 - 32000 * 4096 - 65 * 4096) + 12 * 32 * 4096 * 4096
    assert flops_per_token(LLAMA_2_7B, 4096) == by_hand == pytest.approx(46.1e9, rel=1e-3)
    windowed = LLAMA_2_7B.model_copy(update={"sliding_window": 1024})
    assert by_hand - flops_per_token(windowed, 4096) == 12 * 32 * 4096 * 3072


@pytest.mark.parametrize("name", list(CASES))
def test_counts_equal_the_model(name: str) -> None:
    model_type, arguments = CASES[name]
    config = config_from_hf({"model_type": model_type, **arguments}, "")
    model = Transformer(config, device="meta")
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    assert kv_cache_bytes(config, 2 * 10, 4) == KVCache(config, 2, 10).nbytes
    if config.num_experts:
        layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
        idle = config.num_experts - config.num_experts_per_tok
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        assert parameter_count(config) - active_parameter_count(config) == layers * idle * expert
