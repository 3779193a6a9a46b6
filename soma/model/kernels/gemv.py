"""Matrix-vector products of one token, with the activation or the residual sum behind them.

One token reads every weight once and does next to nothing with it: memory sets the pace. On an H200 in bf16, 4,096
columns: 3,752 GB/s for 6,144 rows (cuBLAS 2,864) and 4,529 for 128,256 (cuBLAS 4,218); a copy reaches 4,279. The norm
before a product is a kernel of its own (2 µs): inside, each row would compute it again, at 4 to 5 µs a product.
Arithmetic is float32 and rounds once.

On Hopper GPUs a product is launched while the kernel before it ends (programmatic dependent launch) and loads its first
weights before it waits for its input: about 1 µs less each.

Shape letters: N rows, K columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from soma.model.kernels.launch import launches_early

MANY = 8192  # columns from which on a program goes in smaller steps, without loading ahead


@triton.jit
def gemv_kernel(
    x, weight, bias, residual, out, stride,
    COLUMNS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program: one row, or with GATED the row of the gate and that of the same number in the other half.

    AHEAD: a step's weights are loaded before the step in front of it is computed, the first before x is there.
    """
    row = tl.program_id(0).to(tl.int64)
    if EARLY:
        gdc_launch_dependents()
    columns = tl.arange(0, BLOCK_K)
    gate_row = weight + row * stride
    up_row = gate_row + tl.num_programs(0) * stride
    sums = tl.zeros([BLOCK_K], dtype=tl.float32)
    ups = tl.zeros([BLOCK_K], dtype=tl.float32)
    if AHEAD:
        gate = tl.load(gate_row + columns, mask=columns < COLUMNS, other=0.0)
        if GATED:
            up = tl.load(up_row + columns, mask=columns < COLUMNS, other=0.0)
    if EARLY:
        gdc_wait()
    for start in range(0, COLUMNS, BLOCK_K):
        here = start + columns
        value = tl.load(x + here, mask=here < COLUMNS, other=0.0).to(tl.float32)
        if AHEAD:
            sums += gate.to(tl.float32) * value
            there = here + BLOCK_K
            gate = tl.load(gate_row + there, mask=there < COLUMNS, other=0.0)
            if GATED:
                ups += up.to(tl.float32) * value
                up = tl.load(up_row + there, mask=there < COLUMNS, other=0.0)
        else:
            sums += tl.load(gate_row + here, mask=here < COLUMNS, other=0.0).to(tl.float32) * value
            if GATED:
                ups += tl.load(up_row + here, mask=here < COLUMNS, other=0.0).to(tl.float32) * value
    total = tl.sum(sums, 0)
    if BIAS:
        total += tl.load(bias + row).to(tl.float32)
    if GATED:
        other = tl.sum(ups, 0)
        if BIAS:
            other += tl.load(bias + row + tl.num_programs(0)).to(tl.float32)
        total = total / (1 + tl.exp(-total)) * other
    if ADD:
        total += tl.load(residual + row).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty))


def gemv(
    x_1K: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, gated: bool = False,
    residual_1N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x · weightᵀ + bias (1, N) for one token x (1, K), in x's dtype.

    gated: the rows are gate and up of a SwiGLU, one behind the other, and the result is silu(gate) · up (1, N/2).
    residual_1N: added to the result. Weights and biases must not be written while a step runs.
    """
    N, K = weight_NK.shape
    rows = N // 2 if gated else N
    assert x_1K.shape == (1, K)
    assert x_1K.stride(1) == weight_NK.stride(1) == 1
    assert residual_1N is None or (residual_1N.shape == (1, rows) and residual_1N.stride(1) == 1)
    out_1N = torch.empty(1, rows, dtype=x_1K.dtype, device=x_1K.device)
    block, warps = (512, 4) if K > MANY else (1024, 8)
    early = launches_early(x_1K.device)
    gemv_kernel[(rows,)](
        x_1K, weight_NK, x_1K if bias_N is None else bias_N, x_1K if residual_1N is None else residual_1N, out_1N,
        weight_NK.stride(0), COLUMNS=K, GATED=gated, BIAS=bias_N is not None, ADD=residual_1N is not None,
        BLOCK_K=min(block, triton.next_power_of_2(K)), AHEAD=K <= MANY, EARLY=early, num_warps=warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out_1N
