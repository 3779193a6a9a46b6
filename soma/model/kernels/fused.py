"""The small steps of inference, each in one pass over its data: RMSNorm with the residual sum, RoPE with the write into
the paged cache, SwiGLU. Forward only; arithmetic is float32 and rounds once.

Shape letters: T tokens, D model width, F width inside the MLP, H query heads, K key/value heads, E head width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, added, stride_x, stride_r, eps,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < WIDTH
    value = tl.load(x + row * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * stride_r + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(added.dtype.element_ty)
        tl.store(added + row * WIDTH + columns, rounded, mask=mask)
        value = rounded.to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    scaled = value * root * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, scaled.to(out.dtype.element_ty), mask=mask)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight (arXiv:1910.07467) of the rows of x, in x's dtype."""
    T, D = x_TD.shape
    out_TD = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
    run_rms_norm(x_TD, x_TD, weight_D, out_TD, out_TD, eps, add=False)
    return out_TD


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum rounded to x's dtype (the new residual stream)."""
    T, D = x_TD.shape
    out_TD = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
    added_TD = torch.empty_like(out_TD)
    run_rms_norm(x_TD, residual_TD, weight_D, out_TD, added_TD, eps, add=True)
    return out_TD, added_TD


def run_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, out_TD: Tensor, added_TD: Tensor, eps: float, add: bool
) -> None:
    """Launch the norm's kernel, one program a row."""
    T, D = x_TD.shape
    assert x_TD.stride(1) == residual_TD.stride(1) == weight_D.stride(0) == 1
    block = triton.next_power_of_2(D)
    rms_norm_kernel[(T,)](
        x_TD, residual_TD, weight_D, out_TD, added_TD, x_TD.stride(0), residual_TD.stride(0), eps,
        WIDTH=D, BLOCK_D=block, ADD=add, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip


@triton.jit
def store_cached(target, value, mask, SATURATE: tl.constexpr):
    """Store in the cache's dtype; with SATURATE, which FP8 needs, numbers beyond its range become its largest."""
    if SATURATE:
        value = tl.minimum(tl.maximum(value.to(tl.float32), -448.0), 448.0)
    tl.store(target, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def rope_write_kernel(
    q, k, v, cos, sin, out, keys, values, slots, num_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_b, stride_k, stride_s,
    HEAD: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, PAGE: tl.constexpr, SATURATE: tl.constexpr,
):  # fmt: skip
    """One program: one token and one head: a query head is rotated, a key head rotated and cached with its values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = HEAD // 2
    columns = tl.arange(0, BLOCK_R)
    mask = columns < half
    c = tl.load(cos + token * half + columns, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + token * half + columns, mask=mask, other=0.0).to(tl.float32)
    if head < num_heads:
        source = q + token * stride_qt + head * stride_qh
    else:
        source = k + token * stride_kt + (head - num_heads) * stride_kh
    a = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half + columns, mask=mask, other=0.0).to(tl.float32)
    first, second = a * c - b * s, b * c + a * s
    if head < num_heads:
        target = out + token * stride_ot + head * stride_oh + columns
        tl.store(target, first.to(out.dtype.element_ty), mask=mask)
        tl.store(target + half, second.to(out.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        place = slot // PAGE * stride_b + (head - num_heads) * stride_k + slot % PAGE * stride_s
        wide = tl.arange(0, BLOCK_E)
        value = tl.load(v + token * stride_vt + (head - num_heads) * stride_vh + wide, mask=wide < HEAD, other=0.0)
        store_cached(keys + place + columns, first, mask, SATURATE)
        store_cached(keys + place + half + columns, second, mask, SATURATE)
        store_cached(values + place + wide, value, wide < HEAD, SATURATE)


def rope_write(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cos_TR: Tensor, sin_TR: Tensor, keys: Tensor, values: Tensor,
    slots_T: Tensor,
) -> Tensor:  # fmt: skip
    """Rotated queries (T, H, E); the rotated keys and the values go to their slots of the paged cache.

    cos_TR, sin_TR: (T, E/2), contiguous, as `rope.Rope` gives them; pairs are (i, i + E/2). keys, values:
    (num_blocks, K, block_size, E) of one layout, in q's dtype or float8_e4m3fn (beyond ±448 saturated); slots_T:
    block · block_size + offset, no slot twice.
    """
    T, H, E = q_THE.shape
    K, page = k_TKE.size(1), keys.size(2)
    assert cos_TR.shape == sin_TR.shape == (T, E // 2)
    assert cos_TR.is_contiguous()
    assert sin_TR.is_contiguous()
    assert q_THE.stride(2) == k_TKE.stride(2) == v_TKE.stride(2) == keys.stride(3) == 1
    assert keys.stride() == values.stride()
    assert keys.dtype == values.dtype
    assert keys.dtype in (q_THE.dtype, torch.float8_e4m3fn)
    out_THE = torch.empty(T, H, E, dtype=q_THE.dtype, device=q_THE.device)
    rope_write_kernel[(T, H + K)](
        q_THE, k_TKE, v_TKE, cos_TR, sin_TR, out_THE, keys, values, slots_T, H,
        q_THE.stride(0), q_THE.stride(1), k_TKE.stride(0), k_TKE.stride(1), v_TKE.stride(0), v_TKE.stride(1), H * E, E,
        keys.stride(0), keys.stride(1), keys.stride(2),
        HEAD=E, BLOCK_E=triton.next_power_of_2(E), BLOCK_R=triton.next_power_of_2(E // 2), PAGE=page,
        SATURATE=keys.dtype != q_THE.dtype, num_warps=1,
    )  # fmt: skip
    return out_THE


@triton.jit
def swiglu_kernel(gate, up, out, width, stride_g, stride_u, BLOCK_F: tl.constexpr):
    """One program: BLOCK_F columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = columns < width
    g = tl.load(gate + row * stride_g + columns, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_u + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (g / (1 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=mask)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) · up (arXiv:2002.05202), (T, F); the two may be halves of one wider matrix."""
    T, F = gate_TF.shape
    assert gate_TF.shape == up_TF.shape
    assert gate_TF.stride(1) == up_TF.stride(1) == 1
    out_TF = torch.empty(T, F, dtype=gate_TF.dtype, device=gate_TF.device)
    swiglu_kernel[(T, triton.cdiv(F, 1024))](
        gate_TF, up_TF, out_TF, F, gate_TF.stride(0), up_TF.stride(0), BLOCK_F=1024
    )
    return out_TF
