"""Backward passes in two parts: the gradient of the input now, those of the matrices later (arXiv:2401.10241).

A linear layer of a split stage runs under an extra input of its output's shape, a *tap*, which adds nothing and whose
gradient is that of the output; and it hands out its own input. So the first part needs one pass of autograd for the
stage's input and the taps, and the second part is one product for each matrix. Nothing is stored behind autograd's
back, so it is the same under `torch.compile`, where a whole stage is one operator to autograd. What is cheap (norms,
biases, routers, the embedding) is done in the first part.

Letters: N rows, I input and O output features, E experts, P rows sorted by expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soma.model.layers import compute_dtype
from soma.model.moe import Experts, grouped_linear, grouped_outer


class TappedLinear(torch.autograd.Function):
    """xWᵀ + b, whose backward gives no gradient of W but hands that of the output to the tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, tap: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI)
        ctx.has_bias = bias_O is not None
        return F.linear(x, weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight_OI,) = ctx.saved_tensors
        grad_bias_O = grad.flatten(0, -2).sum(0).to(weight_OI.dtype) if ctx.has_bias else None
        return grad @ weight_OI.to(grad.dtype), None, grad_bias_O, grad


class TappedGrouped(torch.autograd.Function):
    """The same for a stack of experts' matrices."""

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, weight_EOI: Tensor, counts_E: Tensor, tap_PO: Tensor) -> Tensor:
        ctx.save_for_backward(weight_EOI, counts_E)
        return grouped_linear(x_PI, weight_EOI.to(x_PI.dtype), counts_E)

    @staticmethod
    def backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor | None, ...]:
        weight_EOI, counts_E = ctx.saved_tensors
        return grouped_linear(grad_PO, weight_EOI.to(grad_PO.dtype).transpose(1, 2), counts_E), None, None, grad_PO


Taps = tuple[Tensor, ...]
Saved = tuple[tuple[Tensor, ...], ...]


class Split(nn.Module):
    """What a layer with taps has: the taps of a forward pass that is under way, what it saved, and what it puts out.

    Without taps it is the layer that it was.
    """

    taps: Taps | None
    saved: Saved
    outputs: tuple[Tensor, ...] | None  # not None: they are noted, as tensors without memory

    def reset(self) -> None:
        self.taps, self.saved, self.outputs = None, (), None

    def note(self, out: Tensor) -> Tensor:
        """Note an output, where that is asked for."""
        if self.outputs is not None:
            self.outputs = (*self.outputs, torch.empty_like(out, device="meta"))
        return out

    def accumulate(self, saved: Saved, grads: Taps) -> None:
        """Add the matrices' gradients from inputs and gradients of outputs."""
        raise NotImplementedError


class SplitLinear(Split, nn.Linear):
    """A linear layer with one tap."""

    def forward(self, x: Tensor) -> Tensor:
        if self.taps is None:
            return self.note(F.linear(x, self.weight, self.bias))
        x = x.to(compute_dtype(x))
        self.saved = ((x.detach(),),)
        return TappedLinear.apply(x, self.weight, self.bias, self.taps[0])

    def accumulate(self, saved: Saved, grads: Taps) -> None:
        ((x,),), (grad,) = saved, grads
        add_gradient(self.weight, grad.flatten(0, -2).mT @ x.flatten(0, -2))


class SplitExperts(Split, Experts):
    """Experts with a tap for each of their three stacks."""

    names = ("gate_proj", "up_proj", "down_proj")

    def project(self, name: str, x_P: Tensor, counts_E: Tensor) -> Tensor:
        if self.taps is None:
            return self.note(super().project(name, x_P, counts_E))
        self.saved = (*self.saved, (x_P.detach(), counts_E))
        return TappedGrouped.apply(x_P, getattr(self, name), counts_E, self.taps[self.names.index(name)])

    def accumulate(self, saved: Saved, grads: Taps) -> None:
        for name, (x_PI, counts_E), grad_PO in zip(self.names, saved, grads, strict=True):
            add_gradient(getattr(self, name), grouped_outer(grad_PO, x_PI, counts_E))


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to `.grad` as autograd does."""
    gradient = gradient.to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def split_layers(module: nn.Module) -> list[Split]:
    """Give the trainable linear layers and experts in `module` taps, in place; names and parameters stay. Returns them.

    Layers of other kinds (quantized, low rank) keep their whole backward in the first part.
    """
    found: list[Split] = []
    for child in module.modules():
        if type(child) is nn.Linear and child.weight.requires_grad:
            child.__class__ = SplitLinear
        elif type(child) is Experts and all(parameter.requires_grad for parameter in child.parameters()):
            child.__class__ = SplitExperts
        if isinstance(child, Split):
            child.reset()
            found.append(child)
    return found
