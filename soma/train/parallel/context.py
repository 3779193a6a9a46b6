"""Context parallelism: a sequence lies on several ranks, and each attends with its queries to all keys before them.

Every rank has an early and a late piece of the sequence (of 2·C pieces, rank r has r and 2C-1-r), so that under a
causal mask all have the same work (Llama 3, arXiv:2407.21783, section 3.3.2). Two ways:

* ring (arXiv:2310.01889): keys and values go round, each rank attends to the block at hand and merges the results by
  their log-sum-exp; memory for one block more;
* all_gather (Llama 3): keys and values are collected first; memory for all of them, one fused attention.

Letters: B sequences, H query heads, K key heads, G = H/K, T this rank's positions, S keys at hand, E head width, V
value width, C ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from soma.model.transformer import Masks, Transformer
from soma.train.parallel.local import gather_sequence, scatter_sequence
from soma.train.parallel.watch import waiting

QUERIES = 1024  # rows of scores that exist at a time


def columns_of(length: int, ranks: int, rank: int) -> np.ndarray:
    """The positions of a rank: 16 positions on 2 ranks: 0-3 and 12-15 for rank 0, 4-11 for rank 1."""
    pieces = np.arange(length).reshape(2 * ranks, -1)
    return np.concatenate((pieces[rank], pieces[2 * ranks - 1 - rank]))


def apply_context(model: Transformer, group: dist.ProcessGroup, method: str) -> None:
    """Let a model's attention reach over the ranks of `group`; each is given its own columns of the batch."""
    attend = ring_attention if method == "ring" else gathered_attention
    plain, plain_embed = model.context, model.embed

    def places(length: int, device: torch.device) -> Tensor:
        """The places in the sequence of all ranks' positions, (C, T)."""
        ranks = range(group.size())
        columns = np.stack([columns_of(length * len(ranks), len(ranks), rank) for rank in ranks])
        return torch.from_numpy(columns).to(device)

    def embed(tokens_BT: Tensor, positions_BT: Tensor | None = None, offset: int = 0) -> Tensor:
        if positions_BT is None:
            positions_BT = places(tokens_BT.size(1), tokens_BT.device)[group.rank()].expand_as(tokens_BT)
        return plain_embed(tokens_BT, positions_BT, offset)

    def context(
        x_BTD: Tensor, tokens_BT: Tensor, positions_BT: Tensor | None = None, document_ids_BT: Tensor | None = None,
        *cached: Any,
    ) -> Any:  # fmt: skip
        assert not any(cached), "a cache is for inference, and context parallelism for training"
        B, T = tokens_BT.shape
        places_CT = places(T, x_BTD.device)
        if positions_BT is None:
            positions_BT = places_CT[group.rank()].expand(B, T)
        rope, _, _ = plain(x_BTD, tokens_BT, positions_BT, None)
        documents_CBT = None
        if document_ids_BT is not None:
            whole = gather_sequence(document_ids_BT, group)
            documents_CBT = whole.view(B, group.size(), T).transpose(0, 1).contiguous()
        masks: Masks = {
            window: partial(attend, sight=Sight(group, places_CT, documents_CBT, window)) for window in model.windows
        }
        return rope, masks, None if document_ids_BT is None else document_ids_BT >= 0

    def largest(number: Tensor) -> Tensor:
        dist.all_reduce(number, dist.ReduceOp.MAX, group=group)
        return number

    if model.rope is not None:
        model.rope.largest = largest
    model.context = context  # type: ignore[assignment]
    model.embed = embed  # type: ignore[method-assign]


