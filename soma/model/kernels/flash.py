"""FlashAttention-2 (arXiv:2307.08691), forward: tiles of queries walk over tiles of keys with an online softmax.

Shape letters: T tokens of all documents one after the other, H query heads, K key/value heads, E head width, S + 1
document starts. The backward pass is in flash_backward.py.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from soma.model.kernels.flash_backward import backward
from soma.model.kernels.launch import INTERPRETED, LOG2_E, Tile, launch, unsupported
from soma.model.kernels.tiles import find_document, key_range, load_tile, online_step, store_tile, visible


@triton.jit
def attend_tiles(
    sum_ME, peak, total, q_ME, keys, values, stride_k, stride_v, first, low, high, length, window, scale,
    HEAD: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The queries over keys low … high; without MASKED all of them are visible and inside the document."""
    rows = first + tl.arange(0, BLOCK_M)
    for start in tl.range(low, high, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        k_NE = load_tile(keys, start, stride_k, length, HEAD, BLOCK_E, BLOCK_N, MASKED)
        scores = tl.dot(q_ME, tl.trans(k_NE), input_precision="ieee")
        if MASKED:
            columns = start + tl.arange(0, BLOCK_N)
            seen = visible(rows[:, None], columns[None, :], length, window, CAUSAL, WINDOWED)
            scores = tl.where(seen, scores, float("-inf"))
        weights, shrink, peak, total = online_step(scores, peak, total, scale, MASKED)
        sum_ME = sum_ME * shrink[:, None]
        v_NE = load_tile(values, start, stride_v, length, HEAD, BLOCK_E, BLOCK_N, MASKED)
        sum_ME = tl.dot(weights.to(v_NE.dtype), v_NE, sum_ME, input_precision="ieee")
    return sum_ME, peak, total


@triton.jit
def forward_kernel(
    q, k, v, out, logsumexp, starts, num_documents, num_tokens, window, scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, length_bucket,
    GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one document."""
    tile, head = tl.program_id(0), tl.program_id(1)
    document = find_document(starts, num_documents, tile, BLOCK_M)
    begin = tl.load(starts + document)
    length = tl.load(starts + document + 1) - begin
    # The longest rows of a causal triangle come first, so that no long program starts last.
    row = (length + BLOCK_M - 1) // BLOCK_M - 1 - (tile - begin // BLOCK_M - document)
    if row < 0:
        return
    first = row * BLOCK_M
    offset = begin.to(tl.int64)
    keys = k + offset * stride_kt + (head // GROUP) * stride_kh
    values = v + offset * stride_vt + (head // GROUP) * stride_vh
    q_ME = load_tile(q + offset * stride_qt + head * stride_qh, first, stride_qt, length, HEAD, BLOCK_E, BLOCK_M, True)
    sum_ME = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    low, full_low, full_high, high = key_range(first, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED)
    if WINDOWED:
        sum_ME, peak, total = attend_tiles(
            sum_ME, peak, total, q_ME, keys, values, stride_kt, stride_vt, first, low, full_low, length, window, scale,
            HEAD, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, True,
        )  # fmt: skip
    sum_ME, peak, total = attend_tiles(
        sum_ME, peak, total, q_ME, keys, values, stride_kt, stride_vt, first, full_low, full_high, length, window,
        scale, HEAD, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, False,
    )  # fmt: skip
    sum_ME, peak, total = attend_tiles(
        sum_ME, peak, total, q_ME, keys, values, stride_kt, stride_vt, first, full_high, high, length, window, scale,
        HEAD, BLOCK_E, BLOCK_M, BLOCK_N, CAUSAL, WINDOWED, True,
    )  # fmt: skip
    out_ME = sum_ME / total[:, None]
    store_tile(out + offset * stride_ot + head * stride_oh, first, stride_ot, length, out_ME, HEAD, BLOCK_E, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    target = logsumexp + head.to(tl.int64) * num_tokens + begin + rows
    tl.store(target, peak + tl.log2(total), mask=rows < length)


def forward_tiles(block_e: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tile sizes to choose from. float32 multiplies without tensor cores, out of registers: small tiles."""
    if INTERPRETED or dtype == torch.float32:
        return (Tile(32, 32, 4, 2),)
    if block_e > 128:
        return Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)
    if block_e == 128:
        return Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)
    return Tile(128, 128, 8, 3), Tile(128, 64, 4, 4), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)


def constants(q_THE: Tensor, k_TKE: Tensor, causal: bool, window: int) -> dict[str, Any]:
    """What every flash kernel is compiled for."""
    head_dim = q_THE.size(2)
    return {
        "GROUP": q_THE.size(1) // k_TKE.size(1), "HEAD": head_dim, "BLOCK_E": max(16, triton.next_power_of_2(head_dim)),
        "CAUSAL": causal, "WINDOWED": window > 0,
    }  # fmt: skip


