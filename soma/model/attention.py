"""Causal self-attention: MHA, GQA and MQA (arXiv:1706.03762, 2305.13245, 1911.02150), and MLA (arXiv:2405.04434).

Shape letters: B batch, T new tokens, S all tokens (cached and new), D model width, H query heads, K key/value heads,
G query heads per key/value head, E head width, C latent width, R rotary width.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soma.model.adapted import AdaptedLinear
from soma.model.cache import FlatCache, KVCache
from soma.model.config import ModelConfig
from soma.model.layers import Fused, RMSNorm
from soma.model.rope import rotate, yarn_mscale

if TYPE_CHECKING:
    from soma.model.kernels.packed import Packed


class Across(Protocol):
    """In place of a mask: attention to keys and values that lie on several ranks. It knows who sees whom."""

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTV: Tensor, scale: float | None) -> Tensor:
        """(B, H, T, V) for this rank's queries, keys and values."""


def flash_supports(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packed documents are attended by our Triton FlashAttention: on a CUDA GPU, in half precision."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or find_spec("triton") is None:
        return False
    return not config.is_mla and config.head_dim % 8 == 0 and config.head_dim <= 256


def make_mask(
    tokens: int, offset: int, window: int | None, document_ids_BT: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which of S = offset + T keys each of T new queries sees: bool (T, S) or (B, 1, T, S).

    None where SDPA needs no mask: plain causal attention from offset 0, or a single query that sees all keys (a
    window is then applied by slicing the keys).
    """
    total = offset + tokens
    windowed = window is not None and total > window
    if document_ids_BT is None and not windowed and offset == 0:
        return None
    if tokens == 1:
        return None
    query = torch.arange(offset, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None, :]
    mask = key <= query
    if windowed:
        assert window is not None
        mask = mask & (key > query - window)
    if document_ids_BT is not None:
        same_BTT = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
        mask = (mask & same_BTT)[:, None]
    return mask


def attend(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSV: Tensor, mask: "Tensor | Across | None", scale: float | None = None
) -> Tensor:  # fmt: skip
    """Softmax attention, (B, T, H·V). Without a mask: causal for T > 1 (then T = S), all keys for T = 1.

    One query: the G heads that share a key head go in as G rows of one head, which needs neither repeated keys nor a
    mask. Measured on 2 CPU threads, 16/4 heads of 64 over 512 keys: 0.04 ms, against 0.06 (fp32) and 0.45 (bf16)
    with enable_gqa.
    """
    B, H, T, _ = q_BHTE.shape
    K = k_BKSE.size(1)
    if callable(mask) and not isinstance(mask, Tensor):
        return mask(q_BHTE, k_BKSE, v_BKSV, scale).transpose(1, 2).reshape(B, T, -1)
    if T == 1 and mask is None:
        q_BKGE = q_BHTE.reshape(B, K, H // K, -1)
        out_BKGV = F.scaled_dot_product_attention(q_BKGE, k_BKSE, v_BKSV, scale=scale)
        return out_BKGV.reshape(B, 1, -1)
    out_BHTV = F.scaled_dot_product_attention(
        q_BHTE, k_BKSE, v_BKSV, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=K != H
    )
    return out_BHTV.transpose(1, 2).reshape(B, T, -1)


class Attention(Fused):
    """Multi-head attention with H query heads and K ≤ H key/value heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window(layer)
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=bool(config.attention_output_bias))
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

    def fuse(self) -> None:
        """Join the query, key and value projections for inference."""
        self.fuse_layers([self.q_proj, self.k_proj, self.v_proj])

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: "Tensor | Packed | Across | None",
        cache: KVCache | FlatCache | None,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = self.project(x_BTD, [self.q_proj, self.k_proj, self.v_proj])
        q_BTHE = q.view(B, T, self.num_heads, self.head_dim)
        k_BTKE = k.view(B, T, self.num_kv_heads, self.head_dim)
        if self.qk_norm:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE).type_as(q), self.k_norm(k_BTKE).type_as(k)
        q_BHTE, k_BKTE = q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2)
        v_BKTE = v.view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if rope is not None:
            q_BHTE, k_BKTE = rotate(q_BHTE, *rope), rotate(k_BKTE, *rope)
        if isinstance(cache, KVCache):
            k_BKTE, v_BKTE = cache.append(self.layer, k_BKTE, v_BKTE)
            if T == 1 and self.window is not None:
                k_BKTE, v_BKTE = k_BKTE[:, :, -self.window :], v_BKTE[:, :, -self.window :]
        elif cache is not None:
            return self.o_proj(cache.attend(self.layer, q_BHTE, k_BKTE, v_BKTE, self.window))
        if isinstance(mask, tuple):  # documents instead of a mask: `flash_supports` holds
            from soma.model.kernels.packed import attend_packed

            return self.o_proj(attend_packed(q_BHTE, k_BKTE, v_BKTE, mask, self.window))
        return self.o_proj(attend(q_BHTE, k_BKTE, v_BKTE, mask))


