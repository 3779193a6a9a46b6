"""Backward passes in two parts: the gradient of the input now, those of the matrices later (arXiv:2401.10241).

A linear layer of a split stage runs under an extra input of its output's shape, a *tap*, which adds nothing and whose
gradient is that of the output; and it hands out its own input. So the first part needs one pass of autograd for the
stage's input and the taps, and the second part is one product for each matrix. Nothing is stored behind autograd's
back, so it is the same under `torch.compile`, where a whole stage is one operator to autograd. What is cheap (norms,
biases, routers, the embedding) is done in the first part.

Letters: N rows, I input and O output features, E experts, P rows sorted by expert.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from soma.model.layers import compute_dtype
from soma.model.moe import Experts, grouped_linear, grouped_outer
from soma.train.parallel.local import local_class


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


class Note(NamedTuple):
    """What one tapped product of a layer leaves for its second part: its number in the layer, its inputs, its tap."""

    layer: "Split"
    place: int
    inputs: tuple[Tensor, ...]
    tap: Tensor

    def accumulate(self) -> None:
        """The second part, after the first."""
        assert self.tap.grad is not None
        self.layer.accumulate_one(self.place, self.inputs, self.tap.grad)


@dataclass
class Notebook:
    """Where the layers of a stage note their products, while it has a page open."""

    page: list[Note] | None = None


class Split(nn.Module):
    """What a layer with taps has: the taps of a forward pass that is under way, what it saved, and what it puts out.

    Or, where a stage runs piece by piece and is not compiled, a `notebook`: on an open page each of its products notes
    itself, with a tap of its own making. Without either it is the layer that it was.
    """

    taps: Taps | None
    saved: Saved
    outputs: tuple[Tensor, ...] | None  # not None: they are noted, as tensors without memory
    notebook: Notebook | None

    def reset(self) -> None:
        self.taps, self.saved, self.outputs, self.notebook = None, (), None, None

    @property
    def page(self) -> list[Note] | None:
        return None if self.notebook is None else self.notebook.page

    @property
    def is_tapped(self) -> bool:
        """Whether this forward pass is one of two parts."""
        return self.taps is not None or self.page is not None

    def tap(self, place: int, inputs: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
        """The tap of product number `place`, whose inputs are kept and whose output has `shape`."""
        inputs = (inputs[0].detach(), *inputs[1:])
        if self.page is None:
            assert self.taps is not None
            self.saved = (*self.saved, inputs)
            return self.taps[place]
        tap = inputs[0].new_empty(()).expand(shape).requires_grad_()
        self.page.append(Note(self, place, inputs, tap))
        return tap

    def note(self, out: Tensor) -> Tensor:
        """Note an output, where that is asked for."""
        if self.outputs is not None:
            self.outputs = (*self.outputs, torch.empty_like(out, device="meta"))
        return out

    def accumulate(self, saved: Saved, grads: Taps) -> None:
        """Add the matrices' gradients from inputs and gradients of outputs."""
        for place, (inputs, grad) in enumerate(zip(saved, grads, strict=True)):
            self.accumulate_one(place, inputs, grad)

    def accumulate_one(self, place: int, inputs: tuple[Tensor, ...], grad: Tensor) -> None:
        """Add the gradient of matrix number `place`."""
        raise NotImplementedError


class SplitLinear(Split, nn.Linear):
    """A linear layer with one tap."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_tapped:
            return self.note(F.linear(x, self.weight, self.bias))
        x = x.to(compute_dtype(x))
        tap = self.tap(0, (x,), (*x.shape[:-1], self.out_features))
        return TappedLinear.apply(x, self.weight, self.bias, tap)

    def accumulate_one(self, place: int, inputs: tuple[Tensor, ...], grad: Tensor) -> None:
        (x,) = inputs
        add_gradient(self.weight, grad.flatten(0, -2).mT @ x.flatten(0, -2))


class SplitExperts(Split, Experts):
    """Experts with a tap for each of their three stacks."""

    names = ("gate_proj", "up_proj", "down_proj")

    def project(self, name: str, x_P: Tensor, counts_E: Tensor) -> Tensor:
        if not self.is_tapped:
            return self.note(super().project(name, x_P, counts_E))
        weight_EOI = getattr(self, name)
        tap_PO = self.tap(self.names.index(name), (x_P, counts_E), (x_P.size(0), weight_EOI.size(1)))
        return TappedGrouped.apply(x_P, weight_EOI, counts_E, tap_PO)

    def accumulate_one(self, place: int, inputs: tuple[Tensor, ...], grad: Tensor) -> None:
        x_PI, counts_E = inputs
        parameter = self._parameters[self.names[place]]
        assert parameter is not None
        add_gradient(parameter, grouped_outer(grad, x_PI, counts_E))


class SplitLocalExperts(SplitExperts, local_class(Experts)):  # type: ignore[misc]
    """The same of experts that are divided over ranks."""


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to `.grad` as autograd does; of a parameter that is cut over ranks, the gradient of this rank's piece."""
    gradient = gradient.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        gradient = DTensor.from_local(gradient, parameter.device_mesh, parameter.placements, run_check=False)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def split_layers(module: nn.Module, cut_experts: bool = False) -> list[Split]:
    """Give the trainable linear layers and experts in `module` taps, in place; names and parameters stay. Returns them.

    cut_experts: those too that are divided over ranks. What comes to these is of another size in each microbatch, so
    their taps cannot be made beforehand: for passes with a notebook.
    Layers of other kinds (quantized, low rank) keep their whole backward in the first part.
    """
    found: list[Split] = []
    for child in module.modules():
        if type(child) is nn.Linear and child.weight.requires_grad:
            child.__class__ = SplitLinear
        elif type(child) is Experts and all(parameter.requires_grad for parameter in child.parameters()):
            child.__class__ = SplitExperts
        elif cut_experts and type(child) is local_class(Experts) and all(p.requires_grad for p in child.parameters()):
            child.__class__ = SplitLocalExperts
        if isinstance(child, Split):
            child.reset()
            found.append(child)
    return found
