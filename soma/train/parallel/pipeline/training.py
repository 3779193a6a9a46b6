"""A training run whose model lies on the ranks of a pipeline: what the loop calls in place of one model's passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from soma.data.loader import Batch, PreferenceBatch
from soma.model.transformer import Transformer
from soma.train import loss
from soma.train.compute import Compute
from soma.train.config import PreferenceConfig, TrainConfig
from soma.train.objective import Objective, below_updates
from soma.train.parallel.apply import Parallel, divide, replicate
from soma.train.parallel.mesh import Mesh
from soma.train.parallel.pipeline.execute import PipelineStep
from soma.train.parallel.pipeline.heads import (
    Head,
    LanguageHead,
    Logprobs,
    PairHead,
    Pairs,
    ReferenceHead,
)
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.plan import layers_for, make_plan
from soma.train.parallel.pipeline.schedule import Schedule
from soma.train.parallel.pipeline.simulate import simulate
from soma.train.parallel.pipeline.whole import hidden_states
from soma.train.recompute import needs_measure, recompute_layers


def stage_model(
    model: Transformer, config: TrainConfig, mesh: Mesh, compute: Compute, fill: Callable[[], None] = lambda: None,
    reference: Transformer | None = None, fill_reference: Callable[[], None] = lambda: None,
) -> tuple["StagedParallel", Objective]:  # fmt: skip
    """Cut the model, in place, into the stages of a resolved layout with pp > 1; the loop's model and its objective.

    `fill` as in `parallelize`. For a PreferenceConfig the `reference` is cut likewise; None: it is what lies below the
    model's updates.

    Raises UserError where the schedule does not fit ranks, microbatches or layers.
    """
    plan = make_plan(mesh.layout, config.batch_size, config.microbatch_size)
    layers = layers_for(mesh.layout, plan, model.config, config.sequence_length)
    whole = Parallel(model, mesh)

    def chunk_loss(x_ND: Tensor, targets_N: Tensor) -> Tensor:
        with compute.autocast():
            logits_NV = model.logits(x_ND)
        return whole.cross_entropy_sum(logits_NV, targets_N)

    if not isinstance(config, PreferenceConfig):
        pipeline = make_pipeline(model, plan, layers, config, mesh, compute, LanguageHead(chunk_loss), fill)
        return StagedParallel(mesh, pipeline), StagedLanguageModeling(pipeline, config)
    head = PairHead(answer_logprobs(whole, compute), config.beta)
    pipeline = make_pipeline(model, plan, layers, config, mesh, compute, head, fill)
    before = ReferenceHead(answer_logprobs(whole if reference is None else Parallel(reference, mesh), compute))
    if reference is None:
        return StagedParallel(mesh, pipeline), StagedPreference(pipeline, pipeline, before, config)
    reference_pipeline = make_reference(reference, plan, layers, mesh, compute, before, fill_reference)
    return StagedParallel(mesh, pipeline), StagedPreference(pipeline, reference_pipeline, before, config)


def make_pipeline(
    model: Transformer, plan: Schedule, layers: list[list[int]], config: TrainConfig, mesh: Mesh, compute: Compute,
    head: Head, fill: Callable[[], None],
) -> PipelineStep:  # fmt: skip
    """This rank's stages of the model that is trained, with all else that the layout applies to them."""
    layout, again, group = mesh.layout, config.activation_checkpointing, mesh.group("pp")
    assert group is not None
    divide(model, mesh, whole_batch=config.microbatch_size is None and plan.microbatches == 1)
    by_stage = again is True
    by_layer = again is not False and not by_stage
    # Layers that talk to other ranks are compiled one by one, and so are those that are wrapped one by one.
    in_layers = layout.tp * layout.cp * layout.ep * layout.fsdp > 1 or by_layer
    # A matrix that is cut over tp ranks gets its gradient from autograd, and a layer that autograd computes again has
    # no taps left: a B does all there.
    pipeline = PipelineStep(
        model, plan, group, layers=layers, head=head, autocast=compute.autocast,
        compiled=compute.compile and not in_layers, split=layout.tp == 1 and not by_layer, recompute=by_stage,
        overlap=layout.tp * layout.cp == 1 and not by_layer and not compute.compile,
        sequence_ranks=layout.tp if layout.sp else 1, device=compute.device,
    )  # fmt: skip
    if layout.fsdp == 1 or needs_measure(again):
        fill()
    if by_layer:
        rows = config.batch_size // layout.data_ranks // plan.microbatches
        rows *= 2 if isinstance(config, PreferenceConfig) else 1
        length = layout.padded_length(config.sequence_length) // layout.cp
        tokens_BT = torch.zeros(rows, length, dtype=torch.long, device=compute.device)
        recompute_layers(model, again, partial(pipeline.try_out, tokens_BT), simulate(plan).peaks[pipeline.rank])
    if in_layers and compute.compile:
        for stage in pipeline.stages:
            for layer in stage.layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)
    if layout.fsdp > 1:
        pipeline.shard(mesh)
        fill()
    return pipeline


