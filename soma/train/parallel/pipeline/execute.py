"""Runs a lowered schedule: each rank its own list of steps, over real transfers.

The executor knows nothing of models. It asks `Worker`s for forwards and backwards and a `Transport` for what comes
from other ranks. `PipelineStep` puts a `Transformer` in its hands: what a training loop calls in place of its own
forward and backward passes.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from soma.model.moe import Router
from soma.model.transformer import Transformer
from soma.train import loss
from soma.train.parallel.mesh import Mesh
from soma.train.parallel.pipeline.clock import Clock
from soma.train.parallel.pipeline.heads import Head, LanguageHead
from soma.train.parallel.pipeline.links import RecordedTransport, gather_timeline
from soma.train.parallel.pipeline.lower import forward_only, lower, one_by_one
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.overlap import OverlapWorker, in_turns, travels
from soma.train.parallel.pipeline.replicas import Replicas
from soma.train.parallel.pipeline.schedule import (
    Action,
    Compute,
    Overlap,
    Schedule,
    ShardAction,
    Transfer,
    actions_of,
    layers_of_stages,
)
from soma.train.parallel.pipeline.simulate import Timeline
from soma.train.parallel.pipeline.stage import Stage, StageWorker, cut
from soma.train.parallel.pipeline.transfers import made_by, needed_by, reader_of
from soma.train.parallel.pipeline.transport import Transport, open_channels
from soma.train.parallel.pipeline.validate import validate
from soma.train.parallel.shard import PipelineShards, StageShards


class Worker(Protocol):
    """Computes one stage. Tensors that it gives away do not change any more."""

    def forward(self, index: int, x: Tensor | None, /) -> Tensor:
        """F of microbatch `index`; x is None on the first stage."""

    def backward(self, index: int, grad: Tensor | None, /) -> Tensor | None:
        """B: from the gradient of its output (None on the last stage) that of its input (unread on the first)."""

    def weight(self, index: int, /) -> None:
        """W. After every B: at once for a BW."""


def execute(
    schedule: Schedule, rank: int, workers: Mapping[int, Worker], transport: Transport, clock: Clock,
    shards: Mapping[int, StageShards] | None = None,
) -> None:  # fmt: skip
    """Run the rank's steps of a lowered schedule, in order. `workers` (and `shards`, where the schedule has actions for
    them) are this rank's stages by their index.

    An action starts when its rank is free and what it needs has come; what it makes leaves while the next one runs.
    A pair that the schedule overlaps runs in turns (`overlap.py`): `lower.one_by_one` takes it apart for other workers.
    """
    clock.begin()  # first: it waits for the GPU, which would wait for the receives that `transport` posts
    transport.begin()
    made: dict[Action, Tensor] = {}  # on this rank: to be sent, or read here at the turn of a V
    for step in schedule.steps[rank]:
        if isinstance(step, Transfer):
            if step.kind == "receive":
                transport.open(step)
            else:
                transport.send(step.message, step.peer, made.pop(step.message))
        elif isinstance(step, ShardAction):
            assert shards is not None
            getattr(shards[step.stage], step.kind)()
        else:
            values: list[Tensor | None] = []
            for action in actions_of(step):
                need = needed_by(schedule, action)
                value = None
                if need is not None:
                    value = made.pop(need) if need in made else transport.receive(need)
                values.append(value)
                if shards is not None:
                    shards[action.stage].ready()
            clock.mark(step)
            results = compute(workers, step, values)
            clock.mark(step)
            for action, result in zip(actions_of(step), results, strict=True):
                if result is not None and reader_of(schedule, action) is not None:
                    made[made_by(action)] = result
    transport.finish()


def compute(workers: Mapping[int, Worker], step: Compute, values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A step: from what its actions read to what they put out."""
    if isinstance(step, Overlap):
        one, other = workers[step.forward.stage], workers[step.backward.stage]
        assert isinstance(one, OverlapWorker)
        assert isinstance(other, OverlapWorker)
        forward = one.forward_pass(step.forward.microbatch, values[0])
        return list(in_turns(forward, other.backward_pass(step.backward.microbatch, values[1])))
    worker, result = workers[step.stage], None
    if step.kind == "F":
        result = worker.forward(step.microbatch, values[0])
    elif step.kind in ("B", "BW"):
        result = worker.backward(step.microbatch, values[0])
    if step.kind in ("W", "BW"):
        worker.weight(step.microbatch)
    return [result]


