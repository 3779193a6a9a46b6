"""The Transformer by itself: numbers worked by hand, initialization, masks, caches, compilation, fusing."""

import copy
import math
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from family_cases import random_tokens
from pydantic import ValidationError

from soma.base.errors import UserError
from soma.model.attention import make_mask
from soma.model.cache import KVCache
from soma.model.config import ModelConfig
from soma.model.rope import Rope, rotate, yarn_mscale
from soma.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15,
)  # fmt: skip
GPT2 = ModelConfig(
    family="gpt2", vocab_size=131, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=16,
)  # fmt: skip


def test_config_fills_what_follows_and_refuses_what_cannot_be() -> None:
    assert (SMALL.head_dim, SMALL.norm, SMALL.activation) == (16, "rmsnorm", "swiglu")
    assert (GPT2.intermediate_size, GPT2.norm, GPT2.num_key_value_heads) == (256, "layernorm", 4)
    assert GPT2.tie_word_embeddings
    base = SMALL.model_dump()
    for change, says in (
        ({"num_key_value_heads": 3}, "not a multiple"), ({"head_dim": 15}, "even head width"),
        ({"family": "mamba"}, "family"), ({"hidden_sise": 3}, "hidden_sise"),
        ({"layer_types": ("full_attention",)}, "1 entries"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "more than"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=says):
            ModelConfig(**{**base, **change})
    with pytest.raises(ValidationError, match="not a multiple of num_attention_heads"):
        ModelConfig(vocab_size=9, hidden_size=10, intermediate_size=8, num_hidden_layers=1, num_attention_heads=3)


def test_yarn_worked_number() -> None:
    assert yarn_mscale(4) == pytest.approx(1.1386, abs=1e-4)
    assert yarn_mscale(0.5) == 1.0


def test_rotation_turns_pairs_by_position_times_frequency() -> None:
    config = ModelConfig(vocab_size=9, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    cos, sin = Rope(config)(torch.tensor([3]), torch.float32)
    x = torch.tensor([[[[1.0, 0.0, 0.0, 1.0]]]])  # pairs (0, 2) and (1, 3), frequencies 1 and 0.01
    expected = [math.cos(3), -math.sin(0.03), math.sin(3), math.cos(0.03)]
    torch.testing.assert_close(rotate(x, cos, sin).flatten(), torch.tensor(expected))


def test_frequencies_survive_casts_and_meta_devices() -> None:
    model = Transformer(SMALL)
    assert model.rope is not None
    frequencies = model.rope.inv_freq.clone()
    model.bfloat16().float()
    assert torch.equal(model.rope.inv_freq, frequencies)
    meta = Transformer(SMALL, device="meta")
    meta.to_empty(device="cpu")
    assert meta.rope is not None
    assert torch.equal(meta.rope.inv_freq, frequencies)
    assert "rope.inv_freq" not in model.state_dict()


def test_initialization_depends_on_the_seed_alone() -> None:
    model, other = Transformer(SMALL), Transformer(SMALL, device="meta")
    other.to_empty(device="cpu")
    torch.manual_seed(7)
    other.init_weights(0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    other.init_weights(1)
    assert not torch.equal(model.embed_tokens.weight, other.embed_tokens.weight)
    half = Transformer(SMALL, dtype=torch.bfloat16)
    assert torch.equal(half.embed_tokens.weight, model.embed_tokens.weight.bfloat16())
    layer = model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.15, rel=0.1)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.15 / math.sqrt(6), rel=0.1)
    assert torch.equal(model.norm.weight, torch.ones(64))
    assert Transformer(GPT2).layers[0].self_attn.q_proj.bias.abs().max() == 0


def test_masks() -> None:
    cpu = torch.device("cpu")
    assert make_mask(5, 0, None, None, cpu) is None
    assert make_mask(5, 0, 5, None, cpu) is None
    assert make_mask(1, 9, 3, None, cpu) is None
    expected = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]).bool()  # tokens 2 and 3 see two tokens each
    mask = make_mask(2, 2, 2, None, cpu)
    assert mask is not None
    assert torch.equal(mask, expected)
    packed = make_mask(3, 0, None, torch.tensor([[0, 1, 1]]), cpu)
    assert packed is not None
    assert torch.equal(packed[0, 0], torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1]]).bool())


