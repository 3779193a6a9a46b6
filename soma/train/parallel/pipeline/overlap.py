"""DualPipe's overlapped chunk: the forward of one microbatch and the backward of another, piece by piece, in turns.

(DeepSeek-V3, arXiv:2412.19437 section 3.2.1.) A stage whose experts are divided over ranks computes, dispatches,
computes, combines, … . While the tokens of one pass travel, the other pass computes:

    computation    attention F | MLP B  | MLP W  | MLP F   | attention B | attention W | attention F | …
    communication              | dispatch F      | dispatch B (back)     | combine F                 | …

Both passes are generators that stop wherever something has been queued, and `in_turns` goes from one to the other. So
there is one thread, and one order of collectives, which all ranks that share experts have in common: it depends on the
numbers of layers alone. On a GPU rows travel on a stream of their own (`exchange.py`), over Gloo in its threads.

Letters: B sequences of a microbatch, T positions, D model width, N = B·T, K experts a token, P rows that leave this
rank (N·K), Q rows that arrive.
"""

from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from soma.model.dropout import stamped
from soma.model.moe import MoE
from soma.model.transformer import Layer
from soma.train.parallel.exchange import Exchange, moment, start
from soma.train.parallel.expert import Sent, Spread, spread_of
from soma.train.parallel.pipeline.heads import Head
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.pieces import Piece, Recorder, accumulate
from soma.train.parallel.pipeline.split import Note, split_layers
from soma.train.parallel.pipeline.stage import Stage, StageWorker

R = TypeVar("R")
Pass = Generator[None, None, R]


