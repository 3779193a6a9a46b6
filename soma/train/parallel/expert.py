"""Expert parallelism: every rank of a group has some of the experts, and tokens travel to theirs and back.

Dropless: every token reaches the experts it chose, however many chose the same. Letters as in `soma.model.moe`: N
tokens, K experts a token, P = N·K pairs, E experts, D model width; R ranks, Q pairs that arrive here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard

from soma.model.layers import compute_dtype
from soma.model.moe import Experts, MoE
from soma.model.transformer import Transformer
from soma.train.parallel.exchange import Counts, Exchange, GroupExchange, count, moment, start
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
            spread(experts, model.config.num_experts, GroupExchange(group))


def spread(experts: Experts, count: int, exchange: Exchange) -> None:
    """Let experts of which this rank has `count` / R run with those of the other ranks of an exchange."""
    experts.forward = Spread(experts, count, exchange).forward  # type: ignore[method-assign]


def spread_of(experts: Experts) -> "Spread | None":
    """How experts run with those of other ranks; None where all are here."""
    owner = getattr(experts.forward, "__self__", None)
    return owner if isinstance(owner, Spread) else None


@dataclass
class Sent:
    """Where the pairs of some tokens go and how many come: the pairs by expert, and so by rank, and the counts."""

    order: Tensor
    counts: Counts


class Spread:
    """Routed experts over the ranks of an exchange, phase by phase: `pack`, dispatch, `compute`, combine, `merge`."""

    def __init__(self, experts: Experts, count: int, exchange: Exchange) -> None:
        self.experts, self.count, self.exchange = experts, count, exchange

    def forward(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """`Experts.forward`, one phase after the other."""
        rows_PD, sent = self.pack(x_ND, chosen_NK)
        to_R, from_R, counts_E = sent.counts.sizes()
        arrived_QD = travel(rows_PD, to_R, from_R, self.exchange)
        done_QD = self.compute(arrived_QD, counts_E, sent)
        back_PD = travel(done_QD, from_R, to_R, self.exchange)
        return self.merge(back_PD, weights_NK, sent)

    def pack(self, x_ND: Tensor, chosen_NK: Tensor) -> tuple[Tensor, Sent]:
        """The rows to send, sorted by expert, and how many go where."""
        flat_P = chosen_NK.flatten()
        order_P = flat_P.argsort(stable=True)
        sent_E = torch.zeros(self.count, dtype=torch.int64, device=x_ND.device)
        sent_RE = sent_E.index_add(0, flat_P, torch.ones_like(flat_P)).view(self.exchange.ranks, -1)
        sent = Sent(order_P, count(self.exchange, sent_RE))
        return _Repeat.apply(x_ND.to(compute_dtype(x_ND)), order_P, chosen_NK.size(1)), sent

    def compute(self, arrived_QD: Tensor, counts_E: Tensor, sent: Sent) -> Tensor:
        """This rank's experts on the rows that came. They come by rank and then by expert, and are wanted by expert."""
        R, E = sent.counts.got.shape
        expert_RE = torch.arange(E, device=arrived_QD.device).repeat(R)
        expert_Q = expert_RE.repeat_interleave(sent.counts.got.flatten(), output_size=len(arrived_QD))
        order_Q = expert_Q.argsort(stable=True)
        done_QD = self.experts.by_expert(_Permute.apply(arrived_QD, order_Q), counts_E)
        return _Permute.apply(done_QD, inverse(order_Q))

    def merge(self, back_PD: Tensor, weights_NK: Tensor, sent: Sent) -> Tensor:
        """The tokens' sums over what their experts gave, weighted."""
        out_NKD = _Permute.apply(back_PD, inverse(sent.order)).view(*weights_NK.shape, -1)
        return (out_NKD * weights_NK[..., None].to(back_PD.dtype)).sum(1)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes a permutation."""
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))


class _Permute(torch.autograd.Function):
    """Rows in another order. Backwards too it is a gather, where autograd's own would sort indices to add up rows."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, order_P: Tensor) -> Tensor:
        ctx.save_for_backward(order_P)
        return x_PD[order_P]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order_P,) = ctx.saved_tensors
        return grads[0][inverse(order_P)], None


class _Repeat(torch.autograd.Function):
    """Each token once for each of its K pairs, in the pairs' order."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_P: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(order_P)
        ctx.K = K
        return x_ND[order_P // K]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order_P,) = ctx.saved_tensors
        return grads[0][inverse(order_P)].unflatten(0, (-1, ctx.K)).sum(1), None, None


class _Travel(torch.autograd.Function):
    """An exchange of rows; backwards the gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, to_R: list[int], from_R: list[int], exchange: Exchange) -> Tensor:
        ctx.to, ctx.from_, ctx.exchange = to_R, from_R, exchange
        return start(exchange, x_PD, to_R, from_R, moment(x_PD.device)).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        back = start(ctx.exchange, grads[0], ctx.from_, ctx.to, moment(grads[0].device))
        return back.wait(), None, None, None


def travel(x_PD: Tensor, to_R: list[int], from_R: list[int], exchange: Exchange) -> Tensor:
    """Send the first to[0] rows to rank 0 and so on; the rows that arrive, by rank."""
    return _Travel.apply(x_PD, to_R, from_R, exchange)
