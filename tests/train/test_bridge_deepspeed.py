"""DeepSpeed as the engine: the data-parallel rows of the parity grid, and its checkpoints under other engines."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.config import PreferenceConfig, TrainConfig
from soma.train.parallel import bridge_deepspeed
from soma.train.parallel.bridge import bridge, check
from soma.train.parallel.config import Layout
from soma.train.parallel.launch import OWN_STORE
from soma.train.parallel.mesh import Mesh
from soma.train.world import World
from tests.train.bounds import differences
from tests.train.parity import (  # fmt: skip
    DENSE,
    Case,
    Exact,
    Job,
    Outcome,
    alone,
    alone_on_rank,
    jobs,
    resume_on_rank,
    save_on_rank,
    train,
)
from tests.train.pool import Pool, device
from tests.train.test_topology import ENVIRONMENT, command, furthest_apart, last_step, trained, write_recipe

REASON = "deepspeed is not installed: pip install 'somacube[deepspeed]'"
ZERO = {stage: {"engine": "deepspeed", "zero": stage} for stage in (1, 2, 3)}
OFFLOADED = {stage: layout | {"cpu_offload": True} for stage, layout in ZERO.items()}
GPUS = torch.cuda.device_count()
Row = tuple[dict[str, Any], Case]  # layout and what is trained


@pytest.fixture
def own_pool() -> Iterator[Pool]:
    """Ranks of one test: DeepSpeed keeps what it has seen of the first process group for good."""
    pytest.importorskip("deepspeed", reason=REASON)
    ranks = Pool()
    yield ranks
    ranks.close()


@pytest.fixture
def gpus() -> Iterator[Pool]:
    pytest.importorskip("deepspeed", reason=REASON)
    ranks = Pool("cuda")
    yield ranks
    ranks.close()


def prepare(rank: int, world_size: int) -> None:
    """What torchrun says and DeepSpeed reads; small parameters are cut too in stage 3, and all of the tests' are."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }  # fmt: skip
    bridge_deepspeed.settings = partial(cut_all, bridge_deepspeed.settings)


