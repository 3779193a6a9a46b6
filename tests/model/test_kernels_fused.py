"""RMSNorm, RoPE with the cache write, and SwiGLU in Triton's interpreter against float64."""

import pytest
import torch

pytest.importorskip("triton")

from soma.model.kernels import fused, reference
from soma.model.kernels.launch import INTERPRETED
from soma.model.rope import rotate

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU these run as benchmarks/attention.py --check")
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("rows", "width"), [(3, 64), (5, 576), (1, 1000)])
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(rows, 2 * width).to(dtype)[:, :width] for _ in range(2))  # strided rows
    weight = torch.randn(width).to(dtype)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert reference.relative_error(fused.rms_norm(x, weight, 1e-5), expected) < BOUNDS[dtype]
    out, added = fused.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(added, x + residual)
    expected = reference.rms_norm(added.double(), weight.double(), 1e-5)
    assert reference.relative_error(out, expected) < BOUNDS[dtype]
    assert reference.relative_error(out, fused.rms_norm(x, weight, 1e-5).double()) > 0.1  # the residual counts


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "page"), [(4, 2, 32, 16), (3, 1, 80, 8), (2, 2, 128, 16)])
def test_rope_and_cache_write(heads: int, kv_heads: int, width: int, page: int, dtype: torch.dtype) -> None:
    tokens = 7
    qkv = torch.randn(tokens, heads + 2 * kv_heads, width).to(dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    angle = torch.rand(tokens, width // 2) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    keys, values = (torch.randn(5, kv_heads, page, width).to(dtype) for _ in range(2))
    slots = torch.randperm(5 * page)[:tokens]
    expected_q, expected_k = (reference.rotate(x.double(), cos.double(), sin.double()) for x in (q, k))
    expected_keys, expected_values = reference.write(expected_k, keys, slots), reference.write(v, values, slots)
    rotated = fused.rope_write(q, k, v, cos, sin, keys, values, slots.int())
    assert reference.relative_error(rotated, expected_q) < BOUNDS[dtype]
    assert reference.relative_error(keys, expected_keys) < BOUNDS[dtype]
    assert torch.equal(values, expected_values)
    # The reference is the model's own rotation.
    model_q = rotate(q.double().transpose(0, 1), cos.double(), sin.double()).transpose(0, 1)
    assert reference.relative_error(expected_q, model_q) < 1e-12
    # Rotated the other way it does not pass.
    assert reference.relative_error(rotated, reference.rotate(q.double(), cos.double(), -sin.double())) > 1e-2


@pytest.mark.parametrize("dtype", BOUNDS)
def test_swiglu(dtype: torch.dtype) -> None:
    gate, up = (torch.randn(3, 2 * 1100) * 4).to(dtype).split(1100, 1)
    found = fused.swiglu(gate, up)
    assert reference.relative_error(found, reference.swiglu(gate.double(), up.double())) < BOUNDS[dtype]
    assert reference.relative_error(found, reference.swiglu(up.double(), gate.double())) > 1e-2


def test_fp8_cache_write() -> None:
    """Numbers of the format are stored as they are (the interpreter misrounds others), larger ones as its largest."""
    stored = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    stored = stored[stored.isfinite()]
    k, v = (stored[torch.randint(len(stored), (7, 2, 32))] for _ in range(2))
    v[3, 1, 5], k[2, 0, 1] = 1e4, -500.0
    keys, values = (torch.zeros(5, 2, 4, 32).to(torch.float8_e4m3fn) for _ in range(2))
    slots = torch.randperm(20)[:7]
    cos, sin = torch.ones(7, 16), torch.zeros(7, 16)
    q = torch.randn(7, 4, 32)
    assert torch.equal(fused.rope_write(q, k, v, cos, sin, keys, values, slots.int()), q)
    for cache, new in ((keys, k), (values, v)):
        expected = reference.write(new.clamp(-448, 448), torch.zeros(5, 2, 4, 32), slots)
        assert torch.equal(cache.float(), expected)
    assert values.float().max() == 448
