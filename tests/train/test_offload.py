"""cpu_offload: what it refuses, and its layouts against one process.

On a CPU both memories are one, so FSDP2's offloading path runs here with copies that stay in place; what needs a GPU is
in `test_offload_gpu.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from soma.base.errors import UserError
from soma.train.config import TrainConfig
from soma.train.optim import Muon
from soma.train.parallel.config import Layout
from soma.train.parallel.norm import scale_gradients
from soma.train.parallel.offload import Sums, offloading, optimizer_threads
from soma.train.trainer import train
from soma.train.world import World
from tests.train.bounds import differences
from tests.train.parity import Case, alone, jobs, on_rank, resume_on_rank, save_on_rank
from tests.train.pool import Pool
from tests.train.test_topology import last_step


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"zero": 2}, "zero 2 keeps whole parameters on the GPU .* take zero 3"),
        ({"zero": 1}, "zero 1 keeps whole gradients and parameters .* take zero 3"),
        ({"pp": 2}, "cpu_offload and pp exclude each other"),
        ({"engine": "accelerate"}, "cpu_offload and engine accelerate exclude each other: take engine soma"),
    ],
)
def test_what_does_not_go_with_it(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Layout(cpu_offload=True, **layout)


def test_it_needs_shards() -> None:
    with pytest.raises(UserError, match=r"fsdp is 1: take fsdp -1"):
        Layout(cpu_offload=True).resolve(4)
    with pytest.raises(UserError, match=r"ep 4 on 4 ranks .*: take ep 2"):
        Layout(cpu_offload=True, fsdp=4, ep=4).resolve(4)
    with pytest.raises(
        UserError, match=r"engine deepspeed shares work between ranks, and there is 1: take engine soma"
    ):
        Layout(cpu_offload=True, engine="deepspeed", zero=2).resolve(1)
    assert Layout(cpu_offload=True).resolve(1).fsdp == 1
    assert Layout(cpu_offload=True, fsdp=-1, ep=2).resolve(4).fsdp == 4
    with pytest.raises(ValidationError, match=r"activation_checkpointing with a budget .* take true, every:N"):
        TrainConfig(layout=Layout(cpu_offload=True), activation_checkpointing="budget:1GB")


def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(device="cpu", layout=Layout(cpu_offload=True, fsdp=-1))
    with pytest.raises(UserError, match=r"layout: cpu_offload takes weights off a GPU, and this run has none"):
        train(config, tmp_path, tmp_path, tokens=tmp_path, tokenizer=tmp_path, model=tmp_path)


def test_the_optimizer_gets_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [optimizer_threads(*each) for each in ((96, 8), (2, 4))] == [12, 1]
    threads = torch.get_num_threads()
    with offloading(Layout(), "cpu"):
        assert torch.get_num_threads() == threads


def test_gradients_below_the_limit_are_left_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.full((4,), 0.5)
    scale_gradients([parameter], torch.tensor(1.0), limit=1.0)  # 1 / (1 + 1e-6) is below 1
    assert torch.all(parameter.grad < 0.5)
    parameter.grad = torch.full((4,), 0.25)
    version = parameter.grad._version
    scale_gradients([parameter], torch.tensor(0.5), limit=1.0)
    assert parameter.grad._version == version
    assert torch.all(parameter.grad == 0.25)


def test_muon_multiplies_elsewhere() -> None:
    """A device of its own gives the same update."""
    updated = []
    for device in (None, torch.device("cpu")):
        weight = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        weight.grad = torch.ones(3, 4).tril()
        Muon([weight], lr=0.1, dtype=torch.float32, device=device).step()
        updated.append(weight.detach())
    assert torch.equal(*updated)


CASES = [
    Case(microbatch=1), Case(optimizer="muon"), Case(lora="full"), Case(precision="fp16"), Case(checkpointing=True),
]  # fmt: skip
LAYOUTS: list[dict[str, Any]] = [{"fsdp": 4}, {"dp": 2, "fsdp": 2}, {"fsdp": 2, "tp": 2}, {"fsdp": 2, "cp": 2}]


def check(pool: Pool, layout: dict[str, Any], ranks: int, cases: list[Case]) -> None:
    outcomes = pool.run(on_rank, ranks, {"cpu_offload": True, **layout}, jobs(cases))[0]
    for case, outcome in zip(cases, outcomes, strict=True):
        assert not differences(outcome, alone(case), case.precision), (layout, case)


def test_a_process_alone_is_as_without(pool: Pool) -> None:
    check(pool, {}, 1, CASES[:3])


@pytest.mark.parallel
def test_every_case_of_a_process_alone(pool: Pool) -> None:
    check(pool, {}, 1, CASES)


def test_four_ranks_are_as_one_process(pool: Pool) -> None:
    check(pool, {"fsdp": 2, "tp": 2, "sp": True}, 4, CASES[:1])


@pytest.mark.parallel
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_case_under_every_layout(pool: Pool, layout: dict[str, Any]) -> None:
    check(pool, layout, 4, CASES)


@pytest.mark.parallel
def test_experts_under_offload(pool: Pool) -> None:
    case = Case("moe", microbatch=1)
    outcome = pool.run(on_rank, 4, {"cpu_offload": True, "fsdp": 4, "ep": 2}, jobs([case]))[0][0]
    assert not differences(outcome, alone(case), "fp32")


def test_begun_with_and_gone_on_without(pool: Pool, tmp_path: Path) -> None:
    """And the other way round; the optimizer's state goes along."""
    case, offloaded = Case(microbatch=2), {"cpu_offload": True, "fsdp": 2}
    for name, first, then in (("off", offloaded, {"fsdp": 2}), ("on", {"dp": 2}, offloaded)):
        folder = tmp_path / name
        folder.mkdir()
        pool.run(save_on_rank, 2, first, case, str(folder))
        outcome = pool.run(resume_on_rank, 2, then, case, str(folder), str(folder / "model"))[0]
        assert differences(outcome, last_step(alone(case)), "fp32") == []


def test_a_world_that_offloads_has_a_mesh(pool: Pool) -> None:
    assert World().mesh.shards is None
    assert pool.run(mesh_size, 1) == [1]


def mesh_size(rank: int, world_size: int) -> int:
    mesh = World.join(Layout(cpu_offload=True), "cpu").mesh
    assert mesh.shards is not None
    return mesh.shards.size()


def test_sums_of_microbatches() -> None:
    """Added up aside; a parameter without a gradient in one of them keeps those of the others."""
    first, second, third = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    sums = Sums([first, second, third])
    sums.give()
    assert first.grad is None
    for number in (1.0, 2.0, 4.0):
        sums.take()
        assert first.grad is None
        first.grad = torch.full((2,), number)
        if number != 2.0:
            second.grad = torch.full((2,), number)
    sums.give()
    assert first.grad is not None
    assert second.grad is not None
    assert (first.grad.tolist(), second.grad.tolist(), third.grad) == ([7.0, 7.0], [5.0, 5.0], None)
    sums.give()
    assert first.grad.tolist() == [7.0, 7.0], "nothing is added twice"
