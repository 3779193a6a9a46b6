"""Sparse mixture of experts: routers of Mixtral, Qwen3-MoE and DeepSeek, experts as stacked matrices.

Shape letters: N tokens (flat), D model width, I expert width, E experts, K experts per token, P = N·K pairs of token
and expert.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soma.model.config import ModelConfig
from soma.model.layers import MLP, compute_dtype


@torch.library.custom_op("soma::grouped_linear", mutates_args=())
def grouped_linear(x_PD: Tensor, weight_EID: Tensor, counts_E: Tensor) -> Tensor:
    """Rows of x, sorted by expert with `counts` rows each, times their expert's matrix: (P, I).

    An operator of its own so that torch.compile sees no data-dependent shape; inside it is a plain loop over experts.
    """
    rows = counts_E.tolist()
    parts = [F.linear(x, weight) for x, weight in zip(x_PD.split(rows), weight_EID, strict=True)]
    return torch.cat(parts)


@grouped_linear.register_fake
def _(x_PD: Tensor, weight_EID: Tensor, counts_E: Tensor) -> Tensor:
    return x_PD.new_empty(x_PD.size(0), weight_EID.size(1))


@torch.library.custom_op("soma::grouped_outer", mutates_args=())
def grouped_outer(y_PI: Tensor, x_PD: Tensor, counts_E: Tensor) -> Tensor:
    """Per expert yᵀx over its rows, (E, I, D): the gradient of `grouped_linear` for its weights."""
    rows = counts_E.tolist()
    return torch.stack([y.T @ x for y, x in zip(y_PI.split(rows), x_PD.split(rows), strict=True)])


@grouped_outer.register_fake
def _(y_PI: Tensor, x_PD: Tensor, counts_E: Tensor) -> Tensor:
    return y_PI.new_empty(counts_E.size(0), y_PI.size(1), x_PD.size(1))


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_PI: Tensor) -> tuple[Tensor, Tensor, None]:
    x_PD, weight_EID, counts_E = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_x_PD = grouped_linear(grad_PI, weight_EID.transpose(1, 2), counts_E)
    return grad_x_PD, grouped_outer(grad_PI, x_PD, counts_E), None


grouped_linear.register_autograd(_backward, setup_context=_save)


def load_balancing_loss(
    scores_NE: Tensor, chosen_NK: Tensor, keep_N: Tensor | None = None,
    share: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """E · Σ_e f_e · P_e: f_e tokens routed to expert e, P_e its score, both means (Switch, arXiv:2101.03961 eq. 4-6).

    For top-1 it is Switch's loss, for top-k Mixtral's: K when balanced. Worked number: E = 2, K = 1, scores
    (0.8, 0.2), (0.6, 0.4), both tokens to expert 0: 2 · (1 · 0.7 + 0 · 0.3) = 1.4. Tokens where `keep_N` is False
    (padding) do not count. `share` gives the sum of a tensor over the processes that hold the other tokens.
    """
    E = scores_NE.size(1)
    keep = torch.ones_like(scores_NE[:, 0]) if keep_N is None else keep_N.to(scores_NE.dtype)
    pairs_E = torch.zeros_like(scores_NE[0]).index_add(
        0, chosen_NK.flatten(), keep.repeat_interleave(chosen_NK.size(1))
    )
    total, sum_E = keep.sum(), (scores_NE * keep[:, None]).sum(0)
    if share is not None:
        total, pairs_E, sum_E = share(torch.cat((total[None], pairs_E, sum_E))).split([1, E, E])
    total = total.clamp(min=1)
    return E * (pairs_E / total * (sum_E / total)).sum()


class Router(nn.Module):
    """Scores of the experts for each token and the choice of K of them. Runs in float32."""

    e_score_correction_bias: Tensor
    load: Tensor | None  # int64, the trainer's: tokens that each expert was sent in training, or None: not counted

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("load", None, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # The score bias stays float32 in a bfloat16 model: its steps are smaller than bfloat16 resolves.
        bias = getattr(self, "e_score_correction_bias", None)
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (N, K), chosen experts (N, K), and scores (N, E) whose rows sum to 1 (for the balancing loss)."""
        config = self.config
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.weight.float())
        if config.scoring_func == "sigmoid":
            scores_NE = logits_NE.sigmoid()
            probabilities_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        else:
            scores_NE = probabilities_NE = logits_NE.softmax(-1)
        chosen_NK = self.choose(scores_NE.detach())
        weights_NK = scores_NE.gather(1, chosen_NK)
        if config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return weights_NK * config.routed_scaling_factor, chosen_NK, probabilities_NE

    @torch.no_grad()
    def count(self, chosen_NK: Tensor, keep_N: Tensor | None) -> None:
        """Add the choices of the tokens that `keep_N` keeps to `load`, where that is counted."""
        if self.load is not None:
            one_NK = torch.ones_like(chosen_NK) if keep_N is None else keep_N[:, None].expand_as(chosen_NK)
            self.load.index_add_(0, chosen_NK.flatten(), one_NK.flatten().to(self.load.dtype))

    def choose(self, scores_NE: Tensor) -> Tensor:
        """The K experts of each token: over all, or within the best `topk_group` groups.

        A group is worth its best expert (DeepSeek-V2) or the sum of its two best biased scores (DeepSeek-V3).
        """
        config = self.config
        if config.topk_method == "greedy":
            return scores_NE.topk(config.num_experts_per_tok, dim=-1).indices
        if config.topk_method == "noaux_tc":
            scores_NE = scores_NE + self.e_score_correction_bias
        grouped_NGM = scores_NE.view(-1, config.n_group, config.num_experts // config.n_group)
        if config.topk_method == "noaux_tc":
            worth_NG = grouped_NGM.topk(min(2, grouped_NGM.size(2)), dim=-1).values.sum(-1)
        else:
            worth_NG = grouped_NGM.amax(-1)
        best = worth_NG.topk(config.topk_group, dim=-1).indices
        open_NG = torch.zeros_like(worth_NG, dtype=torch.bool).scatter(1, best, True)
        scores_NE = grouped_NGM.masked_fill(~open_NG[..., None], float("-inf")).flatten(1)
        return scores_NE.topk(config.num_experts_per_tok, dim=-1).indices


class Experts(nn.Module):
    """E SwiGLU MLPs as three stacked matrices."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(E, inner, D))
        self.up_proj = nn.Parameter(torch.empty(E, inner, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, inner))

    def forward(self, x_ND: Tensor, weights_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        N, K = chosen_NK.shape
        dtype = compute_dtype(x_ND)
        order_P = chosen_NK.flatten().argsort(stable=True)
        one = torch.ones_like(order_P)
        counts_E = torch.zeros(len(self.gate_proj), dtype=torch.int64, device=x_ND.device)
        counts_E = counts_E.index_add(0, chosen_NK.flatten(), one)
        x_PD = x_ND.to(dtype)[order_P // K]
        out_PD = self.by_expert(x_PD, counts_E)
        back_P = torch.empty_like(order_P).scatter(0, order_P, torch.arange(N * K, device=x_ND.device))
        out_NKD = out_PD[back_P].view(N, K, -1)
        return (out_NKD * weights_NK[..., None].to(dtype)).sum(1)

    def by_expert(self, x_PD: Tensor, counts_E: Tensor) -> Tensor:
        """Each row, sorted by expert with `counts` rows each, through its expert."""
        gate_PI, up_PI = self.project("gate_proj", x_PD, counts_E), self.project("up_proj", x_PD, counts_E)
        return self.project("down_proj", F.silu(gate_PI) * up_PI, counts_E)

    def project(self, name: str, x_P: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert times their expert's matrix of the stack `name`."""
        return grouped_linear(x_P, getattr(self, name).to(x_P.dtype), counts_E)


class MoE(nn.Module):
    """Routed experts plus, in DeepSeek, shared experts that every token visits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.coefficient = config.router_aux_loss_coef
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            self.shared_experts = MLP(config, config.moe_intermediate_size * config.n_shared_experts)
        self.has_shared = config.n_shared_experts > 0
        self.share: Callable[[Tensor], Tensor] | None = None  # for `load_balancing_loss`, set from outside

    def forward(self, x_BTD: Tensor, keep_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Output, and in training the load-balancing loss times its coefficient (None otherwise)."""
        x_ND = x_BTD.reshape(-1, x_BTD.size(-1))
        weights_NK, chosen_NK, aux = self.route(x_ND, keep_BT)
        out_BTD = self.experts(x_ND, weights_NK, chosen_NK).view(x_BTD.shape)
        if self.has_shared:
            out_BTD = out_BTD + self.shared_experts(x_BTD)
        return out_BTD, aux

    def route(self, x_ND: Tensor, keep_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The router's weights and choices, (N, K); in training they are counted, and its loss comes with them."""
        weights_NK, chosen_NK, scores_NE = self.gate(x_ND)
        return weights_NK, chosen_NK, self.balance(scores_NE, chosen_NK, keep_BT)

    def balance(self, scores_NE: Tensor, chosen_NK: Tensor, keep_BT: Tensor | None) -> Tensor | None:
        """The load-balancing loss times its coefficient, in training (None otherwise, and for 0)."""
        if not self.training:
            return None
        keep_N = None if keep_BT is None else keep_BT.flatten()
        self.gate.count(chosen_NK, keep_N)
        if self.coefficient == 0:
            return None
        return self.coefficient * load_balancing_loss(scores_NE, chosen_NK, keep_N, self.share)
