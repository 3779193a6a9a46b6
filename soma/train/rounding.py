"""AdamW on bf16 parameters with stochastic rounding: half of the memory of fp32 training, and no stalled weights.

bf16 keeps 8 bits of a number, so an update below 1/512 of a weight is lost by rounding to nearest, every time. Rounded
up or down at random in proportion to the distance, it arrives in the mean (Gupta et al. 2015, arXiv:1502.02551; for LLM
training Zamirai et al. 2020, arXiv:2010.06192). Bytes a parameter: weight, gradient and two moments of 2 each, 8
against 16.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

FIRST, SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)  # lowbias32's factors, as int32


def noise(count: int, key: int, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """`count` uniform 16-bit integers (int32) that depend on (key, start + place) alone: a hash, not a generator.

    So a step draws the same numbers after a resumption, on any device and for a piece of a tensor that starts at
    `start`. The mixing is that of Chris Wellons' lowbias32. `noise(3, 1)` is [37056, 8577, 59869].
    """
    return _mix(torch.arange(start, start + count, dtype=torch.int32, device=device) + key) & 0xFFFF


def _mix(x: Tensor) -> Tensor:
    """int32 → int32; its products wrap, its shifts are those of unsigned numbers. 64 bits cost a GPU twice the time."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND
    return x ^ ((x >> 16) & 0xFFFF)


def round_stochastically(x: Tensor, noise_16: Tensor) -> Tensor:
    """float32 → bf16, up or down with the probability of its distance; `noise_16` uniform in [0, 2^16), int32.

    A bf16 number is the upper half of a float32's bits: adding noise to the lower half carries into the upper one with
    just that probability, whatever the sign. Infinite and NaN values stay.
    """
    bits = (x.view(torch.int32) + noise_16) & ~0xFFFF
    return torch.where(x.isfinite(), bits.view(torch.float32), x).to(torch.bfloat16)


def _update(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, key: Tensor, rate: Tensor, decay: float, beta1: float,
    beta2: float, eps: float, step: Tensor,
) -> None:  # fmt: skip
    """One AdamW update of a flat bf16 weight in float32 arithmetic; all that is kept is rounded stochastically."""
    gradient = grad.float()
    new_mean = mean.float().lerp(gradient, 1 - beta1)
    new_square = square.float().lerp(gradient * gradient, 1 - beta2)
    root = (new_square / (1 - beta2**step)).sqrt() + eps
    new = weight.float() * (1 - rate * decay) - rate * (new_mean / (1 - beta1**step)) / root
    random = _mix(torch.arange(weight.numel(), dtype=torch.int32, device=weight.device) + key)
    weight.copy_(round_stochastically(new, random & 0xFFFF))
    mean.copy_(round_stochastically(new_mean, (random >> 16) & 0xFFFF))
    square.copy_(round_stochastically(new_square, (_mix(random) >> 8) & 0xFFFF))


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) for bf16 parameters with bf16 moments.

    The same seed, step and parameters give the same weights on every device up to the order of sums in the gradients.
    `compiled` fuses the update into one pass over memory: on a GPU some 20 passes become one.
    """

    def __init__(
        self, parameters: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.1, seed: int = 0, compiled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        # Uncompiled, an update holds some 40 bytes a number for a moment: large tensors are worked on in pieces.
        self.piece = 1 << 62 if compiled else 1 << 24
        self.update: Callable[..., None] = torch.compile(_update, dynamic=True) if compiled else _update
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype != torch.bfloat16:
                    raise ValueError(f"RoundedAdamW takes bf16 parameters, not {parameter.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "RoundedAdamW takes no closure"
        for number, (group, parameter) in enumerate(self._every()):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state |= new_state(parameter)
            state["step"] += 1
            beta1, beta2 = group["betas"]
            key = _key(self.seed, number, state["step"]) + _first_place(parameter)
            rate = torch.tensor(float(group["lr"]), device=parameter.device)
            whole = [_flat(one) for one in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
            for first in range(0, whole[0].numel(), self.piece):
                part = [one[first : first + self.piece] for one in whole]
                self.update(
                    *part, key + first, rate, group["weight_decay"], beta1, beta2, group["eps"], state["step"]
                )  # fmt: skip

    def _every(self) -> Iterable[tuple[dict[str, Any], nn.Parameter]]:
        return ((group, parameter) for group in self.param_groups for parameter in group["params"])


def new_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state before a first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter),
    }  # fmt: skip


def _flat(tensor: Tensor) -> Tensor:
    """A view of all numbers in a row; of a tensor that is cut over ranks, of this rank's piece."""
    tensor = tensor.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)


def _first_place(parameter: Tensor) -> int:
    """Where this rank's piece begins in the whole tensor: pieces cut by rows draw the noise of the whole."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return sum(first * stride for first, stride in zip(offset, parameter.stride(), strict=True))


def _key(seed: int, number: int, step: Tensor) -> Tensor:
    """Where a tensor's noise begins at a step: (seed, number of the tensor, step), far apart, without a wait."""
    place = (number * 0x85EBCA77 + seed * 0xC2B2AE3D + (1 << 31)) % (1 << 32) - (1 << 31)
    return _mix(step.to(torch.int32) * (0x9E3779B1 - (1 << 32)) + place)