@torch.inference_mode()
def test_padding_does_not_reach_the_tokens() -> None:
    model = Transformer(SMALL)
    tokens_BT = random_tokens(1, 8)
    ids_BT = torch.tensor([[0] * 5 + [-1] * 3])
    logits = model(tokens_BT, document_ids_BT=ids_BT)
    tokens_BT[:, 5:] = 1
    assert torch.equal(model(tokens_BT, document_ids_BT=ids_BT)[:, :5], logits[:, :5])
    assert logits.isfinite().all()


@torch.inference_mode()
def test_cache_limits() -> None:
    model = Transformer(SMALL)
    cache = KVCache(SMALL, 1, 8)
    assert cache.nbytes == 3 * 2 * 2 * 8 * 16 * 4
    model(random_tokens(1, 8), cache=cache)
    with pytest.raises(UserError, match="the cache holds 8 of 8 tokens"):
        model(random_tokens(1, 1), cache=cache)
    with pytest.raises(UserError, match="holds 1 sequences, the batch has 2"):
        model(random_tokens(2, 1), cache=cache)
    cache.reset()
    model(random_tokens(1, 8), cache=cache)
    with pytest.raises(UserError, match="17 tokens are more than this model's 16 learned positions"):
        Transformer(GPT2)(random_tokens(1, 17))


@torch.inference_mode()
def test_fused_layers_give_the_same_and_are_undone_by_a_cast() -> None:
    model = Transformer(SMALL.model_copy(update={"attention_bias": True}))
    plain = copy.deepcopy(model)
    tokens_BT = random_tokens(1, 9)
    model.fuse()
    attention = model.layers[0].self_attn
    assert attention.fused is not None
    assert attention.k_proj.weight.untyped_storage().data_ptr() == attention.fused.untyped_storage().data_ptr()
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(tokens_BT), plain(tokens_BT), atol=2e-5, rtol=0)
    model.bfloat16()
    assert attention.fused is None
    torch.testing.assert_close(model(tokens_BT), plain.bfloat16()(tokens_BT), atol=0, rtol=0)


def test_training_compiles_without_graph_breaks() -> None:
    for config in (SMALL, GPT2):
        model = Transformer(config).train()
        compiled = torch.compile(model.features, fullgraph=True, backend="aot_eager")
        tokens_BT, ids_BT = random_tokens(2, 12), torch.tensor([[0] * 5 + [1] * 7] * 2)
        for arguments in ((), (torch.arange(12).expand(2, -1), ids_BT)):
            expected = model.features(tokens_BT, *arguments)[0]
            torch.testing.assert_close(compiled(tokens_BT, *arguments)[0], expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_decode_step_compiles_for_all_positions() -> None:
    model = Transformer(SMALL).fuse()
    tokens_BT = random_tokens(1, 24)
    expected = model(tokens_BT)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.forward, fullgraph=True, backend=counter)
    cache = KVCache(SMALL, 1, 24)
    model(tokens_BT[:, :4], cache=cache)
    for position in range(4, 24):
        logits = step(tokens_BT[:, position : position + 1], cache=cache)
        torch.testing.assert_close(logits[:, 0], expected[:, position], atol=5e-5, rtol=0)
    assert counter.frame_count <= 3, "graphs for the first position, for those after it, and for the last of the cache"


LIGHT = ["config", "families", "layout", "formulas", "tokenizer", "chat", "sentencepiece_model", "folder"]


def test_light_modules_load_no_torch() -> None:
    imports = "; ".join(f"import soma.model.{name}" for name in LIGHT)
    code = f"import sys; {imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
