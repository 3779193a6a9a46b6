"""8-bit linear layers: the product and both gradients near those of bf16, on what the CPU has of these products."""

import copy

import pytest
import torch
from torch import nn

from soma.model.config import ModelConfig
from soma.model.float8 import E4M3, E5M2, Float8Linear, to_float8, use_float8, why_not
from soma.model.transformer import Transformer


def test_rounding_to_8_bits() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 30
    for dtype, bits in ((E4M3, 3), (E5M2, 2)):
        rounded, scale = to_float8(x, dtype)
        assert rounded.dtype == dtype
        back = rounded.float() * scale
        large = x.abs() > x.abs().max() / 64  # the others may be subnormal
        assert float(((back - x) / x)[large].abs().max()) <= 2.0 ** -(bits + 1) * 1.01
    assert not to_float8(torch.zeros(4, 4), E4M3)[0].float().any(), "no division by zero"


def test_product_and_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(48, 64, dtype=torch.bfloat16, requires_grad=True)
    layer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    eight = copy.deepcopy(layer)
    eight.__class__ = Float8Linear
    seed = torch.randn(48, 32, dtype=torch.bfloat16)
    results = []
    for module in (layer, eight):
        y = module(x)
        y.backward(seed)
        results.append((y.detach().float(), x.grad.float(), module.weight.grad.float()))
        x.grad = None
    for name, (plain, rounded) in zip(("y", "dx", "dW"), zip(*results, strict=True), strict=True):
        error = float((plain - rounded).norm() / plain.norm())
        assert 1e-4 < error < 0.08, (name, error)  # 8-bit rounding, no less and no more


def test_a_small_model_learns_as_well() -> None:
    shape = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    tokens = torch.randint(64, (1, 33), generator=torch.Generator().manual_seed(1))
    losses = {}
    for eight in (False, True):
        model = Transformer(shape, dtype=torch.bfloat16)
        if eight:
            assert use_float8(model) == 7
            assert type(model.lm_head) is nn.Linear if model.lm_head is not None else True
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(25):
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[eight] = float(loss.detach())
    assert losses[False] < 3.5, "it learns"
    assert abs(losses[True] - losses[False]) < 0.1 * losses[False]


def test_what_is_left_alone() -> None:
    shape = ModelConfig(
        vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    assert use_float8(Transformer(shape, dtype=torch.bfloat16)) == 0, "24 is no multiple of 16"
    assert why_not(torch.device("cpu")) == "8-bit products need a GPU"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    assert why_not(torch.device("cuda")) is None
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer = Float8Linear(256, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    plain = nn.functional.linear(x, layer.weight)
    y = layer(x)
    y.sum().backward()
    assert float((y - plain).float().norm() / plain.float().norm()) < 0.08
