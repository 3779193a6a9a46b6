"""ZeRO's stages: what a rank holds, what a step sends and when, and that each rank's rows come to all others."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from soma.train.parallel import apply
from soma.train.parallel.config import Layout
from soma.train.parallel.matrices import local_part
from soma.train.parallel.shard import parameter_groups
from soma.train.parallel.zero import HAS_SINGLE, Bucket, SharedUpdates, keeps_whole
from soma.train.world import World
from tests.train.bounds import differences
from tests.train.parity import (  # fmt: skip
    Case,
    Outcome,
    alone,
    jobs,
    make_trainer,
    on_rank,
    resume_on_rank,
    save_on_rank,
)
from tests.train.pool import Pool
from tests.train.test_topology import last_step

SMALL = 4096  # bytes of a bucket: some ten of them in the tests' models
SCATTER = "reduce_scatter_single" if HAS_SINGLE else "reduce_scatter_tensor"
GATHER = "all_gather_single" if HAS_SINGLE else "all_gather_into_tensor"


# --- Memory ---


def held(tensors: list[Tensor]) -> int:
    """Bytes of this rank's memory behind tensors."""
    storages = [local_part(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def gathered_by_fsdp(model: nn.Module) -> list[Tensor]:
    """The memory of whole parameters, which is there while they are."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in sharded for group in parameter_groups(module)]
    return [out for group in groups for each in group.fsdp_params for out in each.all_gather_outputs]


def memory_on_rank(rank: int, world_size: int, layout: dict[str, Any], folder: str) -> list[float]:
    """Bytes for each parameter of the model: of parameters after a step, of gradients between two microbatches and at
    the update, of optimizer state."""
    trainer = make_trainer(Case(microbatch=2), World.join(Layout(**layout), "cpu"), Path(folder))
    parallel, gradients = trainer.parallel, []
    begin, clip = parallel.begin, parallel.clip

    def look() -> None:
        found = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
        updates = parallel.shared
        while updates is not None and updates.running:
            updates.settle()
        found += [bucket.total for bucket in (updates.buckets if updates else ()) if bucket.total is not None]
        gradients.append(held(found))

    def beginning(last: bool) -> None:
        begin(last)
        look()

    def clipping(*args: Any) -> Tensor:
        look()
        return clip(*args)

    parallel.begin, parallel.clip = beginning, clipping  # type: ignore[method-assign]
    trainer.train_step()
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    moments = held([value for state in states for value in state.values() if value.dim()])
    parameters = held([*trainer.model.parameters(), *gathered_by_fsdp(trainer.model)])
    count = sum(parameter.numel() for parameter in trainer.twin.parameters())
    return [size / count for size in (parameters, gradients[1], gradients[-1], moments)]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"dp": 2}, [4, 4, 4, 8]),
        ({"fsdp": 2, "zero": 1}, [4, 4, 2, 4]),
        ({"fsdp": 2, "zero": 2}, [4, 2, 2, 4]),
        ({"fsdp": 2}, [2, 2, 2, 4]),
    ],
)
def test_memory_is_that_of_the_paper(
    pool: Pool, tmp_path: Path, layout: dict[str, Any], expected: list[float]
) -> None:  # fmt: skip
    """Rajbhandari et al. 2020 (arXiv:1910.02054), figure 1, in fp32 (no second copy of the weights: K is 8) on 2 ranks:
    stage 1 divides optimizer state by their number, 2 gradients as well, 3 parameters as well."""
    assert pool.run(memory_on_rank, 2, layout, str(tmp_path)) == [expected] * 2


# --- What is sent ---


def traffic_on_rank(rank: int, world_size: int, zero: int, folder: str) -> tuple[list[tuple[str, int]], int, int, int]:
    """(what, bytes) of a step's operations between ranks and its gradients as they come, in order; buckets;
    microbatches; bytes of all parameters."""
    log: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "SharedUpdates", partial(SharedUpdates, bucket_bytes=SMALL))
        trainer = make_trainer(
            Case("latent", microbatch=2), World.join(Layout(fsdp=2, zero=zero), "cpu"), Path(folder)
        )  # fmt: skip
        for name, whole in ((SCATTER, 1), (GATHER, 0), ("all_reduce", 0)):
            right = getattr(dist, name)

            def noted(*args: Any, right: Any = right, name: str = name, whole: int = whole, **more: Any) -> Any:
                log.append((name, args[whole].nbytes))
                return right(*args, **more)

            patch.setattr(dist, name, noted)
        first = trainer.model.layers[0].input_layernorm.weight
        first.register_post_accumulate_grad_hook(lambda _: log.append(("the first layer's gradient", 0)))
        trainer.train_step()
    updates = trainer.parallel.shared
    assert updates is not None
    sizes = sum(bucket.ranks * bucket.size * 4 for bucket in updates.buckets)
    return log, len(updates.buckets), 16 // 2 // 2, sizes


@pytest.mark.parametrize("zero", [1, 2])
def test_what_a_step_sends(pool: Pool, tmp_path: Path, zero: int) -> None:
    """Gradients once a step, or once a microbatch; parameters once; beside them a few numbers. Most gradients are on
    their way before the backward pass has come to the first layer, and no more than needed."""
    for log, count, microbatches, size in pool.run(traffic_on_rank, 2, zero, str(tmp_path)):
        times = 1 if zero == 1 else microbatches
        assert count > 4
        for name, often in ((SCATTER, times), (GATHER, 1)):
            sizes = [nbytes for what, nbytes in log if what == name]
            assert (len(sizes), sum(sizes)) == (often * count, often * size)
        assert all(nbytes <= 64 for what, nbytes in log if what == "all_reduce")
        ends = [place for place, (what, _) in enumerate(log) if what == "the first layer's gradient"]
        before = [what for what, _ in log[: ends[-1]]].count(SCATTER) - (times - 1) * count
        assert count / 2 < before < count


def replica_sums_on_rank(rank: int, world_size: int, zero: int, folder: str) -> tuple[int, list[int]]:
    """Sharded modules, and the bytes of each sum over the replicas of a step of 4 microbatches."""
    world, sums = World.join(Layout(dp=2, fsdp=2, zero=zero), "cpu"), []
    trainer, right = make_trainer(Case(microbatch=1), world, Path(folder)), dist.all_reduce

    def noted(x: Tensor, *args: Any, **more: Any) -> Any:
        if more.get("group") is world.mesh.group("dp"):
            sums.append(x.nbytes)
        return right(x, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noted)
        trainer.train_step()
    return sum(isinstance(module, FSDPModule) for module in trainer.model.modules()), sums


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_replicas_of_shards_sum_once_a_step(pool: Pool, tmp_path: Path, zero: int) -> None:
    for modules, sums in pool.run(replica_sums_on_rank, 4, zero, str(tmp_path)):
        assert len(sums) == modules
        assert min(sums) > 1000


# --- The answer ---

ROWS: list[tuple[int, Case]] = [  # beside those of the grid's slice
    (1, Case("odd", microbatch=2, optimizer="muon")), (2, Case("latent", microbatch=2)), (2, Case("odd", "bf16")),
    (1, Case("latent", microbatch=2, pairs=True)),  # a head of its own, in one backward pass with the rest
]  # fmt: skip


def small_on_rank(rank: int, world_size: int, rows: list[tuple[int, Any]]) -> list[Outcome | None]:
    """Outcomes with many buckets."""
    outcomes: list[Outcome | None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "SharedUpdates", partial(SharedUpdates, bucket_bytes=SMALL))
        for zero, job in rows:
            found = on_rank(rank, world_size, {"fsdp": world_size, "zero": zero}, [job])
            outcomes.append(found[0] if found else None)
    return outcomes


def test_many_buckets_and_rows_that_do_not_divide(pool: Pool) -> None:
    given = [(zero, job) for (zero, _), job in zip(ROWS, jobs([case for _, case in ROWS]), strict=True)]
    for (_, case), ours in zip(ROWS, pool.run(small_on_rank, 4, given, timeout=300)[0], strict=True):
        assert differences(ours, alone(case), case.precision) == []


def spoilt_on_rank(rank: int, world_size: int, case: Case) -> Outcome | None:
    """What another rank sends of its rows never comes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "spread", lambda self, got_RS: None)
        found = on_rank(rank, world_size, {"fsdp": 2, "zero": 1}, [(case, None)])
        return found[0] if found else None


def test_rows_that_never_come_are_seen(pool: Pool) -> None:
    ours = pool.run(spoilt_on_rank, 2, Case())[0]
    found = differences(ours, alone(Case()), "fp32")
    assert any(text.startswith("weights") for text in found)
    assert any(text.startswith("loss of step 2") for text in found)


@pytest.mark.parametrize(
    ("before", "after", "case"),
    [
        ({"dp": 2, "fsdp": 2, "zero": 1}, {"fsdp": 4, "zero": 1}, Case(optimizer="muon")),  # FSDP2's form
        ({"fsdp": 4, "zero": 2}, {"fsdp": 2, "tp": 2}, Case("odd")),
    ],
)
def test_checkpoints_go_both_ways(
    pool: Pool, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], case: Case
) -> None:
    pool.run(save_on_rank, 4, before, case, str(tmp_path))
    ours = pool.run(resume_on_rank, 4, after, case, str(tmp_path), str(tmp_path / "model"))[0]
    assert differences(ours, last_step(alone(case)), "fp32") == []


def kept_on_rank(rank: int, world_size: int, layouts: list[dict[str, Any]]) -> list[bool]:
    return [keeps_whole(World.join(Layout(**layout), "cpu").mesh) for layout in layouts]


def test_where_parameters_stay_whole(pool: Pool) -> None:
    layouts = [{"fsdp": 4, "zero": 1}, {"fsdp": 2, "cp": 2, "zero": 2}, {"fsdp": 4}, {"dp": 2, "fsdp": 2, "zero": 1},
               {"fsdp": 2, "tp": 2, "zero": 2}, {"pp": 2, "fsdp": 2, "zero": 1}, {"dp": 4}]  # fmt: skip
    assert pool.run(kept_on_rank, 4, layouts)[0] == [True, True, False, False, False, False, False]
