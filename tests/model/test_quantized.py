"""Weights of 8 and 4 bits: packing, rounding, and the layer that multiplies with them."""

import pytest
import torch
import torch.nn.functional as F
from tiny import make_config

from soma.base.errors import UserError
from soma.model.quantized import LOWEST, QuantizedLinear, pack, quantize, round_to_nearest, unpack
from soma.model.transformer import Transformer


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (1, 1), (33, 70), (48, 128)])
def test_unpack_is_the_inverse_of_pack(bits: int, rows: int, columns: int) -> None:
    values_NK = torch.randint(LOWEST[bits], -LOWEST[bits], (rows, columns)).to(torch.int8)
    packed = pack(values_NK, bits)
    assert packed.shape == (-(-rows // 16), -(-columns // 32), 64 * bits)
    assert torch.equal(unpack(packed, bits, rows, columns), values_NK)


def test_layout() -> None:
    """Row 1, column 5 is in the second vector of its group: byte 64 + 4·1 + 1; in 4 bits a high half, byte 5."""
    values_NK = torch.zeros(16, 32, dtype=torch.int8)
    values_NK[1, 5] = 3
    eight, four = pack(values_NK, 8)[0, 0], pack(values_NK, 4)[0, 0]
    assert (eight != 128).nonzero().tolist() == [[69]]
    assert eight[69] == 131
    assert (four != 0x88).nonzero().tolist() == [[5]]
    assert four[5] == 0xB8


def test_worked_example() -> None:
    values, scales = round_to_nearest(torch.tensor([[-4.0, 1.0, 2.0]]), 4)
    assert (values.tolist(), scales.tolist()) == ([[-8, 2, 4]], [[0.5]])
    values, scales = round_to_nearest(torch.tensor([[4.0, 1.0, 2.0]]), 4)
    assert (values.tolist(), scales.tolist()) == ([[-8, -2, -4]], [[-0.5]])
    values, scales = round_to_nearest(torch.tensor([[127.0, -63.4, 0.4]]), 8)
    assert (values.tolist(), scales.tolist()) == ([[127, -63, 0]], [[1.0]])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, 128, 200])
def test_error_is_half_a_step(bits: int, group: int) -> None:
    """Each weight is within half a scale of what is stored (a whole one at 4 bits' far end); bits matter."""
    weight_NK = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    layer = QuantizedLinear.from_weight(weight_NK, bits, group=group)
    _, scales = round_to_nearest(weight_NK, bits, group)
    steps = scales.float().abs().repeat_interleave(group, dim=1)[:, :200]
    error = (layer.dequantize() - weight_NK).abs()
    assert (error <= steps * (1.001 if bits == 4 else 0.51)).all()
    assert error.mean() > 0.2 * steps.mean()


def test_zero_rows_and_the_smallest_numbers() -> None:
    weight_NK = torch.zeros(2, 64)
    weight_NK[1, 40] = 1e-12
    for bits in (8, 4):
        assert torch.equal(QuantizedLinear.from_weight(weight_NK, bits).dequantize(), torch.zeros(2, 64))


@pytest.mark.parametrize("bits", [8, 4])
def test_layer(bits: int) -> None:
    weight_NK, bias_N = torch.randn(20, 70), torch.randn(20)
    layer = QuantizedLinear.from_weight(weight_NK, bits, bias_N)
    x = torch.randn(2, 3, 70)
    assert torch.equal(layer(x), F.linear(x, layer.dequantize(), bias_N))
    error = (layer(x) - F.linear(x, weight_NK, bias_N)).std() / weight_NK.norm(dim=1).mean()
    assert 1e-4 < error < (0.01 if bits == 8 else 0.15)
    assert layer.to(torch.bfloat16).scales.dtype == torch.float16


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="3 bits"):
        QuantizedLinear(torch.zeros(1, 32), torch.zeros(1, 1), 3)
    with pytest.raises(UserError, match="groups of 48"):
        QuantizedLinear.from_weight(torch.zeros(1, 96), 8, group=48)


@pytest.mark.parametrize("tied", [True, False])
def test_model(tied: bool) -> None:
    """8 bits change logits by less than 4 bits; the embedding stays; fuse leaves rounded layers alone."""
    tokens_BT = torch.randint(99, (1, 20), generator=torch.Generator().manual_seed(0))

    def logits(bits: int | None, head_bits: int | None = None) -> torch.Tensor:
        model = Transformer(make_config(99, tie_word_embeddings=tied))
        if bits:
            quantize(model, bits, head_bits=head_bits).fuse()
            assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
        with torch.no_grad():
            return model(tokens_BT)[0]

    right, eight, four, mixed = logits(None), logits(8), logits(4), logits(4, 8)
    errors = [((other - right).abs().mean() / right.std()).item() for other in (eight, mixed, four)]
    assert errors[0] < 0.03 < errors[1] < 0.5
    assert errors[1] < errors[2]
