"""Matrix-vector products with what is fused around them, in Triton's interpreter against float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from soma.model.kernels import reference
from soma.model.kernels.gemv import gemv
from soma.model.kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU these run as benchmarks/engine_gpu.py --check")
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("columns", [64, 100, 2100, 9000])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_gemv(columns: int, gated: bool, extra: bool, dtype: torch.dtype) -> None:
    rows = 12
    weight = (torch.randn(rows + 3, columns + 5) / columns**0.5).to(dtype)[:rows, :columns]  # strided rows
    x, bias = torch.randn(1, columns).to(dtype), torch.randn(rows).to(dtype)
    residual = torch.randn(1, rows // 2 if gated else rows).to(dtype)
    found = gemv(x, weight, bias if extra else None, gated=gated, residual_1N=residual if extra else None)
    expected = F.linear(x.double(), weight.double(), bias.double() if extra else None)
    if gated:
        expected = reference.swiglu(*expected.chunk(2, 1))
    bare = expected
    if extra:
        expected = expected + residual.double()
    assert reference.relative_error(found, expected) < BOUNDS[dtype]
    assert not extra or reference.relative_error(found, bare) > 1e-2
