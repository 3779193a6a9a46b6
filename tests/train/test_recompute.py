"""Activation checkpointing: the same gradients by every form, less memory by each, and budgets that hold."""

import pytest
import torch
from torch import Tensor

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.config import TrainConfig, checkpointing_form
from soma.train.recompute import inputs_bytes, kept_bytes, recompute_layers, within

SHAPE = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
MOE = SHAPE.model_copy(update={"family": "mixtral", "num_experts": 4, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 48, "router_aux_loss_coef": 0.1})  # fmt: skip
TOKENS = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(0))


def build(shape: ModelConfig = SHAPE) -> Transformer:
    model = Transformer(shape, dtype=torch.float32)
    model.init_weights(3)
    return model.train()


def forward(model: Transformer) -> Tensor:
    x_BTD, aux = model.features(TOKENS)
    return model.logits(x_BTD).logsumexp(-1).sum() + aux


def gradients(model: Transformer) -> dict[str, Tensor]:
    forward(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def kept_in_all(model: Transformer) -> int:
    """Bytes kept for the backward pass, each memory once, as the hooks of `saved_tensors_hooks` see them."""
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in seen.items() if place not in weights)


@pytest.mark.parametrize("mode", [True, "every:2", "every:3", "selective", "budget"])
@pytest.mark.parametrize("shape", [SHAPE, MOE], ids=["dense", "moe"])
def test_the_same_gradients(mode: bool | str, shape: ModelConfig) -> None:
    plain, model = gradients(build(shape)), build(shape)
    if mode == "budget":  # three quarters of what they keep
        mode = f"budget:{sum(kept_bytes(list(model.layers), lambda: forward(model))) * 0.75e-3}KB"
    assert recompute_layers(model, mode, lambda: forward(model)) > 0
    found = gradients(model)
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0, msg=name)


def test_each_form_keeps_less() -> None:
    sizes = {}
    for mode in (False, "every:2", True):
        model = build()
        recompute_layers(model, mode)
        sizes[mode] = kept_in_all(model)
    assert sizes[True] < sizes["every:2"] < sizes[False]


def test_selective_runs_no_product_twice() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    counts = {}
    for mode in (False, "selective", True):
        model = build()
        recompute_layers(model, mode)
        with Count() as counter:
            forward(model).backward()
        counts[mode] = counter.products
    assert counts["selective"] == counts[False] < counts[True]


def test_without_gradients_nothing_changes() -> None:
    model = build()
    recompute_layers(model, True)
    with torch.no_grad():
        assert torch.equal(forward(model), forward(build()))


def test_a_budget_is_held() -> None:
    model = build()
    kept, inputs = (
        kept_bytes(list(model.layers), lambda: forward(model)),
        inputs_bytes(list(model.layers), lambda: forward(model)),
    )
    assert inputs == [2 * 48 * 32 * 4] * 4
    assert len(set(kept[1:])) == 1
    assert kept[0] > 3 * inputs[0]
    half = sum(kept) * 3 // 4
    assert 0 < recompute_layers(model, f"budget:{half / 1000}KB", lambda: forward(model)) < 4
    assert recompute_layers(build(), "budget:1GB", lambda: forward(model)) == 0
    with pytest.raises(UserError, match=r"all 4 layers recomputing keep [\d,]+ bytes, more than the budget 1,000"):
        recompute_layers(model, "budget:1KB", lambda: forward(model))


def test_within() -> None:
    assert within(330, [100] * 4, [10] * 4) == [0, 1]
    assert within(400, [100] * 4, [10] * 4) == []


def test_settings() -> None:
    assert checkpointing_form(False) == ("none", 0)
    assert checkpointing_form(True) == ("every", 1)
    assert checkpointing_form("every:4") == ("every", 4)
    assert checkpointing_form("selective") == ("selective", 0)
    assert checkpointing_form("budget:1.5GB") == ("budget", 1_500_000_000)
    assert checkpointing_form("budget:2GiB") == ("budget", 2**31)
    for wrong in ("some", "every:0", "every", "budget:8", "budget:xGB", "selective:2"):
        with pytest.raises(ValueError, match="expected false, true"):
            TrainConfig(activation_checkpointing=wrong)
