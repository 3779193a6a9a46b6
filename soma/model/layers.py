"""Norms and the dense MLP, and how layers that read the same input are fused for inference."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soma.model.adapted import adapt
from soma.model.config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv:1910.07467); float32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm over the residual stream."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, config.norm_eps)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of x run in: autocast's where it is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class Fused(nn.Module):
    """Base of modules that can read one input through several linear layers in one product, for inference.

    After `fuse()` the parameters of those layers are views of one matrix, so names, values and memory stay as they
    were; only `forward` takes one product in place of several. Moving or casting the module undoes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fused: Tensor | None = None
        self.fused_bias: Tensor | None = None
        self.fused_sizes: list[int] = []

    def fuse_layers(self, layers: list[nn.Linear]) -> None:
        """Join the weights (and biases: all or none) of linear layers that read the same input.

        Layers of another kind (quantized ones) stay as they are.
        """
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            return
        self.fused_sizes = [layer.out_features for layer in layers]
        with torch.no_grad():
            weights: list[Tensor] = [layer.weight for layer in layers]
            fused = torch.cat(weights)
            for layer, part in zip(layers, fused.split(self.fused_sizes), strict=True):
                layer.weight = nn.Parameter(part, requires_grad=False)
            biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
            self.fused_bias = torch.cat(biases) if biases else None
        self.fused = fused

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fused":
        self.fused = self.fused_bias = None
        super()._apply(fn, recurse)
        return self

    def project(self, x: Tensor, layers: list[nn.Linear]) -> list[Tensor]:
        """Outputs of the linear layers for x."""
        if self.fused is None:
            return [layer(x) for layer in layers]
        parts = F.linear(x, self.fused, self.fused_bias).split(self.fused_sizes, dim=-1)
        return [adapt(layer, x, part) for layer, part in zip(layers, parts, strict=True)]


class MLP(Fused):
    """down(silu(gate(x)) · up(x)) for SwiGLU (arXiv:2002.05202), down(gelu(up(x))) for GELU."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.activation = config.activation
        if self.activation == "swiglu":
            self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def fuse(self) -> None:
        """Join gate and up for inference."""
        if self.activation == "swiglu":
            self.fuse_layers([self.gate_proj, self.up_proj])

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            gate, up = self.project(x, [self.gate_proj, self.up_proj])
            return self.down_proj(F.silu(gate) * up)
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return self.down_proj(F.gelu(self.up_proj(x), approximate=approximate))