@torch.library.custom_op("soma::flash_attention", mutates_args=())
def flash_forward(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, starts: Tensor, max_length: int, causal: bool, window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention's output (T, H, E) and each row's base-2 logsumexp (H, T) float32. `window` 0: none."""
    T, H, E = q_THE.shape
    out_THE = torch.empty(T, H, E, dtype=q_THE.dtype, device=q_THE.device)
    logsumexp_HT = torch.empty(H, T, dtype=torch.float32, device=q_THE.device)
    fixed = constants(q_THE, k_TKE, causal, window)
    arguments = {
        "q": q_THE, "k": k_TKE, "v": v_TKE, "out": out_THE, "logsumexp": logsumexp_HT, "starts": starts,
        "num_documents": starts.numel() - 1, "num_tokens": T, "window": window, "scale": scale * LOG2_E,
        "stride_qt": q_THE.stride(0), "stride_qh": q_THE.stride(1), "stride_kt": k_TKE.stride(0),
        "stride_kh": k_TKE.stride(1), "stride_vt": v_TKE.stride(0), "stride_vh": v_TKE.stride(1),
        "stride_ot": H * E, "stride_oh": E, "length_bucket": triton.next_power_of_2(max_length), **fixed,
    }  # fmt: skip
    launch(
        forward_kernel,
        lambda blocks: (T // blocks["BLOCK_M"] + starts.numel() - 1, H),
        forward_tiles(fixed["BLOCK_E"], q_THE.dtype),
        ("GROUP", "HEAD", "CAUSAL", "WINDOWED", "length_bucket"),
        arguments,
    )
    return out_THE, logsumexp_HT


@flash_forward.register_fake
def _(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, starts: Tensor, max_length: int, causal: bool, window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, H, E = q_THE.shape
    return q_THE.new_empty(T, H, E), q_THE.new_empty(H, T, dtype=torch.float32)


@torch.library.custom_op("soma::flash_attention_backward", mutates_args=())
def flash_backward(
    grad_THE: Tensor, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, out_THE: Tensor, logsumexp_HT: Tensor,
    starts: Tensor, max_length: int, causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    fixed = constants(q_THE, k_TKE, causal, window)
    grad_THE = grad_THE.contiguous()
    return backward(grad_THE, q_THE, k_TKE, v_TKE, out_THE, logsumexp_HT, starts, max_length, window, scale, fixed)


@flash_backward.register_fake
def _(
    grad_THE: Tensor, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, out_THE: Tensor, logsumexp_HT: Tensor,
    starts: Tensor, max_length: int, causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q_THE.new_empty(q_THE.shape), k_TKE.new_empty(k_TKE.shape), v_TKE.new_empty(v_TKE.shape)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass reads: inputs, output and logsumexp, never the scores."""
    q_THE, k_TKE, v_TKE, starts, *ctx.options = inputs
    ctx.save_for_backward(q_THE, k_TKE, v_TKE, *output, starts)
    ctx.set_materialize_grads(False)


def differentiate(ctx: Any, grad_THE: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward pass of `flash_forward`; the logsumexp is for that alone and has no gradient of its own."""
    assert grad_logsumexp is None, "the logsumexp of flash attention has no gradient"
    if grad_THE is None:
        return (None,) * 8
    grads = flash_backward(grad_THE, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


flash_forward.register_autograd(differentiate, setup_context=save_for_backward)


def flash_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, starts: Tensor, max_length: int, causal: bool = True,
    window: int | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention within each of the documents that follow one another in T, (T, H, E) of q's dtype.

    q_THE, k_TKE, v_TKE: float16, bfloat16 or float32, any strides with contiguous heads, H a multiple of K (GQA).
    starts: int32 (S + 1) on the same device, 0 … T, ascending; empty documents are allowed. max_length: no document is
    longer. causal: a token sees its document up to itself, with `window` only its last `window` tokens, itself
    included. scale: default 1/sqrt(E). Sums are float32; tensor cores take float16 and bfloat16.
    Differentiable in q, k and v, deterministic, and whole under torch.compile.
    """
    T, H, E = q_THE.shape
    assert unsupported(E, q_THE.dtype) is None, unsupported(E, q_THE.dtype)
    assert k_TKE.shape == v_TKE.shape
    assert k_TKE.size(0) == T
    assert k_TKE.size(2) == E
    assert H % k_TKE.size(1) == 0
    assert q_THE.dtype == k_TKE.dtype == v_TKE.dtype
    assert starts.dtype == torch.int32
    assert causal or window is None, "a window is for causal attention"
    assert q_THE.stride(2) == k_TKE.stride(2) == v_TKE.stride(2) == 1, "heads must be contiguous"
    if window is not None and window >= max_length:
        window = None
    scale = scale if scale is not None else 1 / math.sqrt(E)
    assert scale > 0
    out_THE, _ = flash_forward(q_THE, k_TKE, v_TKE, starts, max_length, causal, window or 0, scale)
    return out_THE
