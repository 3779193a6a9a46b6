"""Balanced experts without an auxiliary loss: the bias of DeepSeek-V3's routers (arXiv:2408.15664, algorithm 1).

The bias decides who is chosen and has no gradient. After each optimizer step the bias of an expert that saw more than
the mean of the tokens falls by `rate`, that of one that saw fewer rises by it. The biases are buffers of the model, so
checkpoints and model folders hold them; between two steps there is no other state.
"""

import torch
from torch import Tensor, nn

from soma.model.moe import Router
from soma.train.world import World


def bias_step(load_E: Tensor, rate: float) -> Tensor:
    """What is added to the biases: rate · sign(mean load - load), (E,), float32.

    Worked number: loads (6, 2, 4, 4) at 1e-3 have the mean 4: (-1e-3, 1e-3, 0, 0).
    """
    load_E = load_E.double()
    return rate * (load_E.mean() - load_E).sign().float()


class RouterBalance:
    """Counts the tokens that each expert is sent in training, over all microbatches and ranks of a batch."""

    def __init__(self, model: nn.Module, rate: float, world: World) -> None:
        self.rate, self.world = rate, world
        routers = (module for module in model.modules() if isinstance(module, Router))
        self.routers = [router for router in routers if rate and router.config.topk_method == "noaux_tc"]
        for router in self.routers:
            device = router.e_score_correction_bias.device  # where it computes: weights may be offloaded
            router.load = torch.zeros(router.config.num_experts, dtype=torch.int64, device=device)

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by the counts since the last call, which start anew."""
        for router in self.routers:
            assert router.load is not None
            router.e_score_correction_bias += bias_step(self.world.sum(router.load), self.rate)
            router.load.zero_()
