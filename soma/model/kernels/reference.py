"""Plain torch beside every kernel: what the tests and `benchmarks/attention.py --check` hold the kernels to.

Loops and dense masks, no care for speed; in float64 where the inputs are. Shape letters as in flash.py and paged.py.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor, offset: int, causal: bool, window: int | None, scale: float | None
) -> Tensor:
    """Softmax attention of T queries at positions offset … offset + T - 1 over keys at 0 … S - 1, (T, H, E)."""
    T, H, E = q_THE.shape
    S, K, _ = k_SKE.shape
    k_SHE, v_SHE = k_SKE.repeat_interleave(H // K, 1), v_SKE.repeat_interleave(H // K, 1)
    scores_HTS = torch.einsum("the,she->hts", q_THE, k_SHE) * (scale if scale is not None else 1 / math.sqrt(E))
    query = torch.arange(offset, offset + T, device=q_THE.device)[:, None]
    key = torch.arange(S, device=q_THE.device)[None, :]
    mask = key <= query if causal else torch.ones(T, S, dtype=torch.bool, device=q_THE.device)
    if window is not None:
        mask = mask & (key > query - window)
    return torch.einsum("hts,she->the", scores_HTS.masked_fill(~mask, -torch.inf).softmax(-1), v_SHE)


def packed_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, starts: list[int], causal: bool = True, window: int | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`flash.flash_attention`, one document after the other."""
    documents = itertools.pairwise(starts)
    return torch.cat([attention(q_THE[a:b], k_TKE[a:b], v_TKE[a:b], 0, causal, window, scale) for a, b in documents])


def paged_attention(
    q_THE: Tensor, keys: Tensor, values: Tensor, query_starts: list[int], lengths: list[int], tables_SB: Tensor,
    window: int | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`paged.paged_attention`, one sequence after the other, its keys gathered from their blocks."""
    outputs = []
    for index, length in enumerate(lengths):
        new_THE = q_THE[query_starts[index] : query_starts[index + 1]]
        blocks = tables_SB[index, : -(-length // keys.size(2))].long()
        k_SKE, v_SKE = (cache[blocks].transpose(1, 2).flatten(0, 1)[:length] for cache in (keys, values))
        outputs.append(attention(new_THE, k_SKE, v_SKE, length - len(new_THE), True, window, scale))
    return torch.cat(outputs)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`fused.rms_norm`."""
    return x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps) * weight_D


def rotate(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """RoPE of (T, heads, E) by (T, E/2) cosines and sines."""
    a, b = x_THE.chunk(2, dim=-1)
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def write(k_TKE: Tensor, cache: Tensor, slots_T: Tensor) -> Tensor:
    """A copy of the paged cache with keys (or values) written to their slots."""
    cache, page = cache.clone(), cache.size(2)
    cache[slots_T // page, :, slots_T % page] = k_TKE.to(cache.dtype)
    return cache


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`fused.swiglu`."""
    return F.silu(gate_TF) * up_TF


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in float64; infinite where anything found is not a number."""
    found, expected = found.double(), expected.double()
    if not bool(torch.isfinite(found).all()):
        return math.inf
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
