"""The router, the experts and the balancing loss."""

import pytest
import torch
import torch.nn.functional as F
from family_cases import random_tokens

from soma.model.config import ModelConfig
from soma.model.moe import MoE, grouped_linear, load_balancing_loss
from soma.model.transformer import Transformer

MIXTRAL = ModelConfig(
    family="mixtral", vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.02, initializer_range=0.2,
)  # fmt: skip


def test_load_balancing_loss_worked_numbers() -> None:
    scores = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    assert load_balancing_loss(scores, torch.tensor([[0], [0]])).item() == pytest.approx(1.4)
    # Balanced: 1 for top-1; K for top-k (Mixtral).
    even = torch.full((4, 4), 0.25)
    assert load_balancing_loss(even, torch.tensor([[0], [1], [2], [3]])).item() == pytest.approx(1.0)
    assert load_balancing_loss(even, torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]])).item() == pytest.approx(2.0)
    # Padding does not count.
    padded = torch.cat((scores, torch.tensor([[0.0, 1.0]])))
    keep = torch.tensor([True, True, False])
    assert load_balancing_loss(padded, torch.tensor([[0], [0], [1]]), keep).item() == pytest.approx(1.4)


def test_load_balancing_loss_equals_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits_NE = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    scores_NE = logits_NE.softmax(-1)
    ours = load_balancing_loss(scores_NE, scores_NE.topk(2).indices)
    assert ours.item() == pytest.approx(float(load_balancing_loss_func((logits_NE,), 6, 2)), rel=1e-6)


def test_aux_loss_is_the_weighted_mean_over_layers_in_training_only() -> None:
    model = Transformer(MIXTRAL)
    tokens_BT = random_tokens(2, 10)
    assert model.train().features(tokens_BT)[1].item() > 0.02 * 2 * 0.9
    assert model.eval().features(tokens_BT)[1].item() == 0
    dense = Transformer(MIXTRAL.model_copy(update={"num_experts": 0})).train()
    assert dense.features(tokens_BT)[1].item() == 0


def test_grouped_linear_equals_a_loop_with_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([4, 0, 2, 3])
    plain = torch.cat([F.linear(rows, weight[e]) for e, rows in enumerate(x.split(counts.tolist()))])
    torch.testing.assert_close(grouped_linear(x, weight, counts), plain)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, counts), (x, weight))
    torch.library.opcheck(grouped_linear, (x.detach(), weight.detach(), counts))


def test_experts_equal_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    moe = MoE(MIXTRAL).eval()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BTD = torch.randn(2, 7, 32)
    out_BTD = moe(x_BTD, None)[0]
    experts = moe.experts
    for b in range(2):
        for t in range(7):
            x = x_BTD[b, t]
            weights, chosen = (moe.gate.weight @ x).softmax(-1).topk(2)
            total = torch.zeros(32)
            for weight, e in zip(weights / weights.sum(), chosen.tolist(), strict=True):
                inner = F.silu(experts.gate_proj[e] @ x) * (experts.up_proj[e] @ x)
                total += weight * (experts.down_proj[e] @ inner)
            torch.testing.assert_close(out_BTD[b, t], total, atol=1e-5, rtol=1e-4)


def test_score_bias_stays_float32_and_is_saved() -> None:
    config = ModelConfig(
        family="deepseek_v3", vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        num_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=0,
        moe_intermediate_size=16,
    )  # fmt: skip
    model = Transformer(config)
    bias = torch.linspace(0.1, 0.8, 8)
    model.layers[0].mlp.gate.e_score_correction_bias.copy_(bias)
    model.bfloat16()
    assert torch.equal(model.state_dict()["layers.0.mlp.gate.e_score_correction_bias"], bias)


def test_autocast_and_compile_without_graph_breaks() -> None:
    model = Transformer(MIXTRAL).train()
    tokens_BT = random_tokens(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        x_BTD, aux = model.features(tokens_BT)
        (model.logits(x_BTD).float().mean() + aux).backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    compiled = torch.compile(model.features, fullgraph=True, backend="aot_eager")
    x_BTD, aux = compiled(tokens_BT)
    (x_BTD.mean() + aux).backward()
    torch.testing.assert_close(x_BTD, model.features(tokens_BT)[0], atol=1e-5, rtol=0)
