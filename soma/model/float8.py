"""Linear layers whose three matrix products run in 8-bit floating point, on GPUs that have it (Hopper, Ada and newer).

Activations and weights are e4m3, gradients e5m2 (Micikevicius et al. 2022, arXiv:2209.05433), each tensor with one
scale from its own largest number at the time of the product (no history). Weights and results stay in their dtype; only
what the product reads is rounded. Letters: N tokens, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # what the product's inner and outer sizes must divide by


def to_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x rounded to `dtype`, and the float32 scale that brings it back: x ≈ rounded · scale."""
    largest = torch.finfo(dtype).max
    scale = x.detach().abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def multiply(a_NI: Tensor, b_IO: Tensor, scale_a: Tensor, scale_b: Tensor, out: torch.dtype) -> Tensor:
    """Product of two 8-bit matrices, the first stored by rows, the second by columns; (N, O) in `out`."""
    return torch._scaled_mm(a_NI, b_IO, scale_a=scale_a, scale_b=scale_b, out_dtype=out, use_fast_accum=False)


class _Product(torch.autograd.Function):
    """y = x Wᵀ, with both gradients, in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        x8, x_scale = to_float8(x_NI, E4M3)
        w8, w_scale = to_float8(weight_OI, E4M3)
        ctx.save_for_backward(x8, w8, x_scale, w_scale)
        ctx.dtype = x_NI.dtype
        return multiply(x8, w8.t(), x_scale, w_scale, x_NI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x8, w8, x_scale, w_scale = ctx.saved_tensors
        g8, g_scale = to_float8(grads[0].contiguous(), E5M2)
        # Each product wants its first factor by rows and its second by columns: the others are turned round in memory.
        grad_NI = multiply(g8, w8.t().contiguous().t(), g_scale, w_scale, ctx.dtype)
        grad_OI = multiply(g8.t().contiguous(), x8.t().contiguous().t(), g_scale, x_scale, ctx.dtype)
        return grad_NI, grad_OI


class Float8Linear(nn.Linear):
    """A linear layer without bias, computed in 8 bits; parameters as those of `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O). The number of tokens must be a multiple of 16."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x_NI = x.reshape(-1, self.in_features).to(dtype)
        return _Product.apply(x_NI, self.weight.to(dtype)).view(*x.shape[:-1], self.out_features)


def why_not(device: torch.device) -> str | None:
    """Why 8-bit products do not run there; None if they do."""
    if device.type != "cuda":
        return "8-bit products need a GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= (8, 9) else f"this GPU (compute capability {major}.{minor}) has none; 8.9 has"


def use_float8(model: nn.Module) -> int:
    """Turn the linear layers of the transformer's layers into `Float8Linear`, in place; how many were turned.

    Left as they are: the head (its rounding reaches the loss at once), routers, layers with a bias, and those whose
    sizes are not multiples of 16.
    """
    turned = 0
    for name, module in model.named_modules():
        fits = type(module) is nn.Linear and module.bias is None and name.startswith("layers.")
        if fits and not module.in_features % MULTIPLE and not module.out_features % MULTIPLE:
            module.__class__ = Float8Linear
            turned += 1
    return turned
