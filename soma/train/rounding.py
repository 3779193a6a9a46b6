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

# A compiled update of any number of rows reads and writes 16 bytes at a time if their length divides by it.
WIDTH = 1024
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
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, key_4: Tensor, figures_4: Tensor, decay: float,
    beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """One AdamW update of a bf16 weight in float32 arithmetic; all that is kept is rounded stochastically.

    `figures_4`: 1 - beta1^step, 1 - beta2^step, learning rate: a power for each number would cost more than the rest.
    """
    first_share, second_share, rate = figures_4[0], figures_4[1], figures_4[2]
    gradient = grad.float()
    new_mean = mean.float().lerp(gradient, 1 - beta1)
    new_square = square.float().lerp(gradient * gradient, 1 - beta2)
    root = (new_square / second_share).sqrt() + eps
    new = weight.float() * (1 - rate * decay) - rate * (new_mean / first_share) / root
    places = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device).view(weight.shape)
    random = _mix(places + key_4[0])
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
        self.width = WIDTH if compiled else 1
        self.update: Callable[..., None] = torch.compile(_update) if compiled else _update
        self.places: dict[tuple[int, ...], Tensor] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype != torch.bfloat16:
                    raise ValueError(f"RoundedAdamW takes bf16 parameters, not {parameter.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "RoundedAdamW takes no closure"
        first = 0
        for group in self.param_groups:
            numbered = enumerate(group["params"], first)
            members = [(number, parameter) for number, parameter in numbered if parameter.grad is not None]
            first += len(group["params"])
            if members:
                self._step_group(group, members)

    def _step_group(self, group: dict[str, Any], members: list[tuple[int, nn.Parameter]]) -> None:
        """One update of a group's parameters, each with its number among all. No wait for a GPU, and nothing small is
        computed parameter by parameter."""
        states = [self.state[parameter] for _, parameter in members]
        for state, (_, parameter) in zip(states, members, strict=True):
            if not state:
                state |= new_state(parameter)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        steps_P = torch.stack(steps)
        beta1, beta2 = group["betas"]
        rate_P = torch.full_like(steps_P, float(group["lr"]))
        # Four numbers a row: rows then begin where compiled code may read 16 bytes at a time.
        figures_P4 = torch.stack([1 - beta1**steps_P, 1 - beta2**steps_P, rate_P, rate_P], dim=1)
        keys_P4 = self._keys(members, steps_P)[:, None].expand(-1, 4).contiguous()
        rows = zip(members, states, keys_P4.unbind(), figures_P4.unbind(), strict=True)
        for (_, parameter), state, key_4, figures_4 in rows:
            assert parameter.grad is not None
            whole = [
                _flat(one, self.width) for one in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            ]
            for place in range(0, len(whole[0]), self.piece):
                part = [one[place : place + self.piece] for one in whole]
                key = key_4 + place if place else key_4
                self.update(*part, key, figures_4, group["weight_decay"], beta1, beta2, group["eps"])

    def _keys(self, members: list[tuple[int, nn.Parameter]], steps_P: Tensor) -> Tensor:
        """Where each tensor's noise begins at its step, int32: (seed, number of the tensor, step), far apart, and as
        far on as this rank's piece lies in the whole."""
        numbers = tuple(number for number, _ in members)
        if numbers not in self.places:
            seeds = [number * 0x85EBCA77 + self.seed * 0xC2B2AE3D for number in numbers]
            offsets = [_first_place(parameter) for _, parameter in members]
            both = [[_wrapped(one) for one in line] for line in (seeds, offsets)]
            self.places[numbers] = torch.tensor(both, dtype=torch.int32).to(steps_P.device)
        seeds_P, offsets_P = self.places[numbers]
        return _mix(steps_P.to(torch.int32) * _wrapped(0x9E3779B1) + seeds_P) + offsets_P


def new_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state before a first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter),
    }  # fmt: skip


def _flat(tensor: Tensor, width: int) -> Tensor:
    """A view of all numbers in a row; of a tensor that is cut over ranks, of this rank's piece. `width` above 1: in
    rows of so many, if they fill them."""
    tensor = tensor.detach()
    flat = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)
    return flat.view(-1, width) if width > 1 and len(flat) % width == 0 else flat


def _first_place(parameter: Tensor) -> int:
    """Where this rank's piece begins in the whole tensor: pieces cut by rows draw the noise of the whole."""
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return sum(first * stride for first, stride in zip(offset, parameter.stride(), strict=True))


def _wrapped(number: int) -> int:
    """An integer modulo 2^32, as int32."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