class LatentAttention(nn.Module):
    """Multi-head latent attention of DeepSeek-V2/V3 (arXiv:2405.04434 section 2.1).

    Keys and values are low-rank: a normalized latent of width C per token, from which `kv_b_proj` makes every head's
    key (without RoPE) and value, plus one rotated key of width R that all heads share. The cache keeps latent and
    rotated key (C + R numbers a token). A single new token is attended in the latent space: the key half of
    `kv_b_proj` is applied to the query and the value half to the result ("absorbed"), so cached tokens are never
    expanded. Several new tokens at once (training, prefill) expand keys and values.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        self.layer, self.num_heads, self.latent = layer, config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rotary, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.interleaved, self.has_query_latent = config.rope_interleave, config.q_lora_rank is not None
        width, bias, query_width = config.hidden_size, config.attention_bias, self.nope + self.rotary
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, self.num_heads * query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, 1e-6)  # the reference fixes this epsilon
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.num_heads * query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.latent + self.rotary, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent, 1e-6)
        self.kv_b_proj = nn.Linear(self.latent, self.num_heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.value, width, bias=bool(config.attention_output_bias))
        self.scale = query_width**-0.5
        scaling = config.rope_scaling or {}
        if scaling.get("rope_type", scaling.get("type", "default")) != "default" and scaling.get("mscale_all_dim"):
            self.scale *= yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2

    def queries(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Query parts without and with RoPE: (B, H, T, nope) and (B, H, T, R)."""
        if self.has_query_latent:
            latent = self.q_a_proj(x_BTD)
            q = self.q_b_proj(self.q_a_layernorm(latent).type_as(latent))
        else:
            q = self.q_proj(x_BTD)
        q_BHTE = q.view(*x_BTD.shape[:2], self.num_heads, -1).transpose(1, 2)
        q_nope, q_rope = q_BHTE.split([self.nope, self.rotary], dim=-1)
        return q_nope, rotate(q_rope, *rope, interleaved=self.interleaved)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: "Tensor | Across | None",
        cache: KVCache | FlatCache | None,
    ) -> Tensor:
        q_nope, q_rope = self.queries(x_BTD, rope)
        latent_BTC, shared_BTR = self.kv_a_proj_with_mqa(x_BTD).split([self.latent, self.rotary], dim=-1)
        latent_BTC = self.kv_a_layernorm(latent_BTC).type_as(latent_BTC)
        shared_B1TR = rotate(shared_BTR[:, None], *rope, interleaved=self.interleaved)
        keys_B1SC = torch.cat((latent_BTC[:, None], shared_B1TR), dim=-1)
        if isinstance(cache, KVCache):
            keys_B1SC = cache.append_keys(self.layer, keys_B1SC)
            if x_BTD.size(1) == 1:
                q_BHTC = self.absorb(q_nope, q_rope)
                out_BTC = attend(q_BHTC, keys_B1SC, keys_B1SC[..., : self.latent], None, self.scale)
                return self.o_proj(self.expand(out_BTC))
        elif cache is not None:
            q_BHTC = self.absorb(q_nope, q_rope)
            return self.o_proj(
                self.expand(cache.attend(self.layer, q_BHTC, keys_B1SC, None, None, self.scale, self.latent))
            )
        return self.o_proj(self.attend_expanded(q_nope, q_rope, keys_B1SC, mask))

    def attend_expanded(
        self, q_nope: Tensor, q_rope: Tensor, keys_B1SC: Tensor, mask: "Tensor | Across | None"
    ) -> Tensor:
        """Attention over keys and values made for every head, (B, T, H·V)."""
        B, _, S, _ = keys_B1SC.shape
        latent_BSC, shared_B1SR = keys_B1SC[:, 0, :, : self.latent], keys_B1SC[..., self.latent :]
        kv_BHSE = self.kv_b_proj(latent_BSC).view(B, S, self.num_heads, -1).transpose(1, 2)
        k_nope, v_BHSV = kv_BHSE.split([self.nope, self.value], dim=-1)
        k_BHSE = torch.cat((k_nope, shared_B1SR.expand(-1, self.num_heads, -1, -1)), dim=-1)
        return attend(torch.cat((q_nope, q_rope), dim=-1), k_BHSE, v_BHSV, mask, self.scale)

    def absorb(self, q_nope: Tensor, q_rope: Tensor) -> Tensor:
        """Queries in the latent space, (B, H, T, C + R)."""
        up_k_HNC = self.up_weight(q_nope)[:, : self.nope]
        q_BHTC = torch.einsum("bhtn,hnc->bhtc", q_nope, up_k_HNC)
        for first, end, a_RC, b_HER in self.up_updates():
            low_BHTR = torch.einsum("bhtn,hnr->bhtr", q_nope[:, :, first:end], b_HER[:, : self.nope])
            q_BHTC[:, :, first:end] += low_BHTR @ a_RC
        return torch.cat((q_BHTC, q_rope), dim=-1)

    def expand(self, out_BTC: Tensor) -> Tensor:
        """Values from what attention gave in the latent space, (B, T, H·C) to (B, T, H·V)."""
        up_v_HVC = self.up_weight(out_BTC)[:, self.nope :]
        out_BTHC = out_BTC.view(*out_BTC.shape[:2], self.num_heads, self.latent)
        out_BTHV = torch.einsum("bthc,hvc->bthv", out_BTHC, up_v_HVC)
        for first, end, a_RC, b_HER in self.up_updates():
            low_BTHR = out_BTHC[:, first:end] @ a_RC.T
            out_BTHV[:, first:end] += torch.einsum("bthr,hvr->bthv", low_BTHR, b_HER[:, self.nope :])
        return out_BTHV.flatten(2)

    def up_weight(self, like: Tensor) -> Tensor:
        """`kv_b_proj` by heads, (H, nope + V, C)."""
        return self.kv_b_proj.weight.view(self.num_heads, -1, self.latent).type_as(like)

    def up_updates(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Updates of `kv_b_proj` in a flat batch: first token, end, A (R, C), and B by heads (H, nope + V, R)."""
        layer: nn.Module = self.kv_b_proj
        if isinstance(layer, AdaptedLinear):
            for first, end, a_RC, b_NR in layer.chosen():
                yield first, end, a_RC, b_NR.view(self.num_heads, -1, b_NR.size(1))
