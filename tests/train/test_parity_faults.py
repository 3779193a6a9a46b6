"""Negative controls of the parity grid: what is wrong under a layout is seen, in fp32 and in bf16.

For every kind of layout one sum or one update is left out, a rank's loss counts too much, or two microbatches are
swapped. A fault is a function that plants it on a rank, by a patch that lasts for one case.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from soma.data.loader import Batch
from soma.model import lora
from soma.model.dropout import dropped
from soma.model.transformer import Transformer
from soma.train import loop, optim
from soma.train.objective import LanguageModeling
from soma.train.parallel import context, expert, local, norm, reduce, tensor
from soma.train.parallel.apply import Parallel
from soma.train.parallel.config import Layout
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.replicas import Replicas
from soma.train.parallel.pipeline.stage import StageWorker
from soma.train.parallel.pipeline.training import StagedLanguageModeling
from soma.train.parallel.pipeline.transport import Transport
from soma.train.scaler import LossScaler
from soma.train.stamps import stamp
from soma.train.world import World
from tests.train import parity
from tests.train.bounds import differences
from tests.train.grid import GRID, RANKS, Sizes, depth
from tests.train.parity import Case, Job, Outcome, jobs, train
from tests.train.pool import Pool

Fault = Callable[[pytest.MonkeyPatch, World], None]


def spoil(patch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Callable[..., Any], call: int = 0) -> None:
    """Let one call of a function, counted from 0, be `wrong(function, *arguments)`."""
    right, calls = getattr(owner, name), [0]

    def run(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        return wrong(right, *args, **more) if calls[0] == call + 1 else right(*args, **more)

    patch.setattr(owner, name, run)


def bucket(patch: pytest.MonkeyPatch, world: World) -> None:
    """dp: rank 0 takes its own gradients of one bucket for the sum."""

    def forgetful(finish: Callable[..., None], self: reduce.Reducer) -> None:
        kept = [grad.clone() for grad in map(reduce.local_gradient, self.buckets[0])]
        finish(self)
        for parameter, grad in zip(self.buckets[0], kept, strict=True):
            reduce.local_gradient(parameter).copy_(grad)

    if world.rank == 0:
        spoil(patch, reduce.Reducer, "finish", forgetful)


def shard(patch: pytest.MonkeyPatch, world: World) -> None:
    """fsdp, also of a stage of a pipeline: what rank 1 adds to one reduction is lost."""

    def lost(scatter: Callable[..., Any], *args: Any, **more: Any) -> Any:
        (more["input"] if "input" in more else args[1]).zero_()
        return scatter(*args, **more)

    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    if world.rank == 1:
        spoil(patch, dist, name, lost)


def replicas(patch: pytest.MonkeyPatch, world: World) -> None:
    """dp × fsdp: what rank 0 adds to the sums over replicas of shards is lost."""
    right, group = dist.all_reduce, world.mesh.group("dp")

    def lost(x: Tensor, *args: Any, **more: Any) -> Any:
        if more.get("group") is group and world.rank == 0:
            x.zero_()
        return right(x, *args, **more)

    patch.setattr(dist, "all_reduce", lost)


def sum_(patch: pytest.MonkeyPatch, world: World) -> None:
    """tp: every rank takes its part of one sum for the whole."""
    spoil(patch, local, "summed", lambda right, x, group: x.clone())


def scatter(patch: pytest.MonkeyPatch, world: World) -> None:
    """sp: a reduce-scatter scatters and does not reduce."""
    spoil(patch, local, "scatter_sequence", own_part)


def gather(patch: pytest.MonkeyPatch, world: World) -> None:
    """cp by all-gather: gradients of keys and values of one layer are not summed."""
    spoil(patch, context, "scatter_sequence", own_part)


def own_part(right: Callable[..., Tensor], x_BTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x_BTD.tensor_split(group.size(), dim=1)[group.rank()].contiguous()


def ring(patch: pytest.MonkeyPatch, world: World) -> None:
    """cp: what one step of the ring brought is not taken up."""

    def stay(right: Callable[..., context.Shift], x: Tensor, *args: Any, **more: Any) -> context.Shift:
        came = right(x, *args, **more)
        came.wait()
        return context.Shift(x, [], came.before)

    spoil(patch, context, "shift", stay)


def combine(patch: pytest.MonkeyPatch, world: World) -> None:
    """ep: on rank 1 the outputs of one layer's experts come back one place too late, so sums are of wrong experts."""

    def turned(right: Callable[..., Tensor], *args: Any) -> Tensor:
        return right(*args).roll(1, 0)

    if world.rank == 1:
        spoil(patch, expert, "travel", turned, call=1)


def copies(patch: pytest.MonkeyPatch, world: World) -> None:
    """pp: what lies on two stages (a tied embedding, DualPipe's copies) is not summed over them."""
    patch.setattr(Replicas, "sum_gradients", lambda self: None)


