"""FlashAttention-2 (arXiv:2307.08691), backward: weights are computed again from q, k and each row's logsumexp.

With P the weights, dO the output's gradient and D = rowsum(dO ∘ O): dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - D), dQ = dS K·scale,
dK = dSᵀ Q·scale (section 2.3.2). One kernel walks over queries for each tile of keys and sums the gradients of all
heads that share the key head; another walks over keys for each tile of queries. No atomics: it is deterministic.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from soma.model.kernels.launch import INTERPRETED, LOG2_E, Tile, launch
from soma.model.kernels.tiles import find_document, key_range, load_tile, store_tile, visible


@triton.jit
def delta_kernel(
    grad, out, delta, num_tokens, stride_t, stride_h, HEAD: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr
):
    """delta (H, T) = rowsum(grad ∘ out), float32."""
    first, head = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64)
    offset = first.to(tl.int64) * stride_t + head * stride_h
    limit = num_tokens - first
    grad_ME = load_tile(grad + offset, 0, stride_t, limit, HEAD, BLOCK_E, BLOCK_M, True).to(tl.float32)
    out_ME = load_tile(out + offset, 0, stride_t, limit, HEAD, BLOCK_E, BLOCK_M, True).to(tl.float32)
    rows = tl.arange(0, BLOCK_M)
    tl.store(delta + head * num_tokens + first + rows, tl.sum(grad_ME * out_ME, 1), mask=rows < limit)


@triton.jit
def query_range(
    first, length, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Queries that look at keys first … first + BLOCK_N: low, full_low, full_high, high as in `key_range`."""
    low = 0
    full_low = 0
    high = length
    full_high = length // BLOCK_M * BLOCK_M
    if CAUSAL:
        low = first // BLOCK_M * BLOCK_M
        full_low = (first + BLOCK_N - 1 + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if WINDOWED:
        high = tl.minimum(length, first + BLOCK_N - 1 + window)
        full_high = tl.minimum(full_high, (first + window) // BLOCK_M * BLOCK_M)
    full_low = tl.minimum(full_low, tl.maximum(full_high, low))
    full_high = tl.maximum(full_low, full_high)
    return low, full_low, full_high, high


@triton.jit
def key_value_tiles(
    dk_NE, dv_NE, k_NE, v_NE, q, grad, logsumexp, delta, stride_q, stride_g, first, low, high, length, window, scale,
    HEAD: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add queries low … high of one head to the gradients of a tile of keys and values."""
    columns = first + tl.arange(0, BLOCK_N)
    for start in tl.range(low, high, BLOCK_M):
        start = tl.multiple_of(start, BLOCK_M)
        rows = start + tl.arange(0, BLOCK_M)
        q_ME = load_tile(q, start, stride_q, length, HEAD, BLOCK_E, BLOCK_M, MASKED)
        if MASKED:  # rows beyond the document: q, grad and delta are 0, so they add nothing
            peak = tl.load(logsumexp + rows, mask=rows < length, other=0.0)
            d = tl.load(delta + rows, mask=rows < length, other=0.0)
        else:
            peak = tl.load(logsumexp + rows)
            d = tl.load(delta + rows)
        scores_NM = tl.dot(k_NE, tl.trans(q_ME), input_precision="ieee")
        p_NM = tl.exp2(scores_NM * scale - peak[None, :])
        if MASKED:
            p_NM = tl.where(visible(rows[None, :], columns[:, None], length, window, CAUSAL, WINDOWED), p_NM, 0.0)
        grad_ME = load_tile(grad, start, stride_g, length, HEAD, BLOCK_E, BLOCK_M, MASKED)
        dv_NE = tl.dot(p_NM.to(grad_ME.dtype), grad_ME, dv_NE, input_precision="ieee")
        dp_NM = tl.dot(v_NE, tl.trans(grad_ME), input_precision="ieee")
        ds_NM = p_NM * (dp_NM - d[None, :])
        dk_NE = tl.dot(ds_NM.to(q_ME.dtype), q_ME, dk_NE, input_precision="ieee")
    return dk_NE, dv_NE


@triton.jit
def key_value_kernel(
    q, k, v, grad, logsumexp, delta, dk, dv, starts, num_documents, num_tokens, window, scale, scale_log2,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh, stride_dt, stride_dh,
    length_bucket,
    GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK_N keys and values of one key head of one document."""
    tile, key_head = tl.program_id(0), tl.program_id(1)
    document = find_document(starts, num_documents, tile, BLOCK_N)
    begin = tl.load(starts + document)
    length = tl.load(starts + document + 1) - begin
    first = (tile - begin // BLOCK_N - document) * BLOCK_N  # the first keys are seen by the most queries
    if first >= length:
        return
    offset = begin.to(tl.int64)
    k_NE = load_tile(
        k + offset * stride_kt + key_head * stride_kh, first, stride_kt, length, HEAD, BLOCK_E, BLOCK_N, True
    )
    v_NE = load_tile(
        v + offset * stride_vt + key_head * stride_vh, first, stride_vt, length, HEAD, BLOCK_E, BLOCK_N, True
    )
    dk_NE = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    dv_NE = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    low, full_low, full_high, high = query_range(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED)
    for member in tl.range(0, GROUP):
        head = key_head * GROUP + member
        queries = q + offset * stride_qt + head * stride_qh
        grads = grad + offset * stride_gt + head * stride_gh
        peaks = logsumexp + head.to(tl.int64) * num_tokens + begin
        deltas = delta + head.to(tl.int64) * num_tokens + begin
        if CAUSAL:
            dk_NE, dv_NE = key_value_tiles(
                dk_NE, dv_NE, k_NE, v_NE, queries, grads, peaks, deltas, stride_qt, stride_gt, first, low, full_low,
                length, window, scale_log2, HEAD, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, True,
            )  # fmt: skip
        dk_NE, dv_NE = key_value_tiles(
            dk_NE, dv_NE, k_NE, v_NE, queries, grads, peaks, deltas, stride_qt, stride_gt, first, full_low, full_high,
            length, window, scale_log2, HEAD, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, False,
        )  # fmt: skip
        dk_NE, dv_NE = key_value_tiles(
            dk_NE, dv_NE, k_NE, v_NE, queries, grads, peaks, deltas, stride_qt, stride_gt, first, full_high, high,
            length, window, scale_log2, HEAD, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, True,
        )  # fmt: skip
    target = offset * stride_dt + key_head * stride_dh
    store_tile(dk + target, first, stride_dt, length, dk_NE * scale, HEAD, BLOCK_E, BLOCK_N)
    store_tile(dv + target, first, stride_dt, length, dv_NE, HEAD, BLOCK_E, BLOCK_N)


@triton.jit
def query_tiles(
    dq_ME, q_ME, grad_ME, peak, delta, keys, values, stride_k, stride_v, first, low, high, length, window, scale,
    HEAD: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add keys low … high to the gradient of a tile of queries."""
    rows = first + tl.arange(0, BLOCK_M)
    for start in tl.range(low, high, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        k_NE = load_tile(keys, start, stride_k, length, HEAD, BLOCK_E, BLOCK_N, MASKED)
        v_NE = load_tile(values, start, stride_v, length, HEAD, BLOCK_E, BLOCK_N, MASKED)
        scores = tl.dot(q_ME, tl.trans(k_NE), input_precision="ieee")
        p_MN = tl.exp2(scores * scale - peak[:, None])
        if MASKED:
            columns = start + tl.arange(0, BLOCK_N)
            seen = visible(rows[:, None], columns[None, :], length, window, CAUSAL, WINDOWED)
            p_MN = tl.where(seen, p_MN, 0.0)
        dp_MN = tl.dot(grad_ME, tl.trans(v_NE), input_precision="ieee")
        ds_MN = p_MN * (dp_MN - delta[:, None])
        dq_ME = tl.dot(ds_MN.to(k_NE.dtype), k_NE, dq_ME, input_precision="ieee")
    return dq_ME


@triton.jit
def query_kernel(
    q, k, v, grad, logsumexp, delta, dq, starts, num_documents, num_tokens, window, scale, scale_log2,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh, length_bucket,
    GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_M queries of one head of one document."""
    tile, head = tl.program_id(0), tl.program_id(1)
    document = find_document(starts, num_documents, tile, BLOCK_M)
    begin = tl.load(starts + document)
    length = tl.load(starts + document + 1) - begin
    row = (length + BLOCK_M - 1) // BLOCK_M - 1 - (tile - begin // BLOCK_M - document)
    if row < 0:
        return
    first = row * BLOCK_M
    offset = begin.to(tl.int64)
    keys = k + offset * stride_kt + (head // GROUP) * stride_kh
    values = v + offset * stride_vt + (head // GROUP) * stride_vh
    q_ME = load_tile(q + offset * stride_qt + head * stride_qh, first, stride_qt, length, HEAD, BLOCK_E, BLOCK_M, True)
    source = offset * stride_gt + head * stride_gh
    grad_ME = load_tile(grad + source, first, stride_gt, length, HEAD, BLOCK_E, BLOCK_M, True)
    rows = first + tl.arange(0, BLOCK_M)
    statistics = head.to(tl.int64) * num_tokens + begin + rows
    peak = tl.load(logsumexp + statistics, mask=rows < length, other=0.0)
    d = tl.load(delta + statistics, mask=rows < length, other=0.0)
    dq_ME = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    low, full_low, full_high, high = key_range(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED)
    if WINDOWED:
        dq_ME = query_tiles(
            dq_ME, q_ME, grad_ME, peak, d, keys, values, stride_kt, stride_vt, first, low, full_low, length, window,
            scale_log2, HEAD, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, True,
        )  # fmt: skip
    dq_ME = query_tiles(
        dq_ME, q_ME, grad_ME, peak, d, keys, values, stride_kt, stride_vt, first, full_low, full_high, length, window,
        scale_log2, HEAD, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, False,
    )  # fmt: skip
    dq_ME = query_tiles(
        dq_ME, q_ME, grad_ME, peak, d, keys, values, stride_kt, stride_vt, first, full_high, high, length, window,
        scale_log2, HEAD, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, True,
    )  # fmt: skip
    store_tile(dq + source, first, stride_gt, length, dq_ME * scale, HEAD, BLOCK_E, BLOCK_M)


def key_value_tile_sizes(block_e: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tile sizes of the kernel for dK and dV: four products a step and two sums of float32 to hold."""
    if INTERPRETED or dtype == torch.float32:
        return (Tile(32, 32, 4, 1),)
    if block_e > 128:
        return (Tile(32, 64, 8, 1),)
    if block_e == 128:
        return Tile(64, 128, 8, 2), Tile(64, 128, 8, 3), Tile(64, 64, 4, 2), Tile(32, 128, 8, 3)
    return Tile(64, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 3)


def query_tile_sizes(block_e: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tile sizes of the kernel for dQ."""
    if INTERPRETED or dtype == torch.float32:
        return (Tile(32, 32, 4, 1),)
    if block_e > 128:
        return (Tile(64, 32, 8, 1),)
    if block_e == 128:
        return Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(128, 32, 8, 3)
    return Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 3)


def backward(
    grad_THE: Tensor, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, out_THE: Tensor, logsumexp_HT: Tensor,
    starts: Tensor, max_length: int, window: int, scale: float, fixed: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous, for what `flash.flash_forward` took and gave; `fixed`: `flash.constants`."""
    T, H, E = q_THE.shape
    K, num_documents = k_TKE.size(1), starts.numel() - 1
    dq_THE = torch.empty(T, H, E, dtype=q_THE.dtype, device=q_THE.device)
    dk_TKE = torch.empty(T, K, E, dtype=q_THE.dtype, device=q_THE.device)
    dv_TKE = torch.empty_like(dk_TKE)
    delta_HT = torch.empty_like(logsumexp_HT)
    delta_kernel[(triton.cdiv(T, 32), H)](
        grad_THE, out_THE, delta_HT, T, H * E, E, HEAD=fixed["HEAD"], BLOCK_E=fixed["BLOCK_E"], BLOCK_M=32
    )
    shared = {
        "q": q_THE, "k": k_TKE, "v": v_TKE, "grad": grad_THE, "logsumexp": logsumexp_HT, "delta": delta_HT,
        "starts": starts, "num_documents": num_documents, "num_tokens": T, "window": window, "scale": scale,
        "scale_log2": scale * LOG2_E, "stride_qt": q_THE.stride(0), "stride_qh": q_THE.stride(1),
        "stride_kt": k_TKE.stride(0), "stride_kh": k_TKE.stride(1), "stride_vt": v_TKE.stride(0),
        "stride_vh": v_TKE.stride(1), "stride_gt": H * E, "stride_gh": E,
        "length_bucket": triton.next_power_of_2(max_length), **fixed,
    }  # fmt: skip
    key = ("GROUP", "HEAD", "CAUSAL", "WINDOWED", "length_bucket")
    launch(
        key_value_kernel,
        lambda blocks: (T // blocks["BLOCK_N"] + num_documents, K),
        key_value_tile_sizes(fixed["BLOCK_E"], q_THE.dtype),
        key,
        {**shared, "dk": dk_TKE, "dv": dv_TKE, "stride_dt": K * E, "stride_dh": E},
    )
    launch(
        query_kernel,
        lambda blocks: (T // blocks["BLOCK_M"] + num_documents, H),
        query_tile_sizes(fixed["BLOCK_E"], q_THE.dtype),
        key,
        {**shared, "dq": dq_THE},
    )
    return dq_THE, dk_TKE, dv_TKE
