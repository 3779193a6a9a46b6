"""The loss scaler of fp16, one for all ranks (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

Small gradients vanish in fp16, so the loss is scaled up and the gradients down again. Where they overflow the step is
left out and the scale halved; after 2,000 steps without overflow it doubles. torch's `GradScaler` sees the gradients
of one process: with weights cut over ranks, one would leave out a step that another takes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from soma.train.parallel.matrices import local_part

FIRST, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000  # torch's defaults


class LossScaler:
    """Does nothing unless `enabled`. Every rank makes the same calls. `device` is where the gradients lie."""

    def __init__(self, device: torch.device, enabled: bool, ranks: int = 1) -> None:
        self.enabled, self.ranks = enabled, ranks
        self.value = torch.full((), FIRST if enabled else 1.0, device=device)
        self.without_overflow = torch.zeros((), dtype=torch.int32, device=device)
        self.overflow = torch.zeros((), device=device)

    def scale(self, x: Tensor) -> Tensor:
        """x times the scale."""
        return x * self.value.to(x.device) if self.enabled else x

    @torch.no_grad()
    def unscale(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Divide all gradients by the scale, and find out whether one of any rank has overflowed."""
        if not self.enabled:
            return
        self.overflow.zero_()
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
        if gradients:
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.overflow, 1 / self.value)
        if self.ranks > 1:
            dist.all_reduce(self.overflow, dist.ReduceOp.MAX)

    def step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Step all optimizers, unless a gradient has overflowed; then move the scale."""
        if not (self.enabled and self.overflow.item()):
            for optimizer in optimizers:
                optimizer.step()
        if self.enabled:
            torch._amp_update_scale_(self.value, self.without_overflow, self.overflow, GROWTH, BACKOFF, INTERVAL)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"scale": float(self.value), "without_overflow": int(self.without_overflow)} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back `state_dict()`."""
        if self.enabled:
            self.value.fill_(state["scale"])
            self.without_overflow.fill_(state["without_overflow"])