def send(patch: pytest.MonkeyPatch, world: World) -> None:
    """pp: one activation arrives as zeros."""

    def empty(right: Callable[..., None], self: Transport, message: Any, reader: int, value: Tensor) -> None:
        right(self, message, reader, torch.zeros_like(value))

    if world.rank == 0:
        spoil(patch, Transport, "send", empty)


def pieces(patch: pytest.MonkeyPatch, world: World) -> None:
    """The norm is that of a rank's own pieces."""
    patch.setattr(norm, "cut_axes", lambda gradient: ())


def update(patch: pytest.MonkeyPatch, world: World) -> None:
    """LoRA under tp: each rank keeps its own part of A's gradient for the whole."""
    right = tensor.cut

    def wrong(module: Any, name: str, mesh: Any, how: Any, partial: bool = False, view: Any = None) -> None:
        right(module, name, mesh, how, partial and name != "lora_A", view)

    patch.setattr(tensor, "cut", wrong)


def inputs(patch: pytest.MonkeyPatch, world: World) -> None:
    """tp: a rank that has some of a layer's inputs drops those of the first rank."""
    patch.setattr(lora, "dropped", lambda shape, salt, first, share: dropped(shape, salt, 0, share))


def rows(patch: pytest.MonkeyPatch, world: World) -> None:
    """dp: every rank counts its rows from 0."""
    patch.setattr(loop, "stamp", lambda batch, seed, step, data_rank: stamp(batch, seed, step, 0))


def columns(patch: pytest.MonkeyPatch, world: World) -> None:
    """cp: a rank's columns are named as if they were the first."""
    right = Parallel.own

    def own(self: Parallel, batch: Batch) -> Batch:
        part = right(self, batch)
        return part if batch.stamps is None else replace(part, stamps=batch.stamps[:, : part.tokens.shape[1]])

    patch.setattr(Parallel, "own", own)


def microbatches(patch: pytest.MonkeyPatch, world: World) -> None:
    """pp: a stage that runs takes every microbatch for the first."""
    right = StageWorker.run

    def run(self: StageWorker, microbatch: Microbatch, *args: Any) -> Any:
        return right(self, replace(microbatch, stamps=self.microbatches[0].stamps), *args)

    patch.setattr(StageWorker, "run", run)


def drawn(patch: pytest.MonkeyPatch, world: World) -> None:
    """Masks come from a generator with a state, the same on all ranks."""
    patch.setattr(lora, "dropped", lambda shape, salt, first, share: torch.rand(shape) < share)


def answers(patch: pytest.MonkeyPatch, world: World) -> None:
    """cp: each rank takes its piece of an answer for the whole."""
    patch.setattr(Parallel, "across", lambda self, logprobs_B: logprobs_B)


def stale(patch: pytest.MonkeyPatch, world: World) -> None:
    """The last rank's weights stay as they were: it drifts away from those that have the same."""
    if world.rank == world.size - 1:
        patch.setattr(LossScaler, "step", lambda self, optimizers: None)


def unknown(patch: pytest.MonkeyPatch, world: World) -> None:
    """No optimizer knows the last norm."""
    right = optim.split_parameters

    def short(model: Transformer) -> dict[str, list[nn.Parameter]]:
        split, last = right(model), dict(model.named_parameters()).get("norm.weight")
        return split | {"plain": [parameter for parameter in split["plain"] if parameter is not last]}

    patch.setattr(optim, "split_parameters", short)


