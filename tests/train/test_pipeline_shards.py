"""Pipelines whose stages are sharded: what the plan says, that it is done so, and what is left of a budget."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from soma.model.transformer import Transformer
from soma.train.compute import Compute
from soma.train.config import TrainConfig
from soma.train.parallel.config import Layout
from soma.train.parallel.pipeline import execute as executor
from soma.train.parallel.pipeline.lower import one_by_one
from soma.train.parallel.pipeline.schedule import Action, ShardAction
from soma.train.parallel.pipeline.schedules import SCHEDULES
from soma.train.parallel.pipeline.sharding import add_shards
from soma.train.parallel.pipeline.training import stage_model
from soma.train.parallel.shard import StageShards
from soma.train.recompute import kept_bytes
from soma.train.world import World
from tests.train.bounds import differences
from tests.train.parity import LENGTH, ROWS, Case, Outcome, alone, make_model, make_trainer, train
from tests.train.pool import Pool


def words(name: str, rank: int, microbatches: int, zero: int) -> list[str]:
    return [str(step) for step in add_shards(SCHEDULES[name](2, microbatches), zero).steps[rank]]


def test_the_worked_example() -> None:
    assert words("1f1b", 1, 2, 2) == [
        "unshard1", "F1.0", "BW1.0", "reduce1", "F1.1", "BW1.1", "reduce1", "reshard1",
    ]  # fmt: skip
    assert words("1f1b", 1, 2, 1) == ["unshard1", "F1.0", "BW1.0", "F1.1", "BW1.1", "reduce1", "reshard1"]


@pytest.mark.parametrize("name", ["zb-v", "dualpipe", "dualpipe-v", "zb-h2"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_plan(name: str, zero: int) -> None:
    """An action finds its stage together; all are cut in the end; each gradient is reduced after it was made."""
    schedule = one_by_one(SCHEDULES[name](4, 8))
    sharded = add_shards(schedule, zero)
    for rank in range(4):
        together: set[int] = set()
        waiting: dict[int, int] = {}
        most = 0
        for action in sharded.steps[rank]:
            if isinstance(action, Action):
                assert action.stage in together
                if action.kind in ("W", "BW"):
                    waiting[action.stage] = waiting.get(action.stage, 0) + 1
                continue
            assert isinstance(action, ShardAction)
            if action.kind == "unshard":
                assert action.stage not in together
                together.add(action.stage)
                most = max(most, len(together))
            elif action.kind == "reshard":
                together.remove(action.stage)
            else:
                assert action.stage in together
                assert waiting.pop(action.stage) == (1 if zero > 1 else 8 // len(schedule.placements))
        assert not together
        assert not waiting
        assert most <= 2
        assert sharded.actions(rank) == schedule.actions(rank)


def whole_stages(rank: int, world_size: int, zero: int) -> list[tuple[int, set[int]]]:
    """Before each action: its stage, and the stages of this rank whose parameters are together."""
    seen: list[tuple[int, set[int]]] = []
    world = World.join(Layout(pp=2, fsdp=2, zero=zero, schedule="zb-v"), "cpu")
    ready = StageShards.ready

    with pytest.MonkeyPatch.context() as patch:
        execute = executor.execute

        def spying(schedule: Any, rank: int, workers: Any, *rest: Any) -> None:
            stages = {index: worker.stage for index, worker in workers.items()}
            shards = rest[-1]
            index_of = {id(shard): index for index, shard in shards.items()}

            def look(self: StageShards) -> None:
                ready(self)
                whole = {
                    index for index, stage in stages.items()
                    if not any(isinstance(parameter, DTensor) for parameter in stage.layers.parameters())
                }  # fmt: skip
                seen.append((index_of[id(self)], whole))

            patch.setattr(StageShards, "ready", look)
            execute(schedule, rank, workers, *rest)
            patch.setattr(StageShards, "ready", ready)

        patch.setattr(executor, "execute", spying)
        train(Case("dense4", microbatch=2), world)
    return seen


@pytest.mark.parametrize("zero", [2, 3])
def test_stages_are_gathered_for_their_turn(pool: Pool, zero: int) -> None:
    for seen in pool.run(whole_stages, 4, zero):
        stages = {stage for stage, _ in seen}
        assert len(stages) == 2
        assert all(stage in whole for stage, whole in seen)
        alone_ = sum(len(whole) == 1 for _, whole in seen)
        assert alone_ > len(seen) / 4 if zero == 3 else alone_ < len(seen) / 2


def without_a_reduction(rank: int, world_size: int) -> Outcome | None:
    """One of the reductions of stage 1 is left out."""
    reduce, calls = StageShards.reduce, []

    def forgetful(self: StageShards) -> None:
        calls.append(1)
        if len(calls) != 2:
            reduce(self)

    world = World.join(Layout(pp=2, fsdp=2, zero=2), "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageShards, "reduce", forgetful)
        outcome = train(Case(microbatch=2), world)
    return outcome if rank == 0 else None


def test_a_reduction_put_off_changes_nothing_and_one_left_out_is_seen(pool: Pool) -> None:
    assert differences(pool.run(without_a_reduction, 4)[0], alone(Case(microbatch=2)), "fp32") == []
    found = differences(pool.run(without_the_last, 4)[0], alone(Case(microbatch=2)), "fp32")
    assert any(text.startswith("gradient 1, layers.") for text in found)


def without_the_last(rank: int, world_size: int) -> Outcome | None:
    """Stages never reduce: what they have summed stays behind."""
    world = World.join(Layout(pp=2, fsdp=2, zero=1), "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageShards, "reduce", drop)
        outcome = train(Case(microbatch=2), world)
    return outcome if rank == 0 else None


def drop(self: StageShards) -> None:
    for module in self.modules:
        for parameter in module.parameters(recurse=True):  # type: ignore[attr-defined]
            parameter.grad = torch.zeros_like(parameter)


def recomputed(rank: int, world_size: int, budget: str) -> list[str]:
    """The layers of a pipeline rank that are computed again under a budget."""
    world = World.join(Layout(pp=2, schedule="1f1b"), "cpu")
    config = TrainConfig(
        steps=1, batch_size=ROWS, microbatch_size=2, sequence_length=LENGTH, activation_checkpointing=budget
    )
    model: Transformer = make_model(Case("dense4"), "cpu")
    parallel, _ = stage_model(model, config, world.mesh, Compute(torch.device("cpu"), "fp32", False))
    return [name for name, layer in parallel.model.layers.named_children() if hasattr(layer.forward, "__wrapped__")]


def test_a_budget_counts_the_microbatches_on_their_way(pool: Pool) -> None:
    """Rank 0 of 1F1B holds two of them, rank 1 one: the same budget makes the first recompute more."""
    kept = one_stage_keeps()
    assert pool.run(recomputed, 2, "budget:1GB") == [[], []]
    first, last = pool.run(recomputed, 2, f"budget:{1.7 * kept / 1000}KB")
    assert first
    assert last == []


def one_stage_keeps() -> int:
    """Bytes that two layers keep of a microbatch."""
    model = make_model(Case("dense4"), "cpu").train()
    return sum(kept_bytes(list(model.layers)[:2], lambda: model.features(torch.zeros(2, LENGTH, dtype=torch.long))))


def test_a_budget_trains_as_one_process(pool: Pool) -> None:
    case = Case("dense4", microbatch=2, checkpointing=f"budget:{1.7 * one_stage_keeps() / 1000}KB")
    outcome = pool.run(one_outcome, 2, {"pp": 2}, case)[0]
    assert differences(outcome, alone(Case("dense4", microbatch=2)), "fp32") == []


def one_outcome(rank: int, world_size: int, layout: dict[str, Any], case: Case) -> Outcome | None:
    outcome = train(case, World.join(Layout(**layout), "cpu"))
    return outcome if rank == 0 else None


def test_pieces_are_pieces(pool: Pool, tmp_path: Path) -> None:
    """After a step a rank has its part of its stage, and of the moments, alone."""
    for stage, (mine, whole) in enumerate(pool.run(sizes, 4, str(tmp_path))):
        assert mine <= whole / 2 + 16, stage


def sizes(rank: int, world_size: int, folder: str) -> tuple[int, int]:
    """Numbers on this rank in parameters and moments of the layers, and in all of its stage's."""
    trainer = make_trainer(Case(microbatch=2), World.join(Layout(pp=2, fsdp=2), "cpu"), Path(folder))
    trainer.train_step()
    parameters = list(trainer.model.layers.parameters())
    states = [value for p in parameters for optimizer in trainer.optimizers for value in optimizer.state[p].values()]
    tensors = [tensor for tensor in [*parameters, *states] if isinstance(tensor, DTensor)]
    return sum(t.to_local().numel() for t in tensors), sum(t.numel() for t in tensors)
