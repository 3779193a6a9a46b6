"""Attention over the paged cache: chunks of prompts mixed with single tokens, and split-KV decode (flash-decoding).

Shape letters: T tokens of the step, S sequences, H query heads, K key/value heads, G = H / K, E head width, B blocks of
a table. The G query heads that share a key head are rows of one tile, so a key is loaded once for all of them; a tile
of M rows holds M // G tokens. Keys and values lie in blocks (num_blocks, K, block_size, E).
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from soma.model.kernels.launch import INTERPRETED, LOG2_E, Tile, launch, unsupported
from soma.model.kernels.tiles import find_document, key_range, online_step, visible


@triton.jit
def load_paged(
    cache, table, start, limit, stride_b, stride_s, HEAD: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Cached rows start … start + BLOCK_N of one head of a sequence, zero from `limit` on."""
    tokens = start + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_E)
    blocks = tl.load(table + tokens // PAGE, mask=tokens < limit, other=0).to(tl.int64)
    rows = blocks * stride_b + (tokens % PAGE) * stride_s
    mask = tokens[:, None] < limit
    if HEAD != BLOCK_E:
        mask = mask & (columns[None, :] < HEAD)
    return tl.load(cache + rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def attend_paged(
    sum_ME, peak, total, q_ME, keys, values, table, positions, low, high, length, window, scale, stride_b, stride_s,
    HEAD: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries at `positions` over cached keys low … high."""
    for start in tl.range(low, high, BLOCK_N):
        k_NE = load_paged(keys, table, start, high, stride_b, stride_s, HEAD, BLOCK_E, BLOCK_N, PAGE)
        scores = tl.dot(q_ME, tl.trans(k_NE.to(q_ME.dtype)), input_precision="ieee")
        if MASKED:
            columns = start + tl.arange(0, BLOCK_N)
            seen = visible(positions[:, None], columns[None, :], high, window, True, WINDOWED)
            scores = tl.where(seen, scores, float("-inf"))
        weights, shrink, peak, total = online_step(scores, peak, total, scale, MASKED)
        v_NE = load_paged(values, table, start, high, stride_b, stride_s, HEAD, BLOCK_E, BLOCK_N, PAGE)
        sum_ME = tl.dot(weights.to(q_ME.dtype), v_NE.to(q_ME.dtype), sum_ME * shrink[:, None], input_precision="ieee")
    return sum_ME, peak, total


@triton.jit
def chunk_kernel(
    q, keys, values, out, query_starts, lengths, tables, num_sequences, window, scale,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_b, stride_k, stride_s, stride_t,
    GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_E: tl.constexpr, PAGE: tl.constexpr,
    WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M // GROUP new tokens of one sequence, all heads of one key head, over the cache."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    tile, key_head = tl.program_id(0), tl.program_id(1)
    sequence = find_document(query_starts, num_sequences, tile, TOKENS)
    begin = tl.load(query_starts + sequence)
    new = tl.load(query_starts + sequence + 1) - begin
    chunk = (new + TOKENS - 1) // TOKENS - 1 - (tile - begin // TOKENS - sequence)
    if chunk < 0:
        return
    length = tl.load(lengths + sequence)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    token = chunk * TOKENS + rows // GROUP
    valid = (rows < TOKENS * GROUP) & (token < new)
    mask = valid[:, None] & (columns[None, :] < HEAD)
    flat = (begin + token).to(tl.int64)
    head = key_head * GROUP + rows % GROUP
    q_ME = tl.load(q + (flat * stride_qt + head * stride_qh)[:, None] + columns[None, :], mask=mask, other=0.0)
    first = length - new + chunk * TOKENS  # position of the tile's first token
    low, full_low, full_high, high = key_range(first, length, window, TOKENS, BLOCK_N, True, WINDOWED)
    head_keys = keys + key_head.to(tl.int64) * stride_k
    head_values = values + key_head.to(tl.int64) * stride_k
    table = tables + sequence.to(tl.int64) * stride_t
    sum_ME = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    positions = length - new + token
    if WINDOWED:
        sum_ME, peak, total = attend_paged(
            sum_ME, peak, total, q_ME, head_keys, head_values, table, positions, low, full_low, length, window, scale,
            stride_b, stride_s, HEAD, BLOCK_E, BLOCK_N, PAGE, WINDOWED, True,
        )  # fmt: skip
    sum_ME, peak, total = attend_paged(
        sum_ME, peak, total, q_ME, head_keys, head_values, table, positions, full_low, full_high, length, window, scale,
        stride_b, stride_s, HEAD, BLOCK_E, BLOCK_N, PAGE, WINDOWED, False,
    )  # fmt: skip
    sum_ME, peak, total = attend_paged(
        sum_ME, peak, total, q_ME, head_keys, head_values, table, positions, full_high, high, length, window, scale,
        stride_b, stride_s, HEAD, BLOCK_E, BLOCK_N, PAGE, WINDOWED, True,
    )  # fmt: skip
    target = out + (flat * stride_ot + head * stride_oh)[:, None] + columns[None, :]
    tl.store(target, (sum_ME / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def decode_kernel(
    q, keys, values, parts, logsumexp, lengths, tables, num_splits, window, scale,
    stride_qt, stride_qh, stride_b, stride_k, stride_s, stride_t,
    GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_E: tl.constexpr, PAGE: tl.constexpr,
    WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one split of the keys of one sequence's only new token, all heads of one key head.

    Writes the split's normalized output (S, H, splits, E) float32 and base-2 logsumexp (S, H, splits).
    """
    key_head, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    low = 0
    if WINDOWED:
        low = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    share = ((length - low + num_splits - 1) // num_splits + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    start = low + split * share
    stop = tl.minimum(start + share, length)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    head = key_head * GROUP + rows
    mask = (rows < GROUP)[:, None] & (columns[None, :] < HEAD)
    source = sequence.to(tl.int64) * stride_qt + head * stride_qh
    q_ME = tl.load(q + source[:, None] + columns[None, :], mask=mask, other=0.0)
    head_keys = keys + key_head.to(tl.int64) * stride_k
    head_values = values + key_head.to(tl.int64) * stride_k
    table = tables + sequence.to(tl.int64) * stride_t
    sum_ME = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    positions = length - 1 + tl.zeros([BLOCK_M], dtype=tl.int32)
    sum_ME, peak, total = attend_paged(
        sum_ME, peak, total, q_ME, head_keys, head_values, table, positions, start, stop, length, window, scale,
        stride_b, stride_s, HEAD, BLOCK_E, BLOCK_N, PAGE, WINDOWED, True,
    )  # fmt: skip
    empty = total == 0.0  # this split has no keys: it weighs nothing in the reduction
    part = (sequence.to(tl.int64) * tl.num_programs(0) * GROUP + head) * num_splits + split
    out_ME = sum_ME / tl.where(empty, 1.0, total)[:, None]
    tl.store(parts + (part * HEAD)[:, None] + columns[None, :], out_ME.to(parts.dtype.element_ty), mask=mask)
    tl.store(logsumexp + part, tl.where(empty, float("-inf"), peak + tl.log2(total)), mask=rows < GROUP)


@triton.jit
def reduce_kernel(
    parts, logsumexp, out, num_splits, stride_o, HEAD: tl.constexpr, BLOCK_E: tl.constexpr, SPLITS: tl.constexpr
):
    """One program: the splits of one sequence's head joined, each weighed by exp2 of its logsumexp."""
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    columns = tl.arange(0, BLOCK_E)
    first = (sequence * tl.num_programs(0) + head) * num_splits
    weight = tl.load(logsumexp + first + splits, mask=splits < num_splits, other=float("-inf"))
    weight = tl.exp2(weight - tl.max(weight, 0))
    mask = (splits < num_splits)[:, None] & (columns[None, :] < HEAD)
    part = tl.load(parts + ((first + splits) * HEAD)[:, None] + columns[None, :], mask=mask, other=0.0)
    joined = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    target = out + sequence * stride_o + head * HEAD + columns
    tl.store(target, joined.to(out.dtype.element_ty), mask=columns < HEAD)


def chunk_tiles(group: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tile sizes of the chunk kernel; at least one token's heads must fit."""
    least = max(16, triton.next_power_of_2(group))
    if INTERPRETED or dtype == torch.float32:
        return (Tile(max(32, least), 32, 4, 2),)
    return tuple(tile for tile in (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)) if tile.rows >= least)


def decode_tiles(group: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tile sizes of the decode kernel: 16 rows are the least that tensor cores take."""
    rows = max(16, triton.next_power_of_2(group))
    if INTERPRETED or dtype == torch.float32:
        return (Tile(rows, 32, 4, 2),)
    return Tile(rows, 64, 4, 3), Tile(rows, 128, 4, 2), Tile(rows, 128, 8, 3), Tile(rows, 32, 4, 4)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 1 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_splits(programs: int, capacity: int, device: torch.device) -> int:
    """Into how many parts each sequence's keys are cut: enough programs for four on each multiprocessor.

    No part is planned under 256 keys. It looks at shapes alone (`capacity`: the tables' width in tokens), so that a
    CUDA graph may replay it at any length.
    """
    return max(1, min(4 * processors(device) // programs, triton.cdiv(capacity, 256), 128))


def paged_attention(
    q_THE: Tensor, keys: Tensor, values: Tensor, query_starts_S1: Tensor, lengths_S: Tensor, tables_SB: Tensor,
    window: int | None = None, scale: float | None = None, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of the step's tokens over the paged cache, which already holds them; (T, H, E) of q's dtype.

    q_THE: last dimension contiguous; keys, values: (num_blocks, K, block_size, E) of one layout, block_size a power of
    two. query_starts_S1: cumulative new tokens of each sequence (each at least 1); lengths_S: tokens in the cache,
    new ones included; tables_SB: block ids; all int32 on q's device. Where T = S every sequence has one new token and
    its keys are split over programs (`splits`: default by the GPU's size); else one program walks all keys of a tile.
    No value is read on the host, so calls can be captured in a CUDA graph. The block table's rows beyond a sequence's
    length are never read.
    """
    T, H, E = q_THE.shape
    K, page = keys.size(1), keys.size(2)
    assert unsupported(E, q_THE.dtype) is None, unsupported(E, q_THE.dtype)
    assert H % K == 0
    assert page & (page - 1) == 0
    assert keys.stride() == values.stride()
    assert q_THE.stride(2) == keys.stride(3) == tables_SB.stride(1) == 1
    assert query_starts_S1.dtype == lengths_S.dtype == tables_SB.dtype == torch.int32
    shared: dict[str, Any] = {
        "q": q_THE, "keys": keys, "values": values, "lengths": lengths_S, "tables": tables_SB, "window": window or 0,
        "scale": (scale if scale is not None else 1 / math.sqrt(E)) * LOG2_E,
        "stride_qt": q_THE.stride(0), "stride_qh": q_THE.stride(1), "stride_b": keys.stride(0),
        "stride_k": keys.stride(1), "stride_s": keys.stride(2), "stride_t": tables_SB.stride(0),
        "GROUP": H // K, "HEAD": E, "BLOCK_E": max(16, triton.next_power_of_2(E)), "PAGE": page,
        "WINDOWED": window is not None,
    }  # fmt: skip
    out_THE = torch.empty(T, H, E, dtype=q_THE.dtype, device=q_THE.device)
    if lengths_S.numel() == T:
        decode(shared, out_THE, K, splits or choose_splits(T * K, tables_SB.size(1) * page, q_THE.device))
        return out_THE
    num_sequences = lengths_S.numel()
    launch(
        chunk_kernel,
        lambda blocks: (T // (blocks["BLOCK_M"] // (H // K)) + num_sequences, K),
        chunk_tiles(H // K, q_THE.dtype),
        ("GROUP", "HEAD", "PAGE", "WINDOWED"),
        {
            **shared, "out": out_THE, "query_starts": query_starts_S1, "num_sequences": num_sequences,
            "stride_ot": H * E, "stride_oh": E,
        },
    )  # fmt: skip
    return out_THE


def decode(shared: dict[str, Any], out_SHE: Tensor, num_kv_heads: int, splits: int) -> None:
    """One new token for every sequence: partial results of the splits, then their reduction into `out_SHE`."""
    S, H, E = out_SHE.shape
    whole = splits == 1  # the only part is the result
    parts = out_SHE if whole else torch.empty(S, H, splits, E, dtype=torch.float32, device=out_SHE.device)
    logsumexp = torch.empty(S, H, splits, dtype=torch.float32, device=out_SHE.device)
    launch(
        decode_kernel,
        lambda blocks: (num_kv_heads, splits, S),
        decode_tiles(H // num_kv_heads, out_SHE.dtype),
        ("GROUP", "HEAD", "PAGE", "WINDOWED", "num_splits"),
        {**shared, "parts": parts, "logsumexp": logsumexp, "num_splits": splits},
    )
    if not whole:
        reduce_kernel[(H, S)](
            parts, logsumexp, out_SHE, splits, H * E, HEAD=E, BLOCK_E=shared["BLOCK_E"],
            SPLITS=triton.next_power_of_2(splits),
        )  # fmt: skip
