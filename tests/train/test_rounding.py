"""Stochastic rounding: right in the mean, the same twice, and AdamW on bf16 weights that follows AdamW on fp32 ones."""

import pytest
import torch
from torch import nn

from soma.train.rounding import RoundedAdamW, noise, round_stochastically


def test_noise_is_uniform_and_its_own() -> None:
    assert noise(3, 1).tolist() == [37056, 8577, 59869]
    assert noise(2, 1, start=1).tolist() == [8577, 59869], "a piece draws what the whole does there"
    drawn = noise(1 << 18, 12345)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 1 << 16
    assert abs(float(drawn.double().mean()) - 32767.5) < 150  # 4 standard errors
    counts = torch.bincount(drawn >> 8, minlength=256).double()
    assert float(((counts - 1024) ** 2 / 1024).sum()) < 350  # chi-square, 255 degrees of freedom: p about 1e-4
    assert float(torch.corrcoef(torch.stack([drawn.double(), noise(1 << 18, 12346).double()]))[0, 1].abs()) < 0.01


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -2e-3, 1e30])
def test_rounding_is_right_in_the_mean(value: float) -> None:
    x = torch.full((1 << 16,), value)
    rounded = round_stochastically(x, noise(1 << 16, 7)).double()
    low, high = sorted(float(one) for one in rounded.unique())
    assert low <= float(x[0]) <= high
    assert abs(float(rounded.mean()) - float(x[0])) < 4 * (high - low) * 0.5 / 256
    nearest = x.to(torch.bfloat16).double()
    assert abs(float(nearest.mean()) - float(x[0])) > 0.05 * (high - low), "rounding to nearest is off every time"


def test_rounding_keeps_what_bf16_holds() -> None:
    exact = torch.tensor([0.0, -0.0, 1.5, -2.0, 2.0**-126, float("inf"), float("-inf")])
    assert torch.equal(round_stochastically(exact, noise(7, 3)).float(), exact)
    assert round_stochastically(torch.tensor([float("nan")]), noise(1, 3)).isnan().all()


def train(optimizer_of, dtype: torch.dtype, steps: int = 60) -> tuple[float, nn.Linear]:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).to(dtype)
    x = torch.randn(256, 64)
    target = x @ torch.randn(64, 64) * 0.1
    optimizer = optimizer_of(layer.parameters())
    for _ in range(steps):
        loss = ((x.to(dtype) @ layer.weight.T).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach()), layer


def test_small_updates_arrive() -> None:
    """A rate at which each update is below half of a weight's last bit: rounding to nearest learns next to nothing."""
    rate, steps = 2e-4, 300
    reference, _ = train(lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0), torch.float32, steps)
    start, _ = train(lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=0), torch.float32, 1)
    rounded, _ = train(lambda p: RoundedAdamW(p, lr=rate, betas=(0.9, 0.999), weight_decay=0), torch.bfloat16, steps)
    nearest, _ = train(lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0), torch.bfloat16, steps)
    assert start - rounded > 0.9 * (start - reference)
    assert start - nearest < 0.8 * (start - reference), "the negative control"


def test_the_same_twice_and_after_a_resumption() -> None:
    def optimizer_of(parameters):  # type: ignore[no-untyped-def]
        return RoundedAdamW(parameters, lr=1e-2, seed=5)

    _, whole = train(optimizer_of, torch.bfloat16, 8)
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    x = torch.randn(256, 64)
    target = x @ torch.randn(64, 64) * 0.1
    optimizer = optimizer_of(layer.parameters())
    for step in range(8):
        if step == 4:
            state, weights = optimizer.state_dict(), {name: t.clone() for name, t in layer.state_dict().items()}
            layer = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
            layer.load_state_dict(weights)
            optimizer = optimizer_of(layer.parameters())
            optimizer.load_state_dict(state)
            torch.manual_seed(99)  # its noise is no generator's
        loss = ((x.to(torch.bfloat16) @ layer.weight.T).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layer.weight, whole.weight)
    other = train(lambda p: RoundedAdamW(p, lr=1e-2, seed=6), torch.bfloat16, 8)[1]
    assert not torch.equal(other.weight, whole.weight)


def test_pieces_are_the_whole() -> None:
    layers = []
    for piece in (1 << 24, 1000):
        torch.manual_seed(0)
        layer = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
        layer.weight.grad = torch.randn(64, 64).to(torch.bfloat16)
        optimizer = RoundedAdamW(layer.parameters(), lr=1e-2)
        optimizer.piece = piece
        optimizer.step()
        layers.append(layer.weight)
    assert torch.equal(*layers)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes bf16 parameters, not torch\.float32"):
        RoundedAdamW(nn.Linear(2, 2).parameters(), lr=1e-3)
