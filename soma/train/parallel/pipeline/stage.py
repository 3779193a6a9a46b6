"""Stages of a model: what a rank keeps of it, and how one stage computes.

Shape letters: B sequences of a microbatch, T positions, D model width, N = B·T.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from soma.model.dropout import stamped
from soma.model.transformer import Transformer
from soma.train.parallel.pipeline.heads import Head
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.schedule import Schedule, layers_of_stages
from soma.train.parallel.pipeline.split import Saved, Split, Taps, split_layers


def cut(
    model: Transformer, schedule: Schedule, rank: int, layers: Sequence[Sequence[int]] | None = None
) -> list["Stage"]:
    """Take from the model, in place, all that this rank's stages do not need; the stages, in order.

    layers: the layers of every stage of the schedule; default as even as can be. What stays keeps the name that it has
    in the whole model, so that optimizers and checkpoints need not know of the cut. Do it on the meta device and
    allocate afterwards. A tied embedding stays on the rank of the first and on that of the last stage.

    Raises ValueError where `layers` are not all layers in order, at least one a stage.
    """
    count = len(model.layers)
    layers = layers_of_stages(count, schedule.stages) if layers is None else layers
    if [layer for stage in layers for layer in stage] != list(range(count)) or not all(layers):
        raise ValueError(f"layers of stages: expected 0 to {count - 1} in order, at least one each; got {layers}")
    if len(layers) != schedule.stages:
        raise ValueError(f"layers of stages: {len(layers)} stages are given, {schedule.name} has {schedule.stages}")
    mine = schedule.stages_of(rank)
    kept = [layer for stage in mine for layer in layers[stage]]
    all_layers = model.layers
    first, last = 0 in mine, schedule.stages - 1 in mine
    model.layers = nn.ModuleList()  # with gaps: a loop over it sees the layers that are there, under their old names
    for layer in kept:
        model.layers.add_module(str(layer), all_layers[layer])
    if not (first or (last and model.lm_head is None)):
        model.embed_tokens = None  # type: ignore[assignment]
    if not first and hasattr(model, "embed_positions"):
        model.embed_positions = None  # type: ignore[assignment]
    if not last:
        model.norm = model.lm_head = None  # type: ignore[assignment]
    routed = sum(bool(layer.is_moe) for layer in all_layers)
    return [
        Stage(model, [all_layers[layer] for layer in layers[stage]], stage, stage == schedule.stages - 1, routed)
        for stage in mine
    ]


def holders(schedule: Schedule, layers: Sequence[Sequence[int]], name: str, tied: bool) -> tuple[int, ...]:
    """The ranks that have the parameter or buffer `name`, in order."""
    parts = name.split(".")
    if parts[0] == "layers":
        stages = [stage for stage, there in enumerate(layers) if int(parts[1]) in there]
    elif parts[0] == "embed_tokens":
        stages = [0, schedule.stages - 1] if tied else [0]
    elif parts[0] == "embed_positions":
        stages = [0]
    else:
        assert parts[0] in ("norm", "lm_head"), name
        stages = [schedule.stages - 1]
    return tuple(sorted({place[stage] for place in schedule.placements for stage in stages}))


class Stage(nn.Module):
    """Consecutive layers of a model that was cut; the first embeds, the last ends with the final norm.

    Shares its layers with the model, whose names are the ones that count.
    """

    def __init__(self, model: Transformer, layers: list[nn.Module], index: int, last: bool, routed: int) -> None:
        super().__init__()
        self.index, self.is_first, self.is_last, self.routed = index, index == 0, last, routed
        self.layers = nn.ModuleList(layers)
        self.model_of = [model]  # in a list: no submodule, a stage owns its layers alone

    def forward(
        self, x_BTD: Tensor | None, tokens_BT: Tensor, positions_BT: Tensor | None, document_ids_BT: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after this stage, and its layers' share of the router's loss (None: no share)."""
        model = self.model_of[0]
        if self.is_first:
            x_BTD = model.embed(tokens_BT, positions_BT)
        assert x_BTD is not None
        rope, masks, keep_BT = model.context(x_BTD, tokens_BT, positions_BT, document_ids_BT)
        losses = []
        for layer in self.layers:
            x_BTD, aux = layer(x_BTD, rope, masks, keep_BT, None)
            if aux is not None:
                losses.append(aux)
        assert x_BTD is not None
        if self.is_last:
            x_BTD = model.norm(x_BTD)
        return x_BTD, torch.stack(losses).sum() / self.routed if losses else None


@dataclass
class Held:
    """What a microbatch's forward leaves for its backward."""

    x: Tensor | None
    y: Tensor
    aux: Tensor | None
    taps: list[Taps]
    saved: list[Saved]


