"""Expert parallelism: every rank of a group has some of the experts, and tokens travel to theirs and back.

Dropless: every token reaches the experts it chose, however many chose the same. Letters as in `soma.model.moe`: N
tokens, K experts a token, P = N·K pairs, E experts, D model width; R ranks, Q pairs that arrive here.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard

from soma.model.layers import compute_dtype
from soma.model.moe import Experts, MoE
from soma.model.transformer import Transformer
from soma.train.parallel.local import Localized, cut
from soma.train.parallel.mesh import Mesh


def apply_experts(model: Transformer, mesh: Mesh) -> None:
    """Divide the experts of all MoE layers over the mesh's ep ranks (over tp, `apply_tensor` has cut them already)."""
    group = mesh.group("ep")
    assert group is not None
    assert mesh.experts is not None
    for layer in model.layers:
        if isinstance(layer.mlp, MoE):
            experts = layer.mlp.experts
            if not isinstance(experts, Localized):
                for name in ("gate_proj", "up_proj", "down_proj"):
                    cut(experts, name, mesh.experts, [Shard(0)])
            experts.forward = partial(  # type: ignore[method-assign]
                dispatch, experts, model.config.num_experts, group
            )


def dispatch(
    experts: Experts, count: int, group: dist.ProcessGroup, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor
) -> Tensor:
    """`Experts.forward` where this rank has `count` / R of the experts: send, compute, send back, combine."""
    K, dtype, device = chosen_NK.size(1), compute_dtype(x_ND), x_ND.device
    order_P = chosen_NK.flatten().argsort(stable=True)  # by expert, so by rank
    sent_RE = torch.bincount(chosen_NK.flatten(), minlength=count).view(group.size(), -1)
    got_RE = torch.empty_like(sent_RE)
    dist.all_to_all_single(got_RE, sent_RE, group=group)
    to_R, from_R = torch.stack((sent_RE.sum(1), got_RE.sum(1))).tolist()
    arrived_QD = exchange(x_ND.to(dtype)[order_P // K], to_R, from_R, group)
    # They arrive by rank and then by expert, and are wanted by expert.
    expert_Q = torch.arange(got_RE.size(1), device=device).repeat(group.size()).repeat_interleave(got_RE.flatten())
    order_Q = expert_Q.argsort(stable=True)
    done_QD = experts.by_expert(arrived_QD[order_Q], got_RE.sum(0))
    out_PD = exchange(done_QD[inverse(order_Q)], from_R, to_R, group)
    out_NKD = out_PD[inverse(order_P)].view(*chosen_NK.shape, -1)
    return (out_NKD * weights_NK[..., None].to(dtype)).sum(1)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes a permutation."""
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; backwards the gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, to_R: list[int], from_R: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.to, ctx.from_, ctx.group = to_R, from_R, group
        return rows_to_all(x_PD, to_R, from_R, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return rows_to_all(grads[0], ctx.from_, ctx.to, ctx.group), None, None, None


def exchange(x_PD: Tensor, to_R: list[int], from_R: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first to[0] rows to rank 0 of the group and so on; the rows that arrive, by rank."""
    return _Exchange.apply(x_PD, to_R, from_R, group)


def rows_to_all(x_PD: Tensor, to_R: list[int], from_R: list[int], group: dist.ProcessGroup) -> Tensor:
    """The collective itself."""
    out = x_PD.new_empty(sum(from_R), x_PD.size(1))
    dist.all_to_all_single(out, x_PD.contiguous(), from_R, to_R, group=group)
    return out
