"""Optimizers: fused AdamW, and Muon for the hidden matrices.

Shapes: a matrix is (M, N); experts stack E of them as (E, M, N); S matrices of one shape are worked on together.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from soma.model.moe import Router
from soma.train.config import TrainConfig
from soma.train.parallel.matrices import WholeMatrices, cut_as, local_part
from soma.train.rounding import RoundedAdamW

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # Jordan et al. 2024: the quintic with the steepest slope at 0 that stays bounded
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrix_SMN: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """The nearest orthogonal matrix, roughly: every singular value lands in about [0.7, 1.2]. Same shape and dtype.

    Newton-Schulz iteration X ← aX + b(XXᵀ)X + c(XXᵀ)²X on the matrix divided by its Frobenius norm (Jordan et al. 2024,
    "Muon"; coefficients `NEWTON_SCHULZ`). Works on a stack of matrices, in whatever dtype it is given.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix_SMN
    tall = x.size(-2) > x.size(-1)
    if tall:  # XXᵀ is then the smaller of the two products
        x = x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def update_scale(rows: int, columns: int) -> float:
    """Factor that gives Muon's update the size of AdamW's, so that both use one learning rate.

    A full-rank orthogonal (M, N) matrix has entries of root mean square 1/sqrt(max(M, N)); AdamW's updates have about
    0.2 (Liu et al. 2025, "Muon is scalable for LLM training", arXiv:2502.16982, section 2.2): 0.2 · sqrt(max(M, N)).
    update_scale(256, 1024) = 0.2 · 32 = 6.4.
    """
    return 0.2 * max(rows, columns) ** 0.5


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz (Jordan et al. 2024), decoupled weight decay, AdamW-sized updates.

    For 2-D weights of hidden layers and (E, M, N) stacks of experts. Deterministic at one thread count. `dtype` is that
    of the iteration: bf16 where the machine has it, fp32 elsewhere (bf16 there is emulated, and slow). `device` is
    where it runs: a GPU, for parameters that lie in the CPU's memory.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.device = dtype, device
        self.matrices = WholeMatrices(each for group in self.param_groups for each in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            by_shape: dict[tuple[Any, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((tuple(parameter.shape), cut_as(parameter)), []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update parameters of one shape: their matrices go through the iteration as one stack."""
        directions, pieces = [], []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            assert parameter.grad is not None
            buffer, grad, piece = (
                local_part(tensor) for tensor in (state["momentum_buffer"], parameter.grad, parameter.detach())
            )
            buffer.lerp_(grad, 1 - group["momentum"])
            directions.append(torch.lerp(grad, buffer, group["momentum"]).to(self.device, self.dtype))
            pieces.append(piece)
        rows, columns = parameters[0].shape[-2:]
        scale = group["lr"] * update_scale(rows, columns)
        updates = self.matrices.map(orthogonalize, parameters, directions)
        for piece, update in zip(pieces, updates, strict=True):
            piece.mul_(1 - group["lr"] * group["weight_decay"])
            piece.add_(update.to(piece.device, piece.dtype), alpha=-scale)


class AdamW(torch.optim.AdamW):
    """torch's, whose fused kernel is given this rank's pieces of what is cut. By way of DTensor it does the same, after
    it has looked at how each of five tensors a parameter is cut."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)  # fills them: parameters, gradients, moments, steps
        for tensors in lists:
            tensors[:] = [local_part(tensor) for tensor in tensors]
        return has_complex


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters in three lists: "hidden" (matrices of the layers), "matrices" (others that decay: an untied
    head, routers), "plain" (norms, biases, embeddings: no decay)."""
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    # A router's rows are scores of their own; orthogonalizing would mix them.
    routers = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    split: dict[str, list[nn.Parameter]] = {"hidden": [], "matrices": [], "plain": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            split["plain"].append(parameter)
        elif name.startswith("layers.") and id(parameter) not in routers:
            split["hidden"].append(parameter)
        else:
            split["matrices"].append(parameter)
    return split


def build_optimizers(
    model: nn.Module, config: TrainConfig, muon_dtype: torch.dtype, compiled: bool = False,
    device: torch.device | None = None, piece: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """AdamW alone, or Muon and AdamW, over the model's trainable parameters.

    `compiled`: whether what gains by it, the update of bf16 parameters, is compiled. `device`: where Muon multiplies,
    if not where the parameters lie. `piece`: what of a parameter is updated here.
    """
    split = {kind: list(map(piece, parameters)) for kind, parameters in split_parameters(model).items()}
    adamw: list[dict[str, Any]] = [
        {"params": split["matrices"], "weight_decay": config.weight_decay},
        {"params": split["plain"], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        optimizers.append(
            Muon(split["hidden"], config.learning_rate, config.momentum, config.weight_decay, muon_dtype, device)
        )
    else:
        adamw[0]["params"] = split["hidden"] + split["matrices"]
    groups = [
        {**group, "params": parameters} for group in adamw for parameters in by_cut(group["params"])
    ]  # the fused kernel takes tensors of one mesh at a time
    settings: dict[str, Any] = {
        "lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps,
    }  # fmt: skip
    if groups and config.parameters == "bf16" and config.lora is None:  # LoRA's updates are float32
        optimizers.append(RoundedAdamW(groups, **settings, seed=config.seed, compiled=compiled))
    elif groups:
        optimizers.append(AdamW(groups, **settings, fused=True))
    return optimizers


def by_cut(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in lists of those that are cut over the same ranks."""
    lists: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        lists.setdefault(cut_as(parameter), []).append(parameter)
    return list(lists.values())


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    """Give every parameter group the learning rate `value`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value


def allocate_state(optimizers: list[torch.optim.Optimizer]) -> None:
    """Make the state that a first step would make, so that a checkpoint can be read into it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if isinstance(optimizer, Muon):
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                else:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
