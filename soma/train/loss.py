"""Losses. Letters: B sequences, T positions, N = B·T, D model width, V vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from soma.model.dropout import stamped

IGNORE = -100
CHUNK = {"cpu": 512, "cuda": 8192}  # positions whose logits exist at a time: what stays in the cache, what fills a GPU

ChunkLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy_sum(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of -log p(target) in nats over targets that are not -100, in float32."""
    return F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE, reduction="sum")


def target_logprobs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) in nats, (N,), float32; 0 where the target is -100."""
    return -F.cross_entropy(logits_NV.float(), targets_N, ignore_index=IGNORE, reduction="none")


def kept_rows(targets: np.ndarray) -> np.ndarray | None:
    """Positions (of all B·T in a row) that have a target; None if all have."""
    kept = targets.ravel() != IGNORE
    return None if kept.all() else np.flatnonzero(kept)


@dataclass(frozen=True)
class Chunk:
    """Some positions before the head: hidden states (size, D), targets (size,), and their stamps, if there are any."""

    x: Tensor
    targets: Tensor
    stamps: Tensor | None

    def run(self, chunk_loss: ChunkLoss, x_ND: Tensor) -> Tensor:
        """The head and its loss on these hidden states."""
        with stamped(self.stamps):
            return chunk_loss(x_ND, self.targets)


def chunks(
    x_BTD: Tensor, targets_BT: Tensor, rows: Tensor | None, size: int | None, stamps_BT: Tensor | None = None
) -> list[Chunk]:
    """Cut positions into pieces of `size`.

    Only `rows` are in them: a tuning batch whose answers are a tenth of it needs a tenth of the logits. The last piece
    is filled up with targets of -100, so that a compiled loss sees one shape.
    """
    x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
    stamps_N = torch.zeros_like(targets_N) if stamps_BT is None else stamps_BT.flatten()
    size = min(size or CHUNK.get(x_BTD.device.type, 512), len(targets_N))
    if rows is not None:
        x_ND, targets_N, stamps_N = x_ND.index_select(0, rows), targets_N[rows], stamps_N[rows]
    short = -len(targets_N) % size if len(targets_N) else size
    if short:
        x_ND, targets_N = F.pad(x_ND, (0, 0, 0, short)), F.pad(targets_N, (0, short), value=IGNORE)
        stamps_N = F.pad(stamps_N, (0, short))
    known = stamps_BT is not None
    if len(targets_N) == size:  # without a cut, whose backward would copy the gradient
        return [Chunk(x_ND, targets_N, stamps_N if known else None)]
    pieces = zip(x_ND.split(size), targets_N.split(size), stamps_N.split(size), strict=True)
    return [Chunk(x, targets, stamps if known else None) for x, targets, stamps in pieces]


def backward(
    x_BTD: Tensor, aux: Tensor, targets_BT: Tensor, rows: Tensor | None, chunk_loss: ChunkLoss, scale: Tensor,
    aux_scale: Tensor, size: int | None = None, stamps_BT: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Backward pass of scale · (sum of cross-entropies) + aux_scale · aux; returns the sum, detached, float32.

    Arguments are those of `head_backward`.
    """
    total, grad_BTD = head_backward(x_BTD, targets_BT, rows, chunk_loss, scale, size, stamps_BT)
    outputs, seeds = [x_BTD], [grad_BTD]
    if aux.requires_grad:
        outputs, seeds = [x_BTD, aux], [grad_BTD, aux_scale.to(aux.dtype)]
    torch.autograd.backward(outputs, seeds)
    return total


