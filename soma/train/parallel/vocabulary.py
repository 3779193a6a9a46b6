"""Cross-entropy where each rank has the scores of a part of the vocabulary (Megatron-LM, arXiv:1909.08053, section 3).

N positions, W words of this rank's part. No rank ever sees all the scores: three numbers a position travel.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from soma.train.loss import IGNORE


class _CrossEntropy(torch.autograd.Function):
    """-log p(target) for each position; the backward pass needs no communication."""

    @staticmethod
    def forward(ctx: Any, logits_NW: Tensor, targets_N: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
        logits_NW = logits_NW.float()
        largest_N = logits_NW.amax(-1)
        dist.all_reduce(largest_N, dist.ReduceOp.MAX, group=group)
        shifted_NW = logits_NW - largest_N[:, None]
        here_N = (targets_N >= first) & (targets_N < first + logits_NW.size(1))
        index_N = torch.where(here_N, targets_N - first, 0)
        target_N = shifted_NW.gather(1, index_N[:, None])[:, 0] * here_N
        exp_NW = shifted_NW.exp()
        both_2N = torch.stack((exp_NW.sum(-1), target_N))
        dist.all_reduce(both_2N, group=group)
        total_N, target_N = both_2N
        ctx.save_for_backward(exp_NW.div_(total_N[:, None]), index_N, here_N)
        return total_N.log() - target_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probability_NW, index_N, here_N = ctx.saved_tensors
        grad_NW = probability_NW.scatter_add(1, index_N[:, None], -here_N.to(probability_NW.dtype)[:, None])
        return grad_NW * grads[0][:, None], None, None, None


def cross_entropy(logits_NW: Tensor, targets_N: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
    """-log p(target) in nats, (N,), float32, on every rank; 0 where the target is -100.

    logits_NW: scores of the words first … first + W - 1. The same value as `F.cross_entropy` of all ranks' scores side
    by side. Worked number: scores (0, ln 3) on two ranks of one word each, target 1: ln 4 - ln 3 = 0.28768.
    """
    kept_N = targets_N != IGNORE
    return torch.where(kept_N, _CrossEntropy.apply(logits_NW, targets_N, first, group), 0.0)