def make_reference(
    model: Transformer, plan: Schedule, layers: list[list[int]], mesh: Mesh, compute: Compute, head: Head,
    fill: Callable[[], None],
) -> PipelineStep:  # fmt: skip
    """The same of a frozen model, of which only `evaluate` is wanted."""
    group = mesh.group("pp")
    divide(model.eval().requires_grad_(False), mesh, whole_batch=False)
    pipeline = PipelineStep(
        model, plan, group, layers=layers, head=head, autocast=compute.autocast, split=False, trains=False,
        sequence_ranks=mesh.layout.tp if mesh.layout.sp else 1, device=compute.device,
    )  # fmt: skip
    if mesh.layout.fsdp > 1:
        pipeline.shard(mesh)
    fill()
    return pipeline


def answer_logprobs(whole: Parallel, compute: Compute) -> Logprobs:
    """From hidden states to log p of whole answers, of scores and sequences that may be cut."""

    def chunk_logprobs(x_ND: Tensor, targets_N: Tensor) -> Tensor:
        with compute.autocast():
            logits_NV = whole.model.logits(x_ND)
        return whole.target_logprobs(logits_NV, targets_N)

    def logprobs(y_BTD: Tensor, microbatch: Microbatch) -> Tensor:
        found = loss.answer_logprobs(y_BTD, microbatch.targets, microbatch.rows, chunk_logprobs, microbatch.stamps)
        return whole.across(found)

    return logprobs


class StagedParallel(Parallel):
    """This rank's part of the model, and its replicas' if there is dp as well."""

    def __init__(self, mesh: Mesh, pipeline: PipelineStep) -> None:
        reducers = replicate(pipeline.model, mesh) if mesh.layout.fsdp == 1 else []
        super().__init__(pipeline.model, mesh, reducers)
        self.pipeline = pipeline

    def begin(self, last: bool) -> None:
        """Nothing: a pipeline's step is one piece."""

    def finish(self) -> None:
        super().finish()
        self.pipeline.sum_loads()

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        return self.pipeline.clip(limit)

    @torch.no_grad()
    def share(self, tensor: Tensor | None, name: str, like: Tensor) -> Tensor:
        """A tensor of any stage, on every rank of the pipeline, in float32."""
        first = self.pipeline.replicas.holders(name)[0]
        assert tensor is not None or self.pipeline.rank != first, name
        device = self.pipeline.device
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        whole = torch.empty(like.shape, device=device) if tensor is None else tensor.to(device, torch.float32)
        dist.broadcast(whole, group=self.pipeline.group, group_src=first)
        return whole

    @torch.no_grad()
    def scores_at(self, tokens_BT: Tensor, positions_BT: Tensor, places: Sequence[int]) -> Tensor:
        pipeline = self.pipeline
        x_BTD = hidden_states(pipeline, self.columns(tokens_BT), self.columns(positions_BT))
        if x_BTD is None:
            shape = (len(places), self.model.config.vocab_size)
            scores_BV = torch.empty(shape, dtype=pipeline.dtype, device=pipeline.device)
        else:
            scores_BV = self.head_at(x_BTD, tokens_BT.size(1), places).contiguous()
        if pipeline.shards is not None:
            pipeline.shards.finish(reduce=False)
        dist.broadcast(scores_BV, group=pipeline.group, group_src=pipeline.schedule.placements[0][-1])
        return scores_BV

    def count_parameters(self) -> int:
        """Of the whole model, each once."""
        replicas = self.pipeline.replicas
        own = sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters()
            if replicas.holders(name)[0] == replicas.rank
        )
        total = torch.tensor(own, device=self.pipeline.device)
        dist.all_reduce(total, group=self.pipeline.group)
        return int(total)