def in_turns(forward: Pass[Tensor], backward: Pass[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Run two passes in turns; what they return."""
    results: dict[str, Any] = {}
    turns: dict[str, Pass[Any]] = {"forward": forward, "backward": backward}
    while turns:
        for name in list(turns):
            try:
                next(turns[name])
            except StopIteration as end:
                results[name] = end.value
                del turns[name]
    return results["forward"], results["backward"]


def alone(one: Pass[R]) -> R:
    """Run a pass from its beginning to its end."""
    while True:
        try:
            next(one)
        except StopIteration as end:
            return cast(R, end.value)


@dataclass
class Trip:
    """What the forward pass of one MoE layer leaves for its backward: the experts' piece, rows to and from ranks."""

    exchange: Exchange
    experts: Piece | None
    sent: list[int]
    got: list[int]


@dataclass
class Trail:
    """What a forward pass leaves: pieces, the trips to experts between them (one fewer), and its end (B, T, D)."""

    pieces: list[Piece | None]
    trips: list[Trip]
    y: Tensor


@dataclass
class Section:
    """Layers that run whole, then one whose tokens travel (None at the end of a stage)."""

    whole: list[Layer]
    layer: Layer | None


def travels(layer: nn.Module) -> bool:
    """Whether a layer has experts on other ranks."""
    return isinstance(layer, Layer) and isinstance(layer.mlp, MoE) and spread_of(layer.mlp.experts) is not None


def sections_of(stage: Stage) -> list[Section]:
    """A stage, cut at its layers with experts on other ranks."""
    sections = [Section([], None)]
    for layer in stage.layers:
        assert isinstance(layer, Layer)
        if travels(layer):
            sections[-1].layer = layer
            sections.append(Section([], None))
        else:
            sections[-1].whole.append(layer)
    return sections


class OverlapWorker(StageWorker):
    """A `StageWorker` whose passes run piece by piece.

    apart: give the layers taps, so that rows begin to travel back before the gradients of matrices are computed, and
    W can come later; experts that are divided over ranks have them too. Microbatches not in `split` have their W in
    the same pass, behind each piece.
    """

    def __init__(
        self, stage: Stage, head: Head, autocast: Callable[[], AbstractContextManager[object]], *,
        split: Collection[int], recompute: bool, apart: bool,
    ) -> None:  # fmt: skip
        super().__init__(stage, head, autocast, split=(), recompute=recompute, compiled=False)
        self.split = split
        self.recorder = Recorder()
        if apart:
            for layer in split_layers(stage.layers, cut_experts=True):
                layer.notebook = self.recorder.notebook
        self.trails: dict[int, Trail] = {}
        self.notes: dict[int, list[Note]] = {}

    def forward(self, index: int, x_BTD: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return self.evaluate(self.microbatches[index], x_BTD)
        return alone(self.forward_pass(index, x_BTD))

    def backward(self, index: int, grad_BTD: Tensor | None) -> Tensor | None:
        return alone(self.backward_pass(index, grad_BTD))

    def weight(self, index: int) -> None:
        accumulate(self.notes.pop(index, []))

    def forward_pass(self, index: int, x_BTD: Tensor | None) -> Pass[Tensor]:
        """F in pieces: what goes to the next stage."""
        if self.recompute:
            self.inputs[index] = x_BTD
            return (yield from self.walk(self.microbatches[index], x_BTD, record=False)).y
        self.trails[index] = yield from self.walk(self.microbatches[index], x_BTD, record=True)
        return self.trails[index].y

    def backward_pass(self, index: int, grad_BTD: Tensor | None) -> Pass[Tensor | None]:
        """B in pieces (and W, if it does not come later): the gradient of the stage's input."""
        microbatch = self.microbatches[index]
        if self.recompute:
            trail = yield from self.walk(microbatch, self.inputs.pop(index), record=True)
        else:
            trail = self.trails.pop(index)
        if self.stage.is_last:
            leaf_BTD = trail.y.requires_grad_()
            total, output, seed = self.head.backward(leaf_BTD, microbatch, self.scale)
            self.total += total
            torch.autograd.backward([output], [seed])
            grad_BTD = leaf_BTD.grad
        assert grad_BTD is not None
        grads, device = [grad_BTD], grad_BTD.device
        seed = self.aux_scale / self.stage.routed if self.stage.routed else self.aux_scale
        while True:
            piece = trail.pieces.pop()
            assert piece is not None
            grads = piece.backward(grads, seed)
            ready = moment(device)
            self.weights(index, piece)
            if not trail.trips:
                return grads[0] if grads else None
            yield
            residual, back_PD, weights_NK = grads
            trip = trail.trips.pop()
            arriving = start(trip.exchange, back_PD, trip.sent, trip.got, ready)
            yield
            assert trip.experts is not None
            (arrived_QD,) = trip.experts.backward([arriving.wait()], seed)
            ready = moment(device)
            self.weights(index, trip.experts)
            yield
            arriving = start(trip.exchange, arrived_QD, trip.got, trip.sent, ready)
            yield
            grads = [residual, arriving.wait(), weights_NK]

    def weights(self, index: int, piece: Piece) -> None:
        """W of a piece, now or later."""
        if index in self.split:
            self.notes.setdefault(index, []).extend(piece.notes)
        else:
            piece.weights()

    def walk(self, microbatch: Microbatch, x_BTD: Tensor | None, record: bool) -> Pass[Trail]:
        """The forward pass through the stage."""
        stage = self.stage
        front = Front(stage, microbatch, x_BTD)
        inputs = [] if x_BTD is None else [x_BTD]
        pieces: list[Piece | None] = []
        trips: list[Trip] = []
        for section in sections_of(stage):
            outputs, piece = self.record(front.compute_until(section), inputs, record)
            pieces.append(piece)
            if section.layer is None:
                break
            ready = moment(outputs[0].device)
            yield
            spread, sent = front.spread, front.sent
            assert spread is not None
            assert sent is not None
            residual_BTD, rows_PD, weights_NK = outputs
            to_R, from_R, counts_E = sent.counts.sizes()
            arriving = start(spread.exchange, rows_PD, to_R, from_R, ready)
            yield
            outputs, piece = self.record(experts_of(spread, counts_E, sent), [arriving.wait()], record)
            ready = moment(outputs[0].device)
            trips.append(Trip(spread.exchange, piece, to_R, from_R))
            yield
            arriving = start(spread.exchange, outputs[0], from_R, to_R, ready)
            yield
            inputs = [residual_BTD, arriving.wait(), weights_NK]
        return Trail(pieces, trips, outputs[0])

    def record(
        self, compute: Callable[..., tuple[list[Tensor], list[Tensor]]], inputs: list[Tensor], record: bool
    ) -> tuple[list[Tensor], Piece | None]:  # fmt: skip
        with self.autocast():
            return self.recorder.run(compute, inputs, record)


def experts_of(spread: Spread, counts_E: Tensor, sent: Sent) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    """The computation between dispatch and combine."""

    def compute(arrived_QD: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [spread.compute(arrived_QD, counts_E, sent)], []

    return compute


class Front:
    """How far a forward pass has come: computations of a stage up to the next dispatch, or to its end."""

    def __init__(self, stage: Stage, microbatch: Microbatch, x_BTD: Tensor | None) -> None:
        self.stage, self.microbatch, self.model = stage, microbatch, stage.model_of[0]
        like = self.model.embed_tokens.weight if x_BTD is None else x_BTD
        self.like = like
        self.context: Any = None
        self.spread: Spread | None = None  # of the layer whose tokens are under way, and where they went
        self.sent: Sent | None = None

    def compute_until(self, section: Section) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
        """From what comes in (nothing, the residual stream, or a layer's residual, rows that came back and weights) to
        the residual stream at the end of the stage, or to that, rows to send and weights of `section.layer`.
        """

        def compute(*inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            with stamped(self.microbatch.stamps):
                return run(*inputs)

        def run(*inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            x_BTD = self.enter(*inputs)
            losses = []
            for layer in section.whole:
                x_BTD, aux = layer(x_BTD, *self.context, None)
                losses += [] if aux is None else [aux]
            if section.layer is None:
                return [self.model.norm(x_BTD) if self.stage.is_last else x_BTD], losses
            outputs, aux = self.route(section.layer, x_BTD)
            return outputs, losses + ([] if aux is None else [aux])

        return compute

    def enter(self, *inputs: Tensor) -> Tensor:
        """The residual stream (B, T, D)."""
        microbatch = self.microbatch
        if self.context is None:
            self.context = self.model.context(
                self.like, microbatch.tokens, microbatch.positions, microbatch.document_ids
            )
        if not inputs:
            return self.model.embed(microbatch.tokens, microbatch.positions)
        if self.spread is None:
            return inputs[0]
        assert self.sent is not None
        residual_BTD, back_PD, weights_NK = inputs
        return residual_BTD + self.spread.merge(back_PD, weights_NK, self.sent).view(residual_BTD.shape)

    def route(self, layer: Layer, x_BTD: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Attention, router and shared experts of a layer: residual, rows to send, weights; and the router's loss."""
        rope, masks, keep_BT = self.context
        moe = layer.mlp
        assert isinstance(moe, MoE)
        x_BTD = layer.attend(x_BTD, rope, masks, None)
        h_BTD = layer.post_attention_layernorm(x_BTD)
        h_ND = h_BTD.flatten(0, 1)
        weights_NK, chosen_NK, aux = moe.route(h_ND, keep_BT)
        self.spread = spread_of(moe.experts)
        assert self.spread is not None
        rows_PD, self.sent = self.spread.pack(h_ND, chosen_NK)
        if moe.has_shared:
            x_BTD = x_BTD + moe.shared_experts(h_BTD)
        return [x_BTD, rows_PD, weights_NK], aux
