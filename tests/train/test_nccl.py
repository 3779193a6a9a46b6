"""The grid on GPUs, over NCCL: a rank has a GPU, and one process on one of them is what it is held to.

A slice of every layout and every schedule, and of each move from one layout's checkpoint to another layout; all of the
product with `make test-parallel`. The bounds are those of the CPUs' grid (`bounds.BOUNDS`), for schedules those below.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from soma.model.hub import load_model
from soma.train.parallel.pipeline.schedules import SCHEDULES
from tests.train import parity, pipeline_case
from tests.train.bounds import differences, errors
from tests.train.grid import GRID, cells, others
from tests.train.parity import Case, Outcome, jobs, on_rank, resume_on_rank, save_on_rank
from tests.train.pool import Pool
from tests.train.test_bridge import REASON, under_torchrun
from tests.train.test_parity import LORA_SLICE, PAIRS_SLICE, RANKS, SLICE
from tests.train.test_pipeline import gaps
from tests.train.test_samples import LAYOUTS as SAMPLED
from tests.train.test_samples import draw_on_rank
from tests.train.test_topology import MOVES, last_step, merged
from tests.train.test_uneven import UNEVEN

GPUS = torch.cuda.device_count()
LIMIT = 240.0  # seconds for a layout on a busy machine: its communicators, kernels that are loaded, its cases
FIRST, AFTER = 1e-5, 1e-4  # of pipelines in fp32
TWO: dict[str, dict[str, Any]] = {
    "dp": {"dp": 2},
    "zero3": {"fsdp": 2},
    "tp-sp": {"tp": 2, "sp": True},
    "cp": {"cp": 2},
    "ep": {"dp": 2, "ep": 2},
    "pp": {"pp": 2},
}

pytestmark = pytest.mark.skipif(GPUS < 2, reason=f"NCCL wants 2 GPUs, here are {GPUS}")
four = pytest.mark.skipif(GPUS < 4, reason=f"these layouts want 4 GPUs, here are {GPUS}")


@pytest.fixture(scope="module")
def gpus() -> Iterator[Pool]:
    ranks = Pool("cuda")
    yield ranks
    ranks.close()


known: dict[Any, Any] = {}


def alone(gpus: Pool, case: Case) -> Outcome:
    """One process on a GPU."""
    if case not in known:
        (known[case],) = gpus.run(parity.alone_on_rank, 1, [case], timeout=LIMIT)[0]
    return known[case]


def check(gpus: Pool, layout: dict[str, Any], cases: list[Case], ranks: int) -> None:
    given = jobs(cases, lambda case: alone(gpus, case))
    outcomes = gpus.run(on_rank, ranks, layout, given, timeout=LIMIT + 3 * len(cases))[0]
    for case, ours in zip(cases, outcomes, strict=True):
        found = errors(ours, alone(gpus, case), case.precision)
        worst = max(found, key=lambda what: found[what])
        print(f"{layout} {case.model} {case.precision} {case.optimizer}: {found[worst]:.2g} apart ({worst})")
        assert differences(ours, alone(gpus, case), case.precision) == [], (layout, case)


@pytest.mark.parametrize("name", TWO)
def test_two_gpus(gpus: Pool, name: str) -> None:
    case = Case("moe" if name == "ep" else "dense", microbatch=4)
    check(gpus, TWO[name], [case, replace(case, precision="bf16")], 2)


@four
@pytest.mark.parametrize("name", SLICE)
def test_layouts(gpus: Pool, name: str) -> None:
    cases = [Case(**values) for values in SLICE[name]]
    more = [slice_[name] for slice_ in (LORA_SLICE, PAIRS_SLICE) if name in slice_]
    check(gpus, GRID[name], [*dict.fromkeys([*cases, *more, replace(cases[0], precision="bf16")])], RANKS)


@four
@pytest.mark.parallel
@pytest.mark.parametrize("name", GRID)
def test_grid(gpus: Pool, name: str) -> None:
    check(gpus, GRID[name], [*cells(GRID[name]), *others(GRID[name])], RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "tp-sp"])
def test_compiled_layers(gpus: Pool, name: str) -> None:
    check(gpus, TWO[name], [Case(compile=True)], 2)


def test_accelerate() -> None:
    """In a pool of its own: Accelerate keeps what it has seen of the first process group for good."""
    pytest.importorskip("accelerate", reason=REASON)
    case, own = Case(microbatch=2), Pool("cuda")
    try:
        (expected,) = own.run(parity.alone_on_rank, 1, [case], timeout=LIMIT)[0]
        (ours,) = own.run(under_torchrun, 2, [(case, expected.choices)], timeout=LIMIT)[0]
    finally:
        own.close()
    assert differences(ours, expected, "fp32") == []


PIPELINES = [
    *(pipeline_case.Case(name) for name in [*SCHEDULES, "search"]),
    *(pipeline_case.Case(name, "moe", optimizer="muon") for name in ("interleaved", "zb-v", "dualpipe")),
    pipeline_case.Case("zb-h1", "gpt2"),
    pipeline_case.Case("dualpipe", "moe", "bf16", uneven=False),
    pipeline_case.Case("zb-v", "moe", recompute=True),
]


@four
@pytest.mark.parametrize("case", PIPELINES, ids=str)
def test_schedules(gpus: Pool, case: pipeline_case.Case) -> None:
    if case.alone not in known:
        (known[case.alone],) = gpus.run(pipeline_case.alone_on_rank, 1, case.alone, timeout=LIMIT)
    worst = gaps(gpus, case, known[case.alone], timeout=LIMIT)
    print(f"{case}: {worst.first:.2g} apart in the first step, {worst.after:.2g} after three")
    assert worst.first <= FIRST, worst
    assert worst.after <= (4e-2 if case.precision == "bf16" else AFTER), worst


@four
@pytest.mark.parametrize(("before", "after", "ranks", "case"), MOVES)
def test_another_layout_goes_on(
    gpus: Pool, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], ranks: int, case: Case
) -> None:
    """From a checkpoint of one layout; the model's folder has the weights that the ranks had."""
    gpus.run(save_on_rank, RANKS, before, case, str(tmp_path), timeout=LIMIT)
    place = str(tmp_path / "model")
    ours = gpus.run(resume_on_rank, ranks, after, case, str(tmp_path), place, timeout=LIMIT)[0]
    assert differences(ours, last_step(alone(gpus, case)), "fp32") == []
    model = load_model(tmp_path / "model").state_dict()
    expected = merged(case, ours.weights) if case.lora else ours.weights
    assert model.keys() <= expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.items())


@four
@pytest.mark.parametrize(("layout", "ranks", "case"), UNEVEN, ids=lambda value: str(value))
def test_uneven(gpus: Pool, layout: dict[str, Any], ranks: int, case: Case) -> None:
    check(gpus, layout, [case], ranks)


@four
@pytest.mark.parametrize(("layout", "model"), SAMPLED, ids=lambda value: str(value))
def test_samples(gpus: Pool, layout: dict[str, Any], model: str) -> None:
    """The likeliest tokens of one process on a GPU (draws may fall otherwise by a rounding)."""
    (expected,) = gpus.run(draw_on_rank, 1, {}, model, timeout=LIMIT)
    for found in gpus.run(draw_on_rank, 4, layout, model, timeout=LIMIT):
        assert (found["greedy"], found["trained"]) == (expected["greedy"], expected["trained"])