class StagedLanguageModeling:
    """Next-token prediction through a pipeline: a batch is one part, which the schedule takes apart."""

    def __init__(self, pipeline: PipelineStep, config: TrainConfig) -> None:
        self.pipeline, self.isolate = pipeline, config.isolate_documents

    def count(self, batch: Batch) -> int:
        return int((batch.targets != loss.IGNORE).sum())

    def parts(self, batch: Batch, size: int) -> Iterator[tuple[Batch, int]]:
        yield batch, size

    def backward(self, part: tuple[Batch, int], scale: Tensor, aux_scale: Tensor) -> Tensor:
        microbatches = self.microbatches(part[0])
        # The loop's aux_scale is for `size` sequences at a time.
        share = len(part[0].tokens) / len(microbatches) / part[1]
        return self.pipeline.step(microbatches, scale, aux_scale * share)

    def loss(self, part: tuple[Batch, int]) -> Tensor:
        return self.pipeline.evaluate(self.microbatches(part[0]))

    def microbatches(self, batch: Batch) -> list[Microbatch]:
        pieces, device = cut_rows(len(batch.tokens), self.pipeline), self.pipeline.device
        return [Microbatch.of(batch, rows, device, self.isolate) for rows in pieces]


class StagedPreference:
    """DPO through a pipeline: both answers of a pair are in one microbatch. The reference model lies on the same stages
    (or is the pipeline itself, below its updates) and goes first, forward alone; the log-probabilities stay where the
    last stage is."""

    def __init__(
        self, pipeline: PipelineStep, reference: PipelineStep, head: ReferenceHead, config: PreferenceConfig
    ) -> None:
        self.pipeline, self.reference, self.head, self.isolate = pipeline, reference, head, config.isolate_documents

    def count(self, batch: PreferenceBatch) -> int:
        return int(batch.is_pair.sum())

    def parts(self, batch: PreferenceBatch, size: int) -> Iterator[tuple[PreferenceBatch, int]]:
        yield batch, size

    def backward(self, part: tuple[PreferenceBatch, int], scale: Tensor, aux_scale: Tensor) -> Tensor:
        microbatches = self.microbatches(part[0])
        share = len(part[0].is_pair) / len(microbatches) / part[1]
        return self.pipeline.step(microbatches, scale, aux_scale * share)

    def loss(self, part: tuple[PreferenceBatch, int]) -> Tensor:
        return self.pipeline.evaluate(self.microbatches(part[0]))

    def microbatches(self, batch: PreferenceBatch) -> list[Pairs]:
        """Of pairs, with what the reference says of them."""
        pieces, device = cut_rows(len(batch.is_pair), self.pipeline), self.pipeline.device
        microbatches = [Pairs.of_pairs(batch, rows, device, self.isolate) for rows in pieces]
        with below_updates(self.pipeline.model) if self.reference is self.pipeline else nullcontext():
            self.reference.evaluate(microbatches, self.head)
        return self.head.take(microbatches)


def cut_rows(rows: int, pipeline: PipelineStep) -> list[slice]:
    """The rows of each microbatch of a batch."""
    size = rows // pipeline.schedule.microbatches
    return [slice(i * size, (i + 1) * size) for i in range(pipeline.schedule.microbatches)]