@dataclass(frozen=True)
class Sight:
    """Who sees whom: the places (C, T) and documents (C, B, T; None: one document) of all ranks' positions."""

    group: dist.ProcessGroup
    places: Tensor
    documents: Tensor | None
    window: int | None

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def ranks(self) -> int:
        return self.group.size()

    def mask(self, queries: slice, keys_of: int | None, keys: slice) -> Tensor:
        """Which of some of rank `keys_of`'s keys some of this rank's queries see, (B or 1, T, S); None: all ranks'."""
        query_T = self.places[self.rank, queries]
        key_S = (self.places.flatten() if keys_of is None else self.places[keys_of])[keys]
        mask = key_S <= query_T[:, None]
        if self.window is not None:
            mask = mask & (key_S > query_T[:, None] - self.window)
        if self.documents is None:
            return mask[None]
        theirs = self.documents
        key_BS = theirs.transpose(0, 1).flatten(1) if keys_of is None else theirs[keys_of]
        return mask & (theirs[self.rank][:, queries, None] == key_BS[:, None, keys])

    def work(self, source: int, length: int) -> tuple[slice, slice]:
        """The queries and keys that a block of rank `source` has anything to do with, under the causal mask."""
        half, whole = length // 2, slice(0, length)
        if source == self.rank:
            return whole, whole
        return (whole, slice(0, half)) if source < self.rank else (slice(half, length), whole)


# --- All-gather ---


class _Gather(torch.autograd.Function):
    """All ranks' T one after the other; backwards the sum of what they all have for this rank's part."""

    @staticmethod
    def forward(ctx: Any, x_BTX: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_sequence(x_BTX, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return scatter_sequence(grads[0], ctx.group), None


def gathered_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTV: Tensor, scale: float | None, sight: Sight) -> Tensor:
    """Attention to all ranks' keys, (B, H, T, V), by way of collecting them."""
    kv_BTKX = torch.cat((k_BKTE, v_BKTV), dim=-1).transpose(1, 2)
    kv_BKSX = _Gather.apply(kv_BTKX, sight.group).transpose(1, 2)
    k_BKSE, v_BKSV = kv_BKSX.split([k_BKTE.size(-1), v_BKTV.size(-1)], dim=-1)
    everything = slice(None)
    mask = sight.mask(everything, None, everything)[:, None]
    return F.scaled_dot_product_attention(
        q_BHTE, k_BKSE, v_BKSV, attn_mask=mask, scale=scale, enable_gqa=q_BHTE.size(1) != k_BKTE.size(1)
    )


# --- Ring ---


def ring_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTV: Tensor, scale: float | None, sight: Sight) -> Tensor:
    """Attention to all ranks' keys, (B, H, T, V), while they go round."""
    scale = q_BHTE.size(-1) ** -0.5 if scale is None else scale
    return _Ring.apply(q_BHTE, k_BKTE, v_BKTV, scale, sight)


