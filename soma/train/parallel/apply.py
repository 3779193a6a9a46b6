"""One function applies a layout to a model, from outside, in a fixed order; the model stays plain.

Order: tensor, expert, context, activation checkpointing, compile, data (replicas or shards): as in torchtitan
(arXiv:2410.06511, section 2). Each later one wraps what the earlier ones made.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from soma.data.loader import IGNORE, PADDING, Batch, PreferenceBatch
from soma.model.moe import Experts, MoE
from soma.model.transformer import Transformer
from soma.train.compute import Compute
from soma.train.config import TrainConfig
from soma.train.loss import cross_entropy_sum, target_logprobs
from soma.train.optim import build_optimizers
from soma.train.parallel.context import apply_context, columns_of
from soma.train.parallel.expert import apply_experts
from soma.train.parallel.local import gather_sequence, scale_gradient, shard_offset, sum_both_ways
from soma.train.parallel.mesh import Mesh
from soma.train.parallel.norm import clip_gradients
from soma.train.parallel.offload import Sums
from soma.train.parallel.reduce import Reducer, settle_partial
from soma.train.parallel.shard import apply_shards, begin_microbatch
from soma.train.parallel.tensor import apply_tensor
from soma.train.parallel.zero import SharedUpdates, keeps_whole
from soma.train.recompute import needs_measure, recompute_layers


class Parallel:
    """A model that a layout has been applied to: what the training loop has to do with it beside calling it."""

    def __init__(self, model: Transformer, mesh: Mesh, reducers: Sequence[Reducer] = (),
                 shared: SharedUpdates | None = None) -> None:  # fmt: skip
        self.model, self.mesh, self.reducers, self.shared = model, mesh, reducers, shared
        self.sums = Sums(list(model.parameters())) if mesh.layout.cpu_offload else None

    def begin(self, last: bool) -> None:
        """Before each microbatch's forward pass; `last` of the step: gradients are summed with its backward pass."""
        if self.shared is not None:
            self.shared.begin(last)
        elif self.mesh.shards is not None:
            begin_microbatch(self.model, self.mesh.layout.zero, last)
        if self.sums is not None:
            self.sums.take()
        for reducer in self.reducers:
            reducer.last = last

    def finish(self) -> None:
        """After the last backward pass of a step: every gradient is then the sum over all ranks."""
        if self.sums is not None:
            self.sums.give()
        if self.shared is not None:
            self.shared.finish()
        for reducer in self.reducers:
            reducer.finish()
        settle_partial(list(self.model.parameters()))

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Clip the global norm; returns it as it was before."""
        if self.mesh.size == 1 and self.mesh.shards is None:
            return nn.utils.clip_grad_norm_(parameters, limit)
        return clip_gradients(parameters, limit, self.mesh.group("pp"))

    def optimizers(self, config: TrainConfig, compute: Compute) -> list[torch.optim.Optimizer]:
        """What updates the model's trained parameters."""
        settings = (config, compute.muon_dtype, compute.compile, compute.device)
        if self.shared is None:
            return build_optimizers(self.model, *settings)
        optimizers = build_optimizers(self.model, *settings, self.shared.piece)
        self.shared.follow(optimizers)
        return optimizers

    def loading(self) -> AbstractContextManager[None]:
        """Around what reads a checkpoint into the model and its optimizers."""
        return nullcontext()

    def share(self, tensor: Tensor | None, name: str, like: Tensor) -> Tensor:
        """The tensor `name`, of the shape of `like`, on a rank that may not have it: here every rank has a piece."""
        assert tensor is not None, name
        return tensor

    def count_parameters(self) -> int:
        """Of the whole model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def own(self, batch: Any) -> Any:
        """This rank's part of its data rank's batch: with context parallelism, its columns. Sequences that cp or sp
        could not cut evenly are padded."""
        layout = self.mesh.layout
        if layout.column_unit == 1:
            return batch
        if isinstance(batch, PreferenceBatch):
            return PreferenceBatch(self.own(batch.chosen), self.own(batch.rejected), batch.is_pair)
        batch = padded(batch, layout.column_unit)
        if layout.cp == 1:
            return batch
        columns = columns_of(batch.tokens.shape[1], layout.cp, self.mesh.place["cp"])
        return batch.map(lambda array: array[:, columns])

    def cross_entropy_sum(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """`soma.train.loss.cross_entropy_sum`, of scores that may be cut over the vocabulary."""
        group = self.mesh.group("tp")
        if group is None:
            return cross_entropy_sum(logits_NV, targets_N)
        from soma.train.parallel.vocabulary import cross_entropy

        return cross_entropy(logits_NV, targets_N, self.first_word(group), group).sum()

    def target_logprobs(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """`soma.train.loss.target_logprobs`, of scores that may be cut over the vocabulary."""
        group = self.mesh.group("tp")
        if group is None:
            return target_logprobs(logits_NV, targets_N)
        from soma.train.parallel.vocabulary import cross_entropy

        return -cross_entropy(logits_NV, targets_N, self.first_word(group), group)

    def across(self, logprobs_B: Tensor) -> Tensor:
        """Of whole sequences, from those of the parts of them that context parallelism gives this rank.

        Every rank then has the whole loss, which the trainer sums and divides by as many times the pairs; so gradients
        are summed as well.
        """
        group = self.mesh.group("cp")
        return logprobs_B if group is None else sum_both_ways(logprobs_B, group)

    @torch.no_grad()
    def scores_at(self, tokens_BT: Tensor, positions_BT: Tensor, places: Sequence[int]) -> Tensor:
        """Scores of the whole vocabulary, (B, V), after one token of each row; every rank is given whole rows, and gets
        all scores."""
        own_tokens_BT, own_positions_BT = self.columns(tokens_BT), self.columns(positions_BT)
        x_BTD, _ = self.model.features(own_tokens_BT, own_positions_BT)
        return self.head_at(x_BTD, tokens_BT.size(1), places)

    def columns(self, tensor_BT: Tensor) -> Tensor:
        """This rank's columns of whole rows."""
        layout = self.mesh.layout
        if layout.cp == 1:
            return tensor_BT
        return tensor_BT[:, torch.from_numpy(columns_of(tensor_BT.size(1), layout.cp, self.mesh.place["cp"]))]

    def head_at(self, x_BTD: Tensor, length: int, places: Sequence[int]) -> Tensor:
        """The scores of `scores_at` from hidden states of this rank's columns of rows of `length`."""
        layout, device = self.mesh.layout, x_BTD.device
        columns = columns_of(length, layout.cp, self.mesh.place["cp"]).tolist() if layout.cp > 1 else range(length)
        index_of = {column: index for index, column in enumerate(columns)}
        index_B = torch.tensor([index_of.get(place, 0) for place in places], device=device)
        is_here_B = torch.tensor([place in index_of for place in places], device=device)
        x_BD = x_BTD[torch.arange(len(places), device=device), index_B] * is_here_B[:, None]
        if (across := self.mesh.group("cp")) is not None:
            dist.all_reduce(x_BD, group=across)
        scores_BW = self.model.logits(x_BD)
        if (group := self.mesh.group("tp")) is None:
            return scores_BW
        vocabulary = self.model.config.vocab_size
        short = -(-vocabulary // group.size()) - scores_BW.size(1)  # of the last ranks
        return gather_sequence(F.pad(scores_BW, (0, short)), group)[:, :vocabulary]

    def first_word(self, group: dist.ProcessGroup) -> int:
        """The first entry of this rank's part of the vocabulary."""
        return shard_offset(self.model.config.vocab_size, group.size(), group.rank())[0]


def padded(batch: Batch, unit: int) -> Batch:
    """The batch with columns of padding, to a multiple of `unit`."""
    short = -batch.tokens.shape[1] % unit
    if not short:
        return batch
    filling = {"tokens": 0, "targets": IGNORE, "positions": 0, "document_ids": PADDING, "stamps": 0}
    return Batch(**{
        name: np.pad(array, ((0, 0), (0, short)), constant_values=value)
        for name, value in filling.items() if (array := getattr(batch, name)) is not None
    })  # fmt: skip


def parallelize(
    model: Transformer, mesh: Mesh, *, activation_checkpointing: bool | str = False, compile_layers: bool = False,
    whole_batch: bool = False, measure: Callable[[], Any] | None = None, fill: Callable[[], None] = lambda: None,
) -> Parallel:  # fmt: skip
    """Apply a mesh's layout to a model whose weights are the same on all ranks; the model is changed in place.

    A model without memory (meta device) is given it by `fill` as late as can be: when it is cut, or, for a budget that
    has to be measured, when all but FSDP has cut it.

    `whole_batch`: there is no microbatch_size, so experts are balanced over the tokens of all ranks. `measure` runs the
    forward pass of a microbatch, for an activation checkpointing that has a budget.
    """
    if mesh.size == 1 and mesh.shards is None:  # compiled as a whole, by the objective
        fill()
        recompute_layers(model, activation_checkpointing, measure)
        return Parallel(model, mesh)
    divide(model, mesh, whole_batch)
    is_whole = mesh.shards is None or keeps_whole(mesh)
    if is_whole or needs_measure(activation_checkpointing):
        fill()
    recompute_layers(model, activation_checkpointing, measure)
    if compile_layers:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
    if not is_whole:
        apply_shards(model, mesh)
        fill()
        return Parallel(model, mesh)
    if mesh.shards is not None:
        return Parallel(model, mesh, shared=SharedUpdates(model, mesh))
    return Parallel(model, mesh, replicate(model, mesh))


def divide(model: Transformer, mesh: Mesh, whole_batch: bool) -> None:
    """The part of `parallelize` that divides the work within a layer: tensor, expert and context parallelism."""
    layout = mesh.layout
    tensor = mesh.axis("tp")
    if tensor is not None:
        apply_tensor(model, tensor, layout.sp, mesh.experts)
    if layout.ep > 1:
        apply_experts(model, mesh)
    across = mesh.group("cp")
    if across is not None:
        apply_context(model, across, layout.cp_method)
    share_balance(model, mesh, whole_batch)


def share_balance(model: Transformer, mesh: Mesh, whole_batch: bool) -> None:
    """Balance experts over a microbatch's tokens wherever they are: on the cp ranks, or (`whole_batch`) on all."""
    group = mesh.group("tokens") if whole_batch else mesh.group("cp")
    for layer in model.layers:
        if isinstance(layer.mlp, MoE) and group is not None:
            layer.mlp.share = partial(sum_both_ways, group=group)
            if mesh.layout.cp > 1:  # each cp rank has the whole loss of the microbatch, and gradients are summed
                layer.mlp.register_forward_hook(partial(divide_aux, ranks=mesh.layout.cp))


def divide_aux(module: nn.Module, args: Any, output: tuple[Tensor, Tensor | None], ranks: int) -> Any:
    """Divide the gradient of an MoE's auxiliary loss by the ranks that have the same one."""
    out_BTD, aux = output
    return out_BTD, None if aux is None else scale_gradient(aux, 1 / ranks)


def replicate(model: Transformer, mesh: Mesh) -> list[Reducer]:
    """Reducers of the gradients of replicated weights: dense ones over dp × cp, experts over those with the same."""
    apart: set[int] = set()
    reducers = []
    late = [parameter for parameter in model.parameters() if mesh.layout.pp > 1]  # they grow until the step's end
    if mesh.layout.ep > 1:
        experts = [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()]
        apart = {id(parameter) for parameter in experts}
        same = mesh.axis("edp")
        if same is not None and experts:
            reducers.append(Reducer([p for p in experts if p.requires_grad], late, same.get_group()))
    group = mesh.group("tokens")
    if group is not None:
        dense = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
        first: list[nn.Parameter] = []
        if model.lm_head is None:  # its gradient comes in pieces: it is the head too, whose loss runs piece by piece
            if model.embed_tokens is not None:  # (a pipeline rank may hold neither)
                late += model.embed_tokens.parameters()
        elif mesh.layout.pp == 1:
            first += model.lm_head.parameters()
        reducers.append(Reducer(dense, late, group, first=first))
    return reducers
