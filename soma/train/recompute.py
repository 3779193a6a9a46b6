"""Activation checkpointing: which activations are kept for the backward pass, and which are computed again.

Applied from outside by wrapping the layers' forward passes (Chen et al. 2016, arXiv:1604.06174; the selective form is
Korthikanti et al. 2022, arXiv:2205.05198). The gradients are those of the plain model: the same operations run on the
same numbers.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from soma.base.errors import UserError
from soma.model.dropout import current, stamped
from soma.model.transformer import Transformer
from soma.train.config import checkpointing_form
from soma.train.parallel.matrices import local_part

# Products are dear to compute and their results small; norms, rotations, gates and sums are the other way round.
KEPT = (
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default,
    torch.ops.aten.linear.default, torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)  # fmt: skip
Forward = Callable[..., Any]


def recompute_layers(
    model: Transformer, mode: bool | str, measure: Callable[[], Any] | None = None, microbatches: float = 1
) -> int:  # fmt: skip
    """Wrap the layers' forward passes after `mode` (see `TrainConfig`); how many of them recompute.

    The model may be a pipeline rank's part of one. `measure` runs one forward pass of a microbatch with gradients: a
    budget is held against what its layers then keep, for as many `microbatches` as are on their way at once.
    Raises UserError where recomputing all layers would still go over the budget.
    """
    kind, number = checkpointing_form(mode)
    numbers = [int(name) for name, _ in model.layers.named_children()]
    layers: list[nn.Module] = list(model.layers)
    if kind == "none":
        return 0
    if kind == "selective":
        for layer in layers:
            layer.forward = recomputing(layer.forward, selective)
        return len(layers)
    if kind == "budget":
        assert measure is not None, "a budget needs a forward pass to measure"
        chosen = within(number, kept_bytes(layers, measure), inputs_bytes(layers, measure), microbatches)
    else:
        chosen = [index for index, place in enumerate(numbers) if place % number == 0]
    for index in chosen:
        layers[index].forward = recomputing(layers[index].forward)
    return len(chosen)


def needs_measure(mode: bool | str) -> bool:
    """Whether layers must run to see which of them recompute."""
    return checkpointing_form(mode)[0] == "budget"


def recomputing(forward: Forward, context: Callable[[], Any] | None = None) -> Forward:
    """A layer's forward pass that is run again in the backward pass, about the same tokens; without gradients it is as
    before."""
    more: dict[str, Any] = {} if context is None else {"context_fn": context}

    @wraps(forward)
    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        # In a compiled pass the stamps are an input of the graph, which is there in the backward pass too.
        again = partial(forward) if torch.compiler.is_compiling() else partial(about, current.stamps, forward)
        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **more)

    return run


def about(stamps: Tensor | None, forward: Forward, *args: Any) -> Any:
    """A forward pass about the tokens with these stamps, whatever pass is under way."""
    with stamped(stamps):
        return forward(*args)


def selective() -> Any:
    """Keep the results of products and of attention, compute everything else again."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def within(budget: int, kept: Sequence[int], inputs: Sequence[int], microbatches: float = 1) -> list[int]:
    """The fewest layers, the first ones, that must recompute so that all layers keep at most `budget` bytes.

    A layer keeps `kept` bytes of each microbatch, or its `inputs` if it recomputes; while one of those is computed
    again it needs all of its own besides. Worked number: four layers of 100 bytes with inputs of 10 under a budget of
    330: two recompute (2 · 10 + 2 · 100 + 100 for the one in work = 320).
    """
    for count in range(len(kept) + 1):
        need = round(microbatches * (sum(inputs[:count]) + sum(kept[count:]))) + max(kept[:count], default=0)
        if need <= budget:
            return list(range(count))
    raise UserError(
        f"activation_checkpointing: all {len(kept)} layers recomputing keep {need:,} bytes, more than the budget "
        f"{budget:,}: lower microbatch_size or sequence_length, or raise the budget"
    )


def kept_bytes(layers: Sequence[nn.Module], measure: Callable[[], Any]) -> list[int]:
    """Bytes that each layer keeps for its backward pass, parameters not counted."""
    sizes = [0] * len(layers)
    seen: set[int] = set()
    current = -1
    parameters = {local_part(p).untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if current >= 0 and storage.data_ptr() not in parameters | seen:
            seen.add(storage.data_ptr())
            held.append(tensor)  # so that no other takes its place in memory
            sizes[current] += storage.nbytes()
        return tensor

    def enter(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal current
            current = index

        return hook

    def leave(*_: Any) -> None:
        nonlocal current
        current = -1

    held: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(enter(index)) for index, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with torch.enable_grad(), saved_tensors_hooks(count, lambda tensor: tensor):
            measure()
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


def inputs_bytes(layers: Sequence[nn.Module], measure: Callable[[], Any]) -> list[int]:
    """Bytes of the residual stream that enters each layer: what a layer that recomputes keeps."""
    sizes = [0] * len(layers)

    def record(index: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            sizes[index] = args[0].nbytes

        return hook

    hooks = [layer.register_forward_pre_hook(record(index)) for index, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            measure()
    finally:
        for hook in hooks:
            hook.remove()
    return sizes