class PipelineStep:
    """One training step of a model that lies on the ranks of `group`, stage by stage.

        pipeline = PipelineStep(model, SCHEDULES["1f1b"](ranks, microbatches), mesh["pp"].get_group())
        optimizers = build_optimizers(model, …)         # after it: `model` now holds this rank's part alone
        total = pipeline.step(microbatches, 1 / count, 1 / microbatches)
        norm = pipeline.clip(1.0)

    model: the whole `Transformer`, the same on every rank (or on the meta device: then allocate and load what is left
    of it afterwards). It is cut in place (`stage.cut`); names stay. Apply layouts (tensor, FSDP) to what is left, layer
    by layer, or to `pipeline.stages`.
    schedule: is validated here. layers: those of every stage; default as even as can be.
    group: the pipeline's ranks, one for each rank of the schedule; default: all.
    head: what the last stage makes of its hidden states; default: the model's head and cross-entropy, in `autocast`.
    split: run B and W apart where the schedule has them apart. Without it a B does both (and W nothing): for layouts
    whose gradients must come from autograd's own accumulation (tensor), and for layers that are computed again.
    overlap: run pairs that the schedule overlaps in turns, where tokens travel to experts on other ranks. It calls the
    parts of a layer itself, so layers must not be wrapped (compiled, computed again, cut over tensor or context ranks).
    recompute: a forward keeps its stage's input alone, the backward runs it again.
    dtype: of what is sent; default that of the parameters. It must be the dtype of the residual stream.
    sequence_ranks: over which the residual stream is cut along T (sequence parallelism).
    trains: False: for `evaluate` alone, without the transfers of a step.
    device: where it computes; None: where the model is, which is then no meta device.

    Raises ValueError where group and schedule have other numbers of ranks, and where the schedule is none.
    """

    def __init__(
        self, model: Transformer, schedule: Schedule, group: dist.ProcessGroup | None = None, *,
        layers: Sequence[Sequence[int]] | None = None, head: Head | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext, compiled: bool = False,
        split: bool = True, overlap: bool = True, recompute: bool = False, dtype: torch.dtype | None = None,
        sequence_ranks: int = 1, trains: bool = True, device: torch.device | None = None,
    ) -> None:  # fmt: skip
        validate(schedule)
        group = dist.group.WORLD if group is None else group
        assert group is not None
        if dist.get_world_size(group) != schedule.ranks:
            raise ValueError(
                f"schedule {schedule.name} is for {schedule.ranks} ranks, the pipeline has {dist.get_world_size(group)}"
            )
        self.model, self.schedule, self.group, self.rank = model, schedule, group, dist.get_rank(group)
        self.dtype = next(model.parameters()).dtype if dtype is None else dtype
        self.width, self.sequence_ranks = model.config.hidden_size, sequence_ranks
        layers = layers_of_stages(len(model.layers), schedule.stages) if layers is None else layers
        tied = model.lm_head is None
        has_pairs = any(isinstance(step, Overlap) for row in schedule.steps for step in row)
        self.in_turns = overlap and has_pairs and not compiled and any(travels(layer) for layer in model.layers)
        self.stages = cut(model, schedule, self.rank, layers)
        self.replicas = Replicas(model, schedule, layers, group, tied)
        halves: dict[int, set[int]] = {stage.index: set() for stage in self.stages}
        for action in schedule.actions(self.rank):
            if split and action.kind == "B":
                halves[action.stage].add(action.microbatch)

        def chunk_loss(x_ND: Tensor, targets_N: Tensor) -> Tensor:
            with autocast():
                logits_NV = model.logits(x_ND)
            return loss.cross_entropy_sum(logits_NV, targets_N)

        if head is None:
            head = LanguageHead(torch.compile(chunk_loss, dynamic=False) if compiled else chunk_loss)

        self.head = head

        def work(stage: Stage) -> StageWorker:
            own = halves[stage.index]
            if self.in_turns:
                return OverlapWorker(stage, head, autocast, split=own, recompute=recompute, apart=split)
            return StageWorker(stage, head, autocast, split=own, recompute=recompute, compiled=compiled)

        self.workers = {stage.index: work(stage) for stage in self.stages}
        self.microbatches: Sequence[Microbatch] = ()
        self.shards: PipelineShards | None = None
        self.lower(0)
        device, widest = device or self.device, self.plan if trains else self.forward_plan
        self.when_needed = device.type == "cuda"
        self.channels = open_channels(widest, group, device)  # evaluation has some of them
        self.transport = self.open_transport(self.plan) if trains else None
        self.forward_transport: Transport | None = None
        self.clock: Clock | None = None

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return next(self.model.parameters()).device

    def open_transport(self, plan: Schedule) -> Transport:
        """This rank's ends of the channels that a plan uses."""
        return Transport(plan, self.group, self.buffer, self.channels, when_needed=self.when_needed)

    def buffer(self, index: int) -> Tensor:
        """Room for what a microbatch sends from stage to stage: (B, T, D), or a part of T."""
        B, T = self.microbatches[index].tokens.shape
        return torch.empty(B, T // self.sequence_ranks, self.width, dtype=self.dtype, device=self.device)

    def step(
        self, microbatches: Sequence[Microbatch], scale: Tensor | float, aux_scale: Tensor | float
    ) -> Tensor:  # fmt: skip
        """Forward and backward of all microbatches; adds to `.grad` of this rank's parameters.

        Every rank gives the same microbatches, as many as the schedule has. The gradient is that of
        scale · (sum of cross-entropies over all targets) + aux_scale · (sum of the router's losses over microbatches):
        with scale = 1 / targets of the whole batch, unequal numbers of targets weigh as in one process. Parameters that
        lie on two ranks (a tied embedding, DualPipe's copies) have the whole gradient on both.
        Returns the sum of cross-entropies in nats, float32, the same on all ranks.
        """
        self.begin(microbatches, scale, aux_scale)
        self.clock = Clock(self.device)
        assert self.transport is not None
        self.run(self.plan, self.transport, self.clock)
        self.replicas.sum_gradients()
        return self.total()

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch], head: Head | None = None) -> Tensor:
        """The sum of cross-entropies without gradients, in whatever mode the model is; the same on all ranks. `head`:
        what the last stage makes of its hidden states this time."""
        self.begin(microbatches, 0.0, 0.0, head)
        if self.forward_transport is None:
            self.forward_transport = self.open_transport(self.forward_plan)
        self.run(self.forward_plan, self.forward_transport, Clock(self.device))
        return self.total()

    def shard(self, mesh: Mesh) -> None:
        """Cut the stages over the fsdp ranks of a layout, after all else has been applied to them."""
        layers = {stage.index: list(stage.layers) for stage in self.stages}
        self.shards = PipelineShards(self.model, mesh, layers)
        self.lower(mesh.layout.zero)
        validate(self.plan)

    def lower(self, zero: int) -> None:
        """What this schedule's ranks do, step by step, in training and in evaluation."""
        self.plan = lower(self.schedule if self.in_turns else one_by_one(self.schedule), zero)
        self.forward_plan = lower(forward_only(self.schedule), zero)

    def run(self, plan: Schedule, transport: Transport, clock: Clock) -> None:
        """Execute the whole plan or its forward part."""
        if self.shards is None:
            execute(plan, self.rank, self.workers, transport, clock)
            return
        stages = self.shards.stages
        if isinstance(transport, RecordedTransport):
            stages = transport.shards(stages)
        self.shards.begin()
        execute(plan, self.rank, self.workers, transport, clock, stages)
        self.shards.finish(reduce=torch.is_grad_enabled())

    def try_out(self, tokens_BT: Tensor) -> None:
        """A forward pass of a microbatch through this rank's stages, of zeros: to see what they keep."""
        B, T = tokens_BT.shape
        for worker in self.workers.values():
            x_BTD = torch.zeros(B, T // self.sequence_ranks, self.width, dtype=self.dtype, device=self.device)
            entering = None if worker.stage.is_first else x_BTD.requires_grad_(torch.is_grad_enabled())
            worker.run(Microbatch(tokens_BT, tokens_BT, stamps=tokens_BT), entering, [])

    def begin(
        self, microbatches: Sequence[Microbatch], scale: Tensor | float, aux_scale: Tensor | float,
        head: Head | None = None,
    ) -> None:  # fmt: skip
        """Hand the microbatches to the stages."""
        if len(microbatches) != self.schedule.microbatches:
            name, planned = self.schedule.name, self.schedule.microbatches
            raise ValueError(f"schedule {name} is for {planned} microbatches, got {len(microbatches)}")
        self.microbatches = microbatches
        for worker in self.workers.values():
            worker.microbatches, worker.head = microbatches, head or self.head
            worker.scale = torch.as_tensor(scale, dtype=torch.float32, device=self.device)
            worker.aux_scale = torch.as_tensor(aux_scale, dtype=torch.float32, device=self.device)
            worker.total = torch.zeros((), device=self.device)

    def total(self) -> Tensor:
        """The loss that the last stages have seen, on every rank."""
        total = torch.stack([worker.total for worker in self.workers.values()]).sum()
        dist.all_reduce(total, group=self.group)
        return total

    def sum_loads(self) -> None:
        """Make the tokens that each expert was sent (`Router.load`) those of the whole step, where a router has copies.

        Call it once before the counts are used, which must then start anew (`RouterBalance.step`).
        """
        loads = {
            f"{name}.load": module.load
            for name, module in self.model.named_modules()
            if isinstance(module, Router) and module.load is not None
        }
        self.replicas.sum_tensors(loads)

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients so that the norm of the whole model's is at most `limit`; the norm as it was, float32.

        A parameter that lies on two ranks counts once.
        """
        return self.replicas.clip(limit)

    def record(self) -> None:
        """From now on steps note what their links do as well, for `timeline`. All ranks call it, between two steps."""
        self.transport = RecordedTransport(
            self.plan, self.group, self.buffer, self.channels, when_needed=self.when_needed, device=self.device
        )

    def timeline(self) -> Timeline:
        """What the last step did in time, on every rank: to be drawn, or held against the simulation. With what its
        links did, if it was told to `record` before."""
        assert self.clock is not None, "no step has been taken"
        links = self.transport.links if isinstance(self.transport, RecordedTransport) else None
        return gather_timeline(self.schedule, self.clock, self.group, links)