def head_backward(
    x_BTD: Tensor, targets_BT: Tensor, rows: Tensor | None, chunk_loss: ChunkLoss, scale: Tensor,
    size: int | None = None, stamps_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Backward pass of scale · (sum of cross-entropies) through the head alone; the sum and the gradient of x_BTD.

    `rows` are the positions with a target (`kept_rows`); `chunk_loss(x_ND, targets_N)` is the head and its loss;
    `stamps_BT` name the positions to a head with dropout. Head and loss run piece by piece, forward and at once
    backward, so that no (N, V) tensor is ever whole: at 8,192 positions and a vocabulary of 8,192 that is 16 MiB of
    logits in place of 256 (and again as much for their gradient), and the pieces stay in the cache: 455 ms in place of
    1,314 (2 busy CPU cores, bf16, D 256; no gain at a vocabulary of 32,768). The gradients add up over the pieces, so
    the result is that of the whole.
    """
    total = torch.zeros((), device=x_BTD.device)
    gradients = []
    for piece in chunks(x_BTD.detach(), targets_BT, rows, size, stamps_BT):
        leaf = piece.x.detach().requires_grad_()
        loss = piece.run(chunk_loss, leaf)
        (loss * scale).backward()
        total += loss.detach()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    N, D = targets_BT.numel(), x_BTD.size(-1)
    grad_ND = torch.cat(gradients)
    if rows is not None:
        grad_ND = x_BTD.new_zeros(N, D).index_copy(0, rows, grad_ND[: len(rows)])
    return total, grad_ND.view_as(x_BTD)


def head_seeds(
    x_BTD: Tensor, targets_BT: Tensor, rows: Tensor | None, chunk_loss: ChunkLoss, scale: Tensor,
    stamps_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum as in `head_backward`; and of what tensor, with which gradient, the backward pass is still to be run.

    Positions that fit in one piece (a pipeline's microbatch, mostly) go through the head in one backward pass with what
    made them: a pass of its own took 0.15 ms of a small stage's 8 (one CPU thread). More pieces have had their
    `head_backward`.
    """
    pieces = chunks(x_BTD, targets_BT, rows, None, stamps_BT)
    if len(pieces) == 1:
        total = pieces[0].run(chunk_loss, pieces[0].x)
        return total.detach(), total, scale.to(total.dtype)
    total, grad_BTD = head_backward(x_BTD, targets_BT, rows, chunk_loss, scale, stamps_BT=stamps_BT)
    return total, x_BTD, grad_BTD


def loss_sum(x_BTD: Tensor, targets_BT: Tensor, rows: Tensor | None, chunk_loss: ChunkLoss) -> Tensor:
    """Sum of cross-entropies without gradients."""
    total = torch.zeros((), device=x_BTD.device)
    for piece in chunks(x_BTD, targets_BT, rows, None):
        total += piece.run(chunk_loss, piece.x)
    return total


def answer_logprobs(
    x_BTD: Tensor, targets_BT: Tensor, rows: Tensor | None, chunk_logprobs: ChunkLoss, stamps_BT: Tensor | None = None
) -> Tensor:
    """Sum over each sequence of log p(target), (B,), float32, with gradients.

    `rows` are the positions with a target (`kept_rows`); `chunk_logprobs(x_ND, targets_N)` is the head and
    `target_logprobs`; `stamps_BT` as in `head_backward`. They run piece by piece, and backwards again, so that no more
    logits exist than those of a piece.
    """
    found = [
        checkpoint(piece.run, chunk_logprobs, piece.x, use_reentrant=False, preserve_rng_state=False)
        for piece in chunks(x_BTD, targets_BT, rows, None, stamps_BT)
    ]
    logprobs_N = torch.cat(found)
    if rows is not None:
        logprobs_N = logprobs_N.new_zeros(targets_BT.numel()).index_copy(0, rows, logprobs_N[: len(rows)])
    return logprobs_N[: targets_BT.numel()].view_as(targets_BT).sum(dim=1)


def pairs_loss(logprobs_P: Tensor, reference_P: Tensor, is_pair_B: Tensor, beta: float) -> Tensor:
    """Sum of DPO's loss over the rows that hold a pair, 0-d. Log-probabilities: those of all chosen answers, then those
    of all rejected ones (P = 2B)."""
    (chosen_B, rejected_B), (reference_chosen_B, reference_rejected_B) = logprobs_P.chunk(2), reference_P.chunk(2)
    loss_B, _ = dpo_loss(chosen_B, rejected_B, reference_chosen_B, reference_rejected_B, beta)
    return (loss_B * is_pair_B).sum()


def dpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, reference_chosen_B: Tensor, reference_rejected_B: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """DPO's loss of each pair (B,), in nats, and its margin (B,): Rafailov et al. 2023 (arXiv:2305.18290), eq. 7.

    Arguments are log-probabilities of whole answers under the model and under the reference. The margin is
    β[(log π(y_w) - log π_ref(y_w)) - (log π(y_l) - log π_ref(y_l))], the loss -log σ(margin).
    Worked number: β = 0.1, log π = (-10, -20), log π_ref = (-12, -15): margin 0.1 · (2 - (-5)) = 0.7, loss 0.40319.
    """
    margin_B = beta * ((chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B))
    return -F.logsigmoid(margin_B), margin_B