def cut_all(settings: Any, *args: Any) -> dict[str, Any]:
    chosen = settings(*args)
    chosen["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return chosen


def rows_on_rank(rank: int, world_size: int, layouts: list[dict[str, Any]], jobs: list[Job]) -> list[Outcome]:
    """Three steps of each row."""
    prepare(rank, world_size)
    return [
        train(case, World.join(Layout(**layout), device().type), choices)
        for layout, (case, choices) in zip(layouts, jobs, strict=True)
    ]


def verify(pool: Pool, ranks: int, rows: list[Row], one: Callable[[Case], Outcome]) -> None:
    """Hold rows to what `one` process does."""
    layouts, cases = [layout for layout, _ in rows], [case for _, case in rows]
    check_rows(rows, pool.run(rows_on_rank, ranks, layouts, jobs(cases, one), timeout=500)[0], one)


def check_rows(rows: list[Row], outcomes: list[Outcome], one: Callable[[Case], Outcome]) -> None:
    for (layout, case), ours in zip(rows, outcomes, strict=True):
        assert differences(ours, one(case), case.precision) == [], (layout, case)


SLICE: list[Row] = [
    (ZERO[1], Case(microbatch=2)), (ZERO[2], Case("moe")), (ZERO[3], Case("moe", "bf16", 4)),
]  # fmt: skip


def slice_on_rank(
    rank: int, world_size: int, layouts: list[dict[str, Any]], jobs: list[Job], folder: str
) -> tuple[list[Outcome], Outcome, Outcome, list[int]]:  # fmt: skip
    """The slice; a row without the mean of the ranks made a sum; the last step of a run that stage 3 began and stage 1
    ended; and how many numbers of its weights, of its moments and in all stage 3 has on this rank."""
    outcomes = rows_on_rank(rank, world_size, layouts, jobs)
    averaged = bridge_deepspeed.DeepSpeedParallel.backward
    bridge_deepspeed.DeepSpeedParallel.backward = lambda self, value: averaged(self, value / world_size)
    wrong = train(Case(), World.join(Layout(**ZERO[2]), "cpu"))
    bridge_deepspeed.DeepSpeedParallel.backward = averaged
    save_on_rank(rank, world_size, ZERO[3], Case(), folder)
    resumed = resume_on_rank(rank, world_size, ZERO[1], Case(), folder, f"{folder}/model")
    world = World.join(Layout(**ZERO[3]), "cpu")
    parallel, _ = bridge(Transformer(ModelConfig(**DENSE)), TrainConfig(batch_size=2), world.mesh, CPU)
    weights = sum(parameter.numel() for parameter in parallel.model.parameters())
    (updates,) = parallel.optimizers(TrainConfig(), CPU)
    moments = sum(state["exp_avg"].local.numel() for state in updates.state.values())
    return outcomes, wrong, resumed or wrong, [weights, moments, parallel.count_parameters()]


CPU = Exact(torch.device("cpu"), "fp32", False)


def test_slice(own_pool: Pool, tmp_path: Path) -> None:
    layouts, cases = [layout for layout, _ in SLICE], [case for _, case in SLICE]
    first, second = own_pool.run(slice_on_rank, 2, layouts, jobs(cases), str(tmp_path), timeout=500)
    outcomes, wrong, resumed, (weights, moments, total) = first
    check_rows(SLICE, outcomes, alone)
    assert differences(wrong, alone(Case()), "fp32") != []
    assert differences(resumed, last_step(alone(Case())), "fp32") == []
    assert total == sum(parameter.numel() for parameter in Transformer(ModelConfig(**DENSE)).parameters())
    assert weights == 0  # until a layer's turn comes
    assert moments + second[-1][1] == total
    assert moments < 0.6 * total


@pytest.mark.parallel
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_grid(own_pool: Pool, stage: int) -> None:
    cases = [
        Case(model, precision, size, checkpointing=size == 1) for model in ("dense", "moe", "latent", "gpt2")
        for precision in ("fp32", "bf16") for size in (None, 1)
    ]  # fmt: skip
    cases += [Case(lora="full", microbatch=2, dropout=0.4), Case("wide", lora="int4")]
    verify(own_pool, 4, [(ZERO[stage], case) for case in cases], alone)


def move_on_rank(
    rank: int, world_size: int, before: dict[str, Any], after: dict[str, Any], case: Case, folder: str
) -> Outcome | None:  # fmt: skip
    prepare(rank, world_size)
    save_on_rank(rank, world_size, before, case, folder)
    return resume_on_rank(rank, world_size, after, case, folder, f"{folder}/model")


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("before", "after", "case"),
    [
        (ZERO[1], {"fsdp": 2, "tp": 2}, Case()),
        (ZERO[2], ZERO[3], Case("moe", microbatch=2)),
        (ZERO[3], {"dp": 4}, Case("moe")),
        ({"fsdp": 4}, ZERO[3], Case(lora="full")),
        ({"dp": 2, "fsdp": 2}, ZERO[2], Case("latent")),
    ],
)
def test_another_engine_goes_on(
    own_pool: Pool, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], case: Case
) -> None:
    ours = own_pool.run(move_on_rank, 4, before, after, case, str(tmp_path), timeout=400)[0]
    assert differences(ours, last_step(alone(case)), "fp32") == []


@pytest.mark.skipif(GPUS < 2, reason=f"NCCL wants 2 GPUs, here are {GPUS}")
def test_two_gpus(gpus: Pool) -> None:
    """With the optimizer (and in stage 3 the parameters) on the GPUs, and in the CPU's memory."""
    cases = [Case(microbatch=2), Case("moe"), Case("moe", "bf16", 4, checkpointing=True), Case(lora="full")]
    known = dict(zip(cases, gpus.run(alone_on_rank, 1, cases)[0], strict=True))
    rows = [(layout, case) for layout in (*ZERO.values(), *OFFLOADED.values()) for case in cases]
    verify(gpus, 2, rows, known.__getitem__)


GPU_MOVES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"dp": 2}, OFFLOADED[3]), (OFFLOADED[2], {"fsdp": 2}), (OFFLOADED[3], OFFLOADED[1]),
]  # fmt: skip


def gpu_moves_on_rank(rank: int, world_size: int, folder: str) -> list[Outcome | None]:
    prepare(rank, world_size)
    outcomes = []
    for number, (before, after) in enumerate(GPU_MOVES):
        save_on_rank(rank, world_size, before, Case(), f"{folder}/{number}")
        outcomes.append(
            resume_on_rank(rank, world_size, after, Case(), f"{folder}/{number}", f"{folder}/model-{number}")
        )
    return outcomes


