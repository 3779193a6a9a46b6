"""The parity grid: every layout gives the loss, every gradient, the clipped norm and the weights of one process.

`tests/train/grid.py` generates it. A slice that has every value of every axis runs in `make test`, all of it in
`make test-parallel`. A case trains three steps of the real loop on packed documents with unequal numbers of targets;
embeddings are tied. What is planted as a fault is in test_parity_faults.py.
"""

from typing import Any

import pytest

from soma.model.config import ModelConfig
from soma.train.parallel.config import Layout
from soma.train.parallel.pipeline.schedule import layers_of_stages
from soma.train.parallel.pipeline.search import NAMED
from tests.train.bounds import differences
from tests.train.grid import EIGHT, GRID, RANKS, Sizes, cells, eight, inner, kinds, others
from tests.train.parity import MODELS, ROWS, Case, alone, jobs, on_rank
from tests.train.pool import Pool

# Every layout once or twice; together every model, precision, accumulation and optimizer.
SLICE: dict[str, list[dict[str, Any]]] = {
    "dp4": [{"optimizer": "muon", "microbatch": 1}, {"model": "moe"}],
    "fsdp4-zero1": [{"microbatch": 1}],
    "fsdp4-zero2": [{"model": "moe", "optimizer": "muon", "microbatch": 1}],
    "fsdp4": [{"model": "latent", "optimizer": "muon"}, {"checkpointing": True}],
    "dp2-fsdp2": [{"precision": "bf16", "microbatch": 2}],
    "tp4": [{"optimizer": "muon"}],
    "dp2-tp2": [{"model": "moe"}, {"model": "gpt2"}],
    "fsdp2-tp2-sp": [{"model": "latent", "optimizer": "muon"}, {"checkpointing": True}, {"precision": "fp16"}],
    "dp4-ep4": [{"model": "moe", "precision": "bf16", "microbatch": 1}],
    "fsdp4-ep2": [{"model": "latent", "optimizer": "muon"}],
    "fsdp2-tp2-ep2": [{"model": "moe", "optimizer": "muon"}],
    "cp4": [{"optimizer": "muon"}, {"precision": "bf16"}],
    "cp4-all_gather": [{"model": "latent"}, {"model": "gpt2", "isolate": False}],
    "fsdp2-cp2": [{"model": "moe", "precision": "bf16", "microbatch": 2}],
    "cp2-tp2-sp": [{"model": "latent", "precision": "bf16"}, {"checkpointing": True}],
    "dp2-cp2-ep2": [{"model": "moe"}],
    "pp2-zb-h1-tp2-sp": [{"model": "latent3", "microbatch": 4, "optimizer": "muon"}],
    "pp2-1f1b-cp2": [{"model": "dense3", "microbatch": 4, "checkpointing": True}],
    "pp2-gpipe-dp2-ep2": [{"model": "moe3", "precision": "bf16", "microbatch": 2}],
    "pp2-zb-h1-fsdp2": [
        {"model": "latent3", "microbatch": 2, "checkpointing": "selective"},
        {"model": "dense3", "precision": "fp16", "microbatch": 2},
    ],
    "pp2-dualpipe-fsdp2-zero2": [{"model": "dense3", "microbatch": 2, "optimizer": "muon"}],
    "pp2-dualpipe-v-cp2-all_gather": [{"model": "dense5", "microbatch": 4}],
    "pp2-zb-v-fsdp2-zero1": [{"model": "moe5", "precision": "bf16", "microbatch": 2, "optimizer": "muon"}],
    "pp2-interleaved-fsdp2": [{"model": "dense5", "microbatch": 2, "checkpointing": True}],
    "pp2-zb-h2-fsdp2-ep2": [{"model": "moe3", "microbatch": 2}],
    "pp2-v-half-tp2": [{"model": "dense5", "microbatch": 4}],
}


# Updates: repeated key heads; whole layers under FSDP; one A for three layers; latents; experts; stages.
LORA_SLICE: dict[str, Case] = {
    "tp4": Case(lora="full"),
    "fsdp4": Case("gpt2", lora="full", microbatch=1),
    "fsdp2-tp2-sp": Case("wide", lora="int8", checkpointing=True),
    "fsdp2-tp2-ep2": Case("moe", lora="full"),
    "cp2-tp2-sp": Case("latent", lora="full"),
    "pp2-zb-h1-tp2-sp": Case("gpt23", lora="full", microbatch=4),
}


# Dropout: uneven inputs; pieces of sequences, of batches; stages, recomputed, sharded, in pairs that take turns.
DROPOUT_SLICE: dict[str, Case] = {
    "tp4": Case("odd", lora="full", dropout=0.4, microbatch=4),
    "fsdp2-tp2-sp": Case("latent", lora="full", dropout=0.4, checkpointing=True),
    "fsdp2-cp2": Case("gpt2", lora="full", dropout=0.4, microbatch=2),
    "pp2-zb-h1-fsdp2": Case("latent3", lora="full", dropout=0.4, microbatch=2, checkpointing=True),
    "pp2-dualpipe-dp2-ep2": Case("latent3", lora="full", dropout=0.4, microbatch=2),
    "pp2-1f1b-cp2": Case("dense3", lora="full", dropout=0.4, microbatch=4, pairs=True),
}


