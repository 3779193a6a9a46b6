"""Accelerate as the engine: the replicas' rows of the parity grid."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.config import PreferenceConfig, TrainConfig
from soma.train.parallel.bridge import bridge, check
from soma.train.parallel.config import Layout
from soma.train.parallel.mesh import Mesh
from tests.train.bounds import differences
from tests.train.parity import DENSE, Case, Exact, Job, Outcome, alone, jobs, on_rank
from tests.train.pool import Pool

REASON = "accelerate is not installed: pip install 'somacube[accelerate]'"
LAYOUT = {"dp": -1, "engine": "accelerate"}


@pytest.fixture
def own_pool() -> Iterator[Pool]:
    """Ranks of one test: Accelerate keeps what it has seen of the first process group for good."""
    ranks = Pool()
    yield ranks
    ranks.close()


def under_torchrun(rank: int, world_size: int, jobs: list[Job]) -> list[Outcome] | None:
    """`on_rank`, with what torchrun says and Accelerate reads; it leaves this process its number of threads."""
    threads = torch.get_num_threads()
    os.environ.pop("OMP_NUM_THREADS", None)  # without it Accelerate would take all cores for each rank
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }  # fmt: skip
    outcomes = on_rank(rank, world_size, LAYOUT, jobs)
    assert torch.get_num_threads() == threads
    return outcomes


def verify(pool: Pool, ranks: int, cases: list[Case]) -> None:
    pytest.importorskip("accelerate", reason=REASON)
    outcomes = pool.run(under_torchrun, ranks, jobs(cases), timeout=400)[0]
    for case, ours in zip(cases, outcomes, strict=True):
        assert differences(ours, alone(case), case.precision) == [], case


def test_slice(own_pool: Pool) -> None:
    """Without the sums of the ranks in its gradients, or their mean for a sum, the bounds are far off."""
    verify(own_pool, 2, [Case(microbatch=2), Case("moe", optimizer="muon")])


@pytest.mark.parallel
def test_grid(own_pool: Pool) -> None:
    verify(own_pool, 4, [Case("latent", microbatch=1)] + [
        Case(model, precision, size, optimizer) for model in ("dense", "moe") for precision in ("fp32", "bf16")
        for size in (None, 1) for optimizer in ("adamw", "muon")
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        ({"fsdp": 2}, TrainConfig(), "is for replicas: take dp alone"),
        ({"dp": 2, "tp": 2}, TrainConfig(), "is for replicas: take dp alone"),
        ({"dp": 2, "ep": 2}, TrainConfig(), "is for replicas: take dp alone"),
        ({"dp": 2}, TrainConfig(lora={"r": 4}), "has no lora: take engine soma or deepspeed"),
        ({"dp": 2}, PreferenceConfig(), "has no preference tuning"),
        ({"dp": 2}, TrainConfig(precision="fp16"), "with precision fp16: take bf16"),
        ({"dp": 2}, TrainConfig(compile=True), "with compile: leave it out"),
        ({"dp": 2}, TrainConfig(activation_checkpointing="budget:1GB"), "with a budget"),
    ],
)
def test_what_it_cannot_do(layout: dict[str, Any], config: TrainConfig, message: str) -> None:
    resolved = Layout(**layout, engine="accelerate")
    resolved = resolved.resolve((resolved.dp or 1) * resolved.fsdp * resolved.tp)
    with pytest.raises(UserError, match=message):
        check(config, resolved)


def test_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    compute = Exact(torch.device("cpu"), "fp32", False)
    with pytest.raises(UserError, match=r"pip install 'somacube\[accelerate\]'"):
        bridge(Transformer(ModelConfig(**DENSE)), TrainConfig(), Mesh(Layout(dp=1, engine="accelerate")), compute)
