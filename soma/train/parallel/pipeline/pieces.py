"""A stage cut where its tokens travel: stretches of computation whose backward pass can run by itself.

A forward pass of a stage with experts on other ranks is computation, dispatch, computation, combine, computation, … .
Each stretch is recorded by autograd on its own: it begins at borders, which catch the gradient of what comes in, and
is left with the graph's edges alone, so that it keeps no more memory than one graph of the whole stage would.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from soma.train.parallel.pipeline.split import Note, Notebook


@dataclass
class Catch:
    """The gradient that reaches a border."""

    grad: Tensor | None = None

    def take(self) -> Tensor:
        assert self.grad is not None
        grad, self.grad = self.grad, None
        return grad


class _Border(torch.autograd.Function):
    """What comes in, as the start of a graph. No tensor is kept, as a leaf would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, catch: Catch) -> Tensor:
        ctx.catch = catch
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.catch.grad = grads[0]
        return None, None, None


@dataclass
class Piece:
    """A stretch of computation that has run forward: where gradients go in and where they come out.

    `notes`: products whose second part of the backward (the gradients of matrices) is to come.
    """

    edges: list[GradientEdge | None]
    losses: list[GradientEdge]
    catches: list[Catch]
    notes: list[Note]

    def backward(self, grads: Sequence[Tensor], loss_seed: Tensor) -> list[Tensor]:
        """From the gradients of the outputs those of the inputs; `loss_seed` is that of every router's loss.

        The graph is gone afterwards.
        """
        edges = [edge for edge in self.edges if edge is not None]
        seeds = [grad for edge, grad in zip(self.edges, grads, strict=True) if edge is not None]
        if edges or self.losses:
            torch.autograd.backward([*edges, *self.losses], [*seeds, *[loss_seed for _ in self.losses]])
        self.edges, self.losses = [], []
        return [catch.take() for catch in self.catches]

    def weights(self) -> None:
        """The gradients of the matrices, after `backward`."""
        accumulate(self.notes)
        self.notes = []


@torch.no_grad()
def accumulate(notes: Iterable[Note]) -> None:
    """The second part of the backward of products."""
    for note in notes:
        note.accumulate()


@dataclass
class Recorder:
    """Runs stretches of computation. `notebook` is that of the stage's split layers."""

    notebook: Notebook = field(default_factory=Notebook)
    anchor: Tensor | None = None

    def run(
        self, compute: Callable[..., tuple[list[Tensor], list[Tensor]]], inputs: Sequence[Tensor], record: bool
    ) -> tuple[list[Tensor], Piece | None]:  # fmt: skip
        """`compute(*inputs)` gives outputs and routers' losses; the outputs without a graph, and the piece if recorded.

        Nothing that torch keeps by thread (gradients on or off) outlives the call: another pass may come next.
        """
        if not record:
            with torch.no_grad():
                return compute(*inputs)[0], None
        catches = [Catch() for _ in inputs]
        notes: list[Note] = []
        self.notebook.page = notes
        try:
            with torch.enable_grad():
                if self.anchor is None:
                    self.anchor = torch.zeros((), requires_grad=True)
                outputs, losses = compute(
                    *(_Border.apply(x.detach(), self.anchor, catch) for x, catch in zip(inputs, catches, strict=True))
                )
        finally:
            self.notebook.page = None
        edges = [get_gradient_edge(out) if out.requires_grad else None for out in outputs]
        kept = [get_gradient_edge(loss) for loss in losses if loss.requires_grad]
        return [out.detach() for out in outputs], Piece(edges, kept, catches, notes)