# Pairs: answers in pieces on several ranks; scores too; the reference in a pipeline, sharded, and with updates.
PAIRS_SLICE: dict[str, Case] = {
    "cp2-tp2-sp": Case("moe", pairs=True),
    "pp2-zb-h1-tp2-sp": Case("gpt23", pairs=True, microbatch=4),
    "pp2-zb-v-fsdp2": Case("moe5", pairs=True, microbatch=2),
    "pp2-1f1b-cp2": Case("dense3", pairs=True, microbatch=4, lora="full"),
}


def check(pool: Pool, sizes: Sizes, cases: list[Case], ranks: int = RANKS, timeout: float = 500) -> None:
    """Train all cases in one call, and say all that is not as in one process."""
    outcomes = pool.run(on_rank, ranks, sizes, jobs(cases), timeout=timeout)[0]
    wrong = {
        str(case): found
        for case, ours in zip(cases, outcomes, strict=True)
        if (found := differences(ours, alone(case), case.precision))
    }
    assert wrong == {}, sizes


@pytest.mark.parametrize("name", SLICE)
def test_slice(pool: Pool, name: str) -> None:
    check(pool, GRID[name], [Case(**values) for values in SLICE[name]])


@pytest.mark.parametrize("name", LORA_SLICE)
def test_lora_slice(pool: Pool, name: str) -> None:
    check(pool, GRID[name], [LORA_SLICE[name]])


@pytest.mark.parametrize("name", DROPOUT_SLICE)
def test_dropout_slice(pool: Pool, name: str) -> None:
    check(pool, GRID[name], [DROPOUT_SLICE[name]])


def test_the_slice_has_every_value_of_every_axis() -> None:
    """Of the axes, and of what the layouts are made of."""
    cases = [Case(**values) for chosen in SLICE.values() for values in chosen] + list(LORA_SLICE.values())
    for axis, values in {
        "model": {"dense", "moe", "latent", "gpt2"}, "precision": {"fp32", "bf16", "fp16"},
        "optimizer": {"adamw", "muon"}, "lora": {"", "full", "int8"}, "checkpointing": {False, True, "selective"},
    }.items():  # fmt: skip
        assert values <= {getattr(case, axis) for case in cases}, axis
    parts = {(key, value) for name in SLICE for key, value in GRID[name].items()}
    assert {("schedule", schedule) for schedule in NAMED} <= parts
    assert {key for key, _ in parts} >= {key for sizes in GRID.values() for key in sizes}


def test_the_grid_is_whole() -> None:
    """Every schedule over every layout of the ranks that are left, and no cell twice."""
    assert len(GRID) == len(list(inner(4))) + len(NAMED) * (len(list(inner(2))) + 1)
    for sizes in [*GRID.values(), *EIGHT.values()]:
        found = cells(sizes)
        assert len(found) == len(set(found)) == len(kinds(sizes)) * 2 * 2 * 2 or sizes in EIGHT.values()
        for case in found + others(sizes):
            layout = Layout(**sizes).resolve(8 if sizes in EIGHT.values() else RANKS)
            layout.check_model(ModelConfig(**MODELS[case.model]))
            layout.check_batch(ROWS, case.microbatch)
    assert layers_of_stages(3, 2) == [[0, 1], [2]]  # what the pipelines' models have is uneven
    for layers, stages in ((5, 4), (9, 8)):
        assert {len(stage) for stage in layers_of_stages(layers, stages)} == {1, 2}


@pytest.mark.parametrize("name", PAIRS_SLICE)
def test_pairs_slice(pool: Pool, name: str) -> None:
    check(pool, GRID[name], [PAIRS_SLICE[name]])


@pytest.mark.parallel
@pytest.mark.parametrize("name", GRID)
def test_grid(pool: Pool, name: str) -> None:
    check(pool, GRID[name], cells(GRID[name]))


@pytest.mark.parallel
@pytest.mark.parametrize("name", GRID)
def test_others(pool: Pool, name: str) -> None:
    check(pool, GRID[name], others(GRID[name]))


@pytest.mark.parallel
@pytest.mark.parametrize("name", EIGHT)
def test_eight_ranks(pool: Pool, name: str) -> None:
    check(pool, EIGHT[name], eight(EIGHT[name]), ranks=8)


@pytest.mark.parallel
@pytest.mark.parametrize("layout", [{"fsdp": 2}, {"tp": 2, "sp": True}, {"cp": 2}, {"dp": 2, "ep": 2}])
def test_compiled_layers(pool: Pool, layout: dict[str, Any]) -> None:
    case = Case(compile=True, model="moe" if "ep" in layout else "dense")
    outcome = pool.run(on_rank, 2, layout, jobs([case]), timeout=500)[0][0]
    assert differences(outcome, alone(case), "fp32") == []