class _Ring(torch.autograd.Function):
    """Scores and sums in float32. Backwards keys and values go round again, and their gradients with them."""

    @staticmethod
    def forward(ctx: Any, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTV: Tensor, scale: float, sight: Sight) -> Tensor:
        B, H, T, E = q_BHTE.shape
        K = k_BKTE.size(1)
        kv = torch.cat((k_BKTE, v_BKTV), dim=-1).contiguous()
        q = q_BHTE.reshape(B, K, H // K, T, E)
        out = q.new_zeros(B, K, H // K, T, v_BKTV.size(-1), dtype=torch.float32)
        lse = q.new_full((B, K, H // K, T), float("-inf"), dtype=torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            for source, block in go_round(kv, sight):
                queries, keys = sight.work(source, T)
                for rows in chunked(queries):
                    k, v = block[:, :, None, keys].float().split([E, v_BKTV.size(-1)], dim=-1)
                    scores = masked_scores(q[..., rows, :], k, scale, sight.mask(rows, source, keys))
                    merge(out[..., rows, :], lse[..., rows], scores, v)
        ctx.save_for_backward(q, kv, out, lse)
        ctx.scale, ctx.sight, ctx.widths = scale, sight, (E, v_BKTV.size(-1))
        return out.to(q.dtype).view(B, H, T, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, kv, out, lse = ctx.saved_tensors
        sight, scale, widths = ctx.sight, ctx.scale, ctx.widths
        grad_out = grads[0].reshape(out.shape).float()
        delta = (grad_out * out).sum(-1, keepdim=True)
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        grad_kv = torch.zeros_like(kv, dtype=torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            for source, block in go_round(kv, sight):
                if source != sight.rank:
                    grad_kv = shift(grad_kv, sight.group, tag=1).wait()
                queries, keys = sight.work(source, q.size(-2))
                k, v = block[:, :, None, keys].float().split(widths, dim=-1)
                for rows in chunked(queries):
                    own = q[..., rows, :]
                    scores = masked_scores(own, k, scale, sight.mask(rows, source, keys))
                    weights = (scores - lse[..., rows, None]).exp()
                    grad_v = weights.mT @ grad_out[..., rows, :]
                    grad_scores = weights * (grad_out[..., rows, :] @ v.mT - delta[..., rows, :]) * scale
                    grad_q[..., rows, :] += grad_scores @ k
                    both = torch.cat((grad_scores.mT @ own.float(), grad_v), dim=-1)
                    grad_kv[:, :, keys] += both.sum(2)  # over the query heads of a key head
            grad_kv = shift(grad_kv, sight.group, tag=1).wait()  # the last step home
        grad_k, grad_v = grad_kv.split(widths, dim=-1)
        grad_q = grad_q.to(q.dtype).flatten(1, 2)
        return grad_q, grad_k.to(kv.dtype), grad_v.to(kv.dtype), None, None


def chunked(rows: slice) -> list[slice]:
    """A range of rows in pieces of at most QUERIES."""
    return [slice(start, min(start + QUERIES, rows.stop)) for start in range(rows.start, rows.stop, QUERIES)]


def masked_scores(q: Tensor, k: Tensor, scale: float, mask_BTS: Tensor) -> Tensor:
    """q·kᵀ, -inf where the mask is False: (B, K, G, T, S), float32."""
    return (q.float() @ k.mT * scale).masked_fill(~mask_BTS[:, None, None], float("-inf"))


def merge(out: Tensor, lse: Tensor, scores: Tensor, v: Tensor) -> None:
    """Add a block to a running softmax, in place: out (…, T, V) is normalized, lse (…, T) its log-sum-exp.

    Worked number: score 0 with value 1, then score ln 3 with value 5: out = (1·1 + 3·5) / 4 = 4.
    """
    together = torch.logaddexp(lse, scores.logsumexp(-1))
    together_or_0 = together.masked_fill(together == float("-inf"), 0.0)  # nothing seen yet: weights are exp(-inf)
    weights = (scores - together_or_0[..., None]).exp()
    out.mul_((lse - together_or_0).exp()[..., None]).add_(weights @ v)
    lse.copy_(together)


@dataclass
class Shift:
    """A tensor on its way to the next rank, and the one that comes from the rank before."""

    arriving: Tensor
    requests: list[dist.Work]
    before: int  # the global rank that it comes from

    def wait(self) -> Tensor:
        """What came."""
        with waiting(self.before, "the ring's keys and values"):
            for request in self.requests:
                request.wait()
        return self.arriving


def shift(x: Tensor, group: dist.ProcessGroup, tag: int) -> Shift:
    """Begin to send x to the next rank of the ring."""
    arriving = torch.empty_like(x)
    after = dist.get_global_rank(group, (group.rank() + 1) % group.size())
    before = dist.get_global_rank(group, (group.rank() - 1) % group.size())
    operations = [
        dist.P2POp(dist.isend, x.contiguous(), after, group, tag),
        dist.P2POp(dist.irecv, arriving, before, group, tag),
    ]
    return Shift(arriving, dist.batch_isend_irecv(operations), before)


def go_round(own: Tensor, sight: Sight) -> Any:
    """(source rank, its block) for every rank of the ring, this one first; the next block travels meanwhile."""
    block = own
    for step in range(sight.ranks):
        coming: Callable[[], Tensor] | None = None
        if step < sight.ranks - 1:
            coming = shift(block, sight.group, tag=0).wait
        yield (sight.rank - step) % sight.ranks, block
        if coming is not None:
            block = coming()