class StageWorker:
    """Computes the actions of one stage.

    split: the microbatches whose backward comes in two parts. recompute: a forward keeps its input alone, the backward
    runs it again. compiled: through `torch.compile`. Set `microbatches`, `scale` and `aux_scale` before a step.
    """

    def __init__(
        self, stage: Stage, head: Head, autocast: Callable[[], AbstractContextManager[object]], *,
        split: Collection[int], recompute: bool, compiled: bool,
    ) -> None:  # fmt: skip
        self.stage, self.head, self.autocast, self.recompute = stage, head, autocast, recompute
        self.split = split
        self.layers: list[Split] = split_layers(stage.layers) if split else []
        self.pass_: Callable[..., tuple[Tensor, Tensor | None, list[Saved]]] = self.whole_pass
        if compiled:
            self.pass_ = torch.compile(self.whole_pass, dynamic=False)
        self.outputs: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = {}
        self.inputs: dict[int, Tensor | None] = {}
        self.held: dict[int, Held] = {}
        self.open: dict[int, tuple[list[Saved], list[Taps]]] = {}
        self.microbatches: Sequence[Microbatch] = ()
        self.scale = self.aux_scale = self.total = torch.zeros(())

    def whole_pass(
        self, x_BTD: Tensor | None, tokens_BT: Tensor, positions_BT: Tensor | None, document_ids_BT: Tensor | None,
        taps: list[Taps],
    ) -> tuple[Tensor, Tensor | None, list[Saved]]:  # fmt: skip
        """The stage's forward under taps; what their layers saved comes out beside its result."""
        for layer, own in zip(self.layers, taps, strict=False):
            layer.taps = own
        y_BTD, aux = self.stage(x_BTD, tokens_BT, positions_BT, document_ids_BT)
        saved = [layer.saved for layer in self.layers]
        for layer in self.layers:
            layer.taps, layer.saved = None, ()
        return y_BTD, aux, saved

    def run(self, microbatch: Microbatch, x_BTD: Tensor | None, taps: list[Taps]) -> Held:
        """Forward, with a graph if gradients are on."""
        with self.autocast(), stamped(microbatch.stamps):
            y_BTD, aux, saved = self.pass_(
                x_BTD, microbatch.tokens, microbatch.positions, microbatch.document_ids, taps
            )
        return Held(x_BTD, y_BTD, aux, taps, saved)

    def forward(self, index: int, x_BTD: Tensor | None) -> Tensor:
        """F: what goes to the next stage, without a graph. The last stage's loss waits for its backward."""
        microbatch = self.microbatches[index]
        if not torch.is_grad_enabled():
            return self.evaluate(microbatch, x_BTD)
        if x_BTD is not None:
            x_BTD = x_BTD.detach().requires_grad_()
        if self.recompute:
            self.inputs[index] = x_BTD
            with torch.no_grad():
                return self.run(microbatch, x_BTD, []).y
        self.held[index] = self.run(microbatch, x_BTD, self.make_taps(index, x_BTD))
        return self.held[index].y.detach()

    def evaluate(self, microbatch: Microbatch, x_BTD: Tensor | None) -> Tensor:
        """A forward without gradients; the last stage adds its loss."""
        y_BTD = self.run(microbatch, x_BTD, []).y
        if self.stage.is_last:
            self.total += self.head.loss(y_BTD, microbatch)
        return y_BTD

    def backward(self, index: int, grad_BTD: Tensor | None) -> Tensor | None:
        """B: the gradient of the stage's input; those of the matrices too if the backward is not split."""
        microbatch = self.microbatches[index]
        if self.recompute:
            x_BTD = self.inputs.pop(index)
            held = self.run(microbatch, x_BTD, self.make_taps(index, x_BTD))
        else:
            held = self.held.pop(index)
        output = held.y
        if self.stage.is_last:
            total, output, grad_BTD = self.head.backward(held.y, microbatch, self.scale)
            self.total += total
        assert grad_BTD is not None
        outputs, seeds = [output], [grad_BTD]
        if held.aux is not None:
            outputs, seeds = [*outputs, held.aux], [*seeds, self.aux_scale.to(held.aux.dtype)]
        pairs = [pair for pair in zip(outputs, seeds, strict=True) if pair[0].requires_grad]
        if pairs:  # frozen first layers have none
            torch.autograd.backward([out for out, _ in pairs], [seed for _, seed in pairs])
        if index in self.split:
            grads = [tuple(gradient_of(tap) for tap in own) for own in held.taps]
            self.open[index] = (held.saved, grads)
        return None if held.x is None else held.x.grad

    def weight(self, index: int) -> None:
        """W: the gradients of the matrices."""
        if index in self.split:
            saved, grads = self.open.pop(index)
            with torch.no_grad():
                for layer, own, grad in zip(self.layers, saved, grads, strict=True):
                    layer.accumulate(own, grad)

    def make_taps(self, index: int, x_BTD: Tensor | None) -> list[Taps]:
        """Zeros of the shapes of the split layers' outputs, without memory; none for a backward in one part."""
        if index not in self.split:
            return []
        microbatch = self.microbatches[index]
        shape = tuple(microbatch.tokens.shape)
        if shape not in self.outputs:
            self.outputs[shape] = self.note_outputs(microbatch, x_BTD)
        zero = torch.zeros((), device=microbatch.tokens.device)
        return [
            tuple(zero.to(out.dtype).expand(out.shape).requires_grad_() for out in own) for own in self.outputs[shape]
        ]

    @torch.no_grad()
    def note_outputs(self, microbatch: Microbatch, x_BTD: Tensor | None) -> list[tuple[Tensor, ...]]:
        """What the split layers put out, from one pass (in eval mode, in which routers count nothing)."""
        mode = self.stage.training
        self.stage.eval()
        for layer in self.layers:
            layer.outputs = ()
        with self.autocast():
            self.stage(x_BTD, microbatch.tokens, microbatch.positions, microbatch.document_ids)
        outputs = [layer.outputs or () for layer in self.layers]
        for layer in self.layers:
            layer.reset()
        self.stage.train(mode)
        return outputs


def gradient_of(tap: Tensor) -> Tensor:
    assert tap.grad is not None
    return tap.grad