@pytest.mark.skipif(GPUS < 2, reason=f"NCCL wants 2 GPUs, here are {GPUS}")
def test_offloaded_state_goes_on(gpus: Pool, tmp_path: Path) -> None:
    (expected,) = gpus.run(alone_on_rank, 1, [Case()])[0]
    outcomes = gpus.run(gpu_moves_on_rank, 2, str(tmp_path))[0]
    for move, ours in zip(GPU_MOVES, outcomes, strict=True):
        assert differences(ours, last_step(expected), "fp32") == [], move


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_torchrun(tmp_path: Path, stage: int) -> None:
    """`soma train` gives the model of one process, under the same key."""
    pytest.importorskip("deepspeed", reason=REASON)
    recipe = write_recipe(tmp_path)
    one = trained(command(recipe, tmp_path / "one"), tmp_path / "one")
    options = ("--set", "train.layout.engine=deepspeed", "--set", f"train.layout.zero={stage}")
    two = trained(command(recipe, tmp_path / "two", *options, ranks=2), tmp_path / "two")
    assert one.name == two.name
    assert furthest_apart(one, two) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is POSIX")
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_ranks(tmp_path: Path, stage: int) -> None:
    """kill -9 between the backward pass and the update: torchrun starts the ranks again, and the bits are the same."""
    pytest.importorskip("deepspeed", reason=REASON)
    recipe, mark = write_recipe(tmp_path, steps=10), tmp_path / "mark"
    options = ("--set", "train.layout.engine=deepspeed", "--set", f"train.layout.zero={stage}")
    undisturbed = trained(command(recipe, tmp_path / "one", *options, ranks=2), tmp_path / "one")
    call = command(recipe, tmp_path / "two", *options, ranks=2)
    call[call.index("soma.cli")] = "tests.train.dying_rank"
    told = {"SOMA_TEST_MARK": str(mark), "SOMA_TEST_RANKS": "2", "SOMA_TEST_KILL": "rank"}
    done = subprocess.run(call, capture_output=True, text=True, timeout=400, env=ENVIRONMENT | OWN_STORE | told)
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    assert any(f"resumed at step {step} of 10" in done.stdout + done.stderr for step in (4, 6)), done.stderr
    killed = (tmp_path / "two" / "tiny" / "train").resolve()
    assert furthest_apart(undisturbed, killed) == 0.0


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        ({"dp": 2, "fsdp": 2}, TrainConfig(), "has fsdp with zero alone"),
        ({"fsdp": 2, "tp": 2}, TrainConfig(), "has fsdp with zero alone"),
        ({"fsdp": 2, "ep": 2}, TrainConfig(), "has fsdp with zero alone"),
        ({}, TrainConfig(optimizer="muon"), "which muon does not bear: take adamw"),
        ({}, TrainConfig(parameters="bf16"), "with parameters bf16: take fp32"),
        ({}, TrainConfig(sample_prompts=["x"]), "draws no samples with zero 3"),
        ({}, PreferenceConfig(), "has no preference tuning"),
        ({}, TrainConfig(precision="fp16"), "with precision fp16: take bf16"),
        ({}, TrainConfig(compile=True), "with compile: leave it out"),
        ({}, TrainConfig(), "start it with torchrun"),
    ],
)
def test_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], config: TrainConfig, message: str
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if "torchrun" not in message:
        monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=message):
        check(config, Layout(**layout, engine="deepspeed").resolve(4))


@pytest.mark.parametrize(("ranks", "expected"), [(1, False), (2, True)])
def test_one_rank_is_not_its_own(ranks: int, expected: bool) -> None:
    """So that rank's model is filled where it trains."""
    assert bridge_deepspeed.starts_in_ram(Layout(engine="deepspeed", zero=3).resolve(ranks)) is expected


def test_all_ranks_are_its_own() -> None:
    """Where no size is given, fsdp takes the ranks, not dp."""
    layout = Layout(engine="deepspeed", zero=2).resolve(4)
    assert (layout.dp, layout.fsdp) == (1, 4)
    layout = Layout(engine="deepspeed", tp=-1).resolve(4)  # which it cannot, and says so when it is asked
    assert (layout.dp, layout.fsdp, layout.tp) == (1, 1, 4)


@pytest.mark.parametrize(("stage", "taken"), [(1, {"optimizer"}), (2, {"optimizer"}), (3, {"optimizer", "param"})])
def test_what_offload_takes(stage: int, taken: set[str]) -> None:
    mesh = Mesh(Layout(**OFFLOADED[stage]).resolve(4))
    chosen = bridge_deepspeed.settings(TrainConfig(batch_size=16, microbatch_size=2), mesh, 1000)
    sharing = chosen["zero_optimization"]
    assert {name.removeprefix("offload_") for name in sharing if name.startswith("offload_")} == taken
    assert sharing["reduce_bucket_size"] == 1000
    assert (chosen["train_micro_batch_size_per_gpu"], chosen["gradient_accumulation_steps"]) == (2, 2)


def test_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=r"pip install 'somacube\[deepspeed\]'"):
        bridge(Transformer(ModelConfig(**DENSE)), TrainConfig(), Mesh(Layout(dp=1, engine="deepspeed")), CPU)
