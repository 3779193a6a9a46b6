"""AdamW and Muon against plain float64 references."""

import pytest
import torch
from torch import nn

from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.config import TrainConfig
from soma.train.optim import (
    NEWTON_SCHULZ,
    Muon,
    allocate_state,
    build_optimizers,
    orthogonalize,
    split_parameters,
    update_scale,
)

LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}


def reference_orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration on singular values, through an SVD in float64: X ← U (a·s + b·s³ + c·s⁵) Vᵀ."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("shape", [(48, 48), (32, 80), (80, 32), (1, 16)])
def test_newton_schulz_is_the_reference(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = reference_orthogonalize(matrix)
    assert (orthogonalize(matrix.double()) - expected).abs().max() < 1e-6
    assert (orthogonalize(matrix) - expected).abs().max() < 1e-4
    assert (orthogonalize(matrix.bfloat16()).double() - expected).abs().max() < 0.08 * expected.abs().max() + 0.01


def test_update_is_orthogonal() -> None:
    matrix = torch.randn(32, 96, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalize(matrix.bfloat16()).float())
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert torch.linalg.svdvals(matrix).max() > 10  # the control: before, it is far from it


def test_update_scale_gives_adamw_size() -> None:
    assert update_scale(256, 1024) == pytest.approx(6.4)
    for shape in ((64, 64), (64, 256), (256, 64)):
        update = orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(3))) * update_scale(*shape)
        assert 0.15 < update.square().mean().sqrt() < 0.25


@pytest.mark.parametrize("shape", [(24, 40), (3, 24, 16)])
def test_muon_step_is_the_reference(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    expected, momentum = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    muon = Muon([weight], lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
    for _ in range(4):
        grad = torch.randn(shape, generator=generator)
        weight.grad = grad.clone()
        muon.step()
        momentum = 0.9 * momentum + 0.1 * grad.double()
        direction = 0.1 * grad.double() + 0.9 * momentum
        stack = direction.reshape(-1, *shape[-2:])
        update = torch.stack([reference_orthogonalize(one) for one in stack]).reshape(shape)
        expected = expected * (1 - 0.02 * 0.1) - 0.02 * update_scale(*shape[-2:]) * update
    assert (weight - expected).abs().max() < 1e-4


def test_matrices_of_one_shape_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(5)
    pair = [nn.Parameter(torch.randn(16, 24, generator=generator)) for _ in range(2)]
    alone = nn.Parameter(pair[1].detach().clone())
    for parameter in (*pair, alone):
        parameter.grad = torch.randn(16, 24, generator=torch.Generator().manual_seed(int(parameter is pair[0])))
    Muon(pair, lr=0.1, dtype=torch.float32).step()
    Muon([alone], lr=0.1, dtype=torch.float32).step()
    assert (pair[1] - alone).abs().max() < 1e-5
    assert (pair[0] - alone).abs().max() > 1e-2


def names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    lookup = {id(parameter): name for name, parameter in model.named_parameters()}
    return {lookup[id(parameter)] for parameter in parameters}


def test_split_of_a_dense_model() -> None:
    model = Transformer(ModelConfig(family="gpt2", **LLAMA))
    split = split_parameters(model)
    hidden, plain = names(model, split["hidden"]), names(model, split["plain"])
    assert "layers.0.self_attn.q_proj.weight" in hidden
    assert {"embed_tokens.weight", "embed_positions.weight", "norm.weight", "layers.1.mlp.up_proj.bias"} <= plain
    assert not split["matrices"]  # the head is the embedding
    untied = Transformer(ModelConfig(family="llama", **LLAMA))
    assert names(untied, split_parameters(untied)["matrices"]) == {"lm_head.weight"}


def test_split_of_a_mixture_of_experts() -> None:
    model = Transformer(ModelConfig(family="mixtral", num_experts=4, **LLAMA))
    split = split_parameters(model)
    assert "layers.0.mlp.experts.down_proj" in names(model, split["hidden"])
    assert names(model, split["matrices"]) == {"lm_head.weight", "layers.0.mlp.gate.weight", "layers.1.mlp.gate.weight"}
    assert sum(map(len, split.values())) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay(optimizer: str) -> None:
    model = Transformer(ModelConfig(family="llama", **LLAMA))
    model.init_weights(0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = TrainConfig(optimizer=optimizer, learning_rate=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for one in build_optimizers(model, config, torch.float32):
        one.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if "norm" in name or "embed" in name else 1 - 0.1 * 0.5
        assert torch.allclose(parameter, before[name] * factor, atol=1e-7), name


def test_adamw_is_the_reference() -> None:
    """Kingma & Ba 2015 with decoupled decay (Loshchilov & Hutter 2019), in float64."""
    model = Transformer(ModelConfig(family="llama", **LLAMA))
    model.init_weights(0)
    config = TrainConfig(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-8)
    (adamw,) = build_optimizers(model, config, torch.float32)
    weight = model.layers[0].mlp.down_proj.weight
    expected = weight.detach().double()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 4):
        grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        weight.grad = grad.clone()
        adamw.step()
        first, second = 0.8 * first + 0.2 * grad, 0.9 * second + 0.1 * grad.double() ** 2
        update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * update
    assert (weight - expected).abs().max() < 1e-6


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_allocated_state_is_that_of_a_first_step(optimizer: str) -> None:
    model = Transformer(ModelConfig(family="llama", **LLAMA))
    config = TrainConfig(optimizer=optimizer)
    stepped, allocated = (build_optimizers(model, config, torch.float32) for _ in range(2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for one in stepped:
        one.step()
    allocate_state(allocated)
    for one, other in zip(stepped, allocated, strict=True):
        assert set(one.state) == set(other.state)
        for parameter, state in one.state.items():
            assert {key: (v.shape, v.dtype) for key, v in state.items()} == {
                key: (v.shape, v.dtype) for key, v in other.state[parameter].items()
            }