def loss(patch: pytest.MonkeyPatch, world: World) -> None:
    """The loss of the first and the last rank (in a pipeline one of them has it) counts a quarter too much."""

    def louder(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda self, part, scale, aux_scale: right(self, part, scale * 1.25, aux_scale)

    if world.rank in (0, world.size - 1):
        for kind in (LanguageModeling, StagedLanguageModeling):
            patch.setattr(kind, "backward", louder(kind.backward))


def targets(patch: pytest.MonkeyPatch, world: World) -> None:
    """Two microbatches have each other's targets."""
    right = parity.make_batch

    def swapped(step: int) -> Batch:
        batch = right(step)
        targets = batch.targets.copy()
        targets[:4], targets[4:8] = batch.targets[4:8], batch.targets[:4]
        return Batch(batch.tokens, targets, batch.positions, batch.document_ids)

    patch.setattr(parity, "make_batch", swapped)


def order(patch: pytest.MonkeyPatch, world: World) -> None:
    """The last rank takes its microbatches in another order than those who have the same rows."""

    def turned(right: Callable[..., Batch], self: parity.Rows) -> Batch:
        batch = right(self)
        half = len(batch.tokens) // 2
        parts = (batch.tokens, batch.targets, batch.positions, batch.document_ids)
        return Batch(*(part.take([*range(half, 2 * half), *range(half)], axis=0) for part in parts))

    if world.rank == world.size - 1:
        spoil(patch, parity.Rows, "__next__", turned)


SUMS: list[tuple[Fault, str, str]] = [  # fault, layout, model
    (bucket, "dp4", "dense"), (shard, "fsdp4", "dense"), (sum_, "tp4", "moe"), (scatter, "fsdp2-tp2-sp", "dense"),
    (ring, "cp4", "dense"), (gather, "cp4-all_gather", "moe"), (combine, "dp4-ep4", "moe"),
    (copies, "pp2-1f1b-dp2", "dense"), (send, "pp2-zb-v-cp2", "moe"), (shard, "pp2-1f1b-fsdp2-zero1", "dense"),
    (pieces, "fsdp4", "dense"), (stale, "dp4", "dense"), (unknown, "fsdp4", "dense"),
]  # fmt: skip
MORE_SUMS: list[tuple[Fault, str, str]] = [
    (bucket, "dp4", "moe"), (replicas, "dp2-fsdp2", "dense"), (sum_, "tp4", "dense"), (ring, "cp4", "moe"),
    (copies, "pp2-dualpipe-tp2", "dense"), (copies, "pp2-dualpipe-fsdp2", "moe"), (pieces, "tp4", "dense"),
    (stale, "tp4", "dense"), (stale, "pp2-1f1b-dp2", "dense"), (stale, "pp2-dualpipe-fsdp2", "moe"),
    (unknown, "pp2-zb-v-cp2", "moe"),
]  # fmt: skip
KINDS = ["fsdp4", "fsdp4-zero1", "tp4", "fsdp2-tp2-sp", "cp4", "cp4-all_gather", "dp4-ep4", "pp2-1f1b-dp2",
         "pp2-dualpipe-fsdp2", "pp2-zb-v-cp2", "pp2-interleaved-tp2"]  # fmt: skip
SHARED = [name for name in KINDS if not {"dp", "fsdp"} & GRID[name].keys()]  # all ranks have the same rows


@cache
def alone(case: Case) -> Outcome:
    """One step of one process."""
    return train(case, World(), steps=1)


def on_rank(rank: int, world_size: int, sizes: Sizes, jobs: list[Job], fault: Fault) -> list[Outcome] | None:
    """The outcomes of a step with a fault; rank 0 answers."""
    world = World.join(Layout(**sizes), "cpu")
    outcomes = []
    for case, choices in jobs:
        with pytest.MonkeyPatch.context() as patch:
            fault(patch, world)
            outcomes.append(train(case, world, choices, steps=1))
    return outcomes if rank == 0 else None


def seen(pool: Pool, fault: Fault, name: str, **more: Any) -> list[list[str]]:
    """What is out of bounds in fp32 and in bf16."""
    sizes = GRID[name]
    few = 2 if "pp" in sizes else None
    model = more.pop("model", "moe" if "ep" in sizes else "dense") + depth(sizes)
    cases = [Case(model, precision, few, **more) for precision in ("fp32", "bf16")]
    outcomes = pool.run(on_rank, RANKS, sizes, jobs(cases, alone), fault)[0]
    found = [differences(ours, alone(case), case.precision) for case, ours in zip(cases, outcomes, strict=True)]
    shows = {pieces: "norm of step 1", stale: " on several ranks", unknown: "update, norm.weight"}
    return [[text for text in texts if shows.get(fault, "gradient 1") in text] for texts in found]


def label(value: Any) -> str:
    return value if isinstance(value, str) else value.__name__.strip("_")


@pytest.mark.parametrize(
    ("fault", "name", "model"),
    [*SUMS, *(pytest.param(*values, marks=pytest.mark.parallel) for values in MORE_SUMS)],
    ids=label,
)
def test_a_sum_that_is_left_out_is_seen(pool: Pool, fault: Fault, name: str, model: str) -> None:
    assert all(seen(pool, fault, name, model=model))


@pytest.mark.parametrize("fault", [loss, targets], ids=label)
def test_a_fault_is_seen_with_replicas(pool: Pool, fault: Fault) -> None:
    assert all(seen(pool, fault, "dp4"))


@pytest.mark.parallel
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fault", [loss, targets], ids=label)
def test_a_fault_is_seen_under_every_kind_of_layout(pool: Pool, fault: Fault, name: str) -> None:
    assert all(seen(pool, fault, name))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.parallel] * (name != "tp4")) for name in SHARED]
)
def test_microbatches_in_another_order_are_seen(pool: Pool, name: str) -> None:
    assert all(seen(pool, order, name))


def test_an_update_that_is_not_summed_is_seen(pool: Pool) -> None:
    for found in seen(pool, update, "tp4", lora="full"):
        assert any("q_proj.lora_A" in text for text in found)
        assert not any("o_proj.lora_A" in text for text in found)


@pytest.mark.parametrize(
    ("fault", "name"),
    [(inputs, "tp4"), (rows, "dp4"), (columns, "cp4"), (microbatches, "pp2-1f1b-dp2"),
     pytest.param(drawn, "fsdp4", marks=pytest.mark.parallel)],
    ids=label,
)  # fmt: skip
def test_a_mask_of_other_tokens_or_inputs_is_seen(pool: Pool, fault: Fault, name: str) -> None:
    assert all(seen(pool, fault, name, lora="full", dropout=0.4))


def test_answers_that_are_not_joined_are_seen(pool: Pool) -> None:
    assert all(seen(pool, answers, "cp4", pairs=True))
