"""The loss scaler of fp16: torch's own in one process, and the same decision on all ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from soma.train.scaler import FIRST, LossScaler
from soma.train.world import World
from tests.train.parity import Case, Outcome, train
from tests.train.pool import Pool

CPU = torch.device("cpu")


def test_as_torchs_own() -> None:
    """Steps with and without overflow: weights and scale."""
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    scaler, reference = LossScaler(CPU, enabled=True), torch.amp.GradScaler("cpu")
    one, other = torch.optim.SGD(ours.parameters(), 0.1), torch.optim.SGD(theirs.parameters(), 0.1)
    torch.manual_seed(0)
    for step in range(6):
        x = torch.randn(4, 3) * (1e38 if step in (1, 2) else 1)
        scaler.scale(ours(x).sum()).backward()
        scaler.unscale([one])
        scaler.step([one])
        reference.scale(theirs(x).sum()).backward()
        reference.unscale_(other)
        reference.step(other)
        reference.update()
        one.zero_grad()
        other.zero_grad()
        assert float(scaler.value) == reference.get_scale()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert float(scaler.value) == FIRST / 4
    again = LossScaler(CPU, enabled=True)
    again.load_state_dict(scaler.state_dict())
    assert (float(again.value), int(again.without_overflow)) == (FIRST / 4, 3)


def overflows_on_one(rank: int, world_size: int) -> tuple[float, list[float]]:
    """Only rank 1 has a gradient that is too large, in the first of two steps."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], 1.0)
    scaler = LossScaler(CPU, enabled=True, ranks=dist.get_world_size())
    for step in range(2):
        parameter.grad = torch.full((2,), float("inf") if (rank, step) == (1, 0) else 0.5) * scaler.value
        scaler.unscale([optimizer])
        scaler.step([optimizer])
    return float(scaler.value), parameter.tolist()


def test_all_ranks_leave_a_step_out_together(pool: Pool) -> None:
    assert pool.run(overflows_on_one, 2) == [(FIRST / 2, [0.5, 0.5])] * 2


def test_the_grid_trains_in_fp16() -> None:
    """The grid's fp16 cases are fp16: close to fp32, and not the same."""
    half: Outcome = train(Case(precision="fp16"), World())
    whole: Outcome = train(Case(), World())
    assert half.losses[0] == pytest.approx(whole.losses[0], rel=1e-3)
    assert half.losses[0] != whole.losses[0]
    assert half.norms[0] == pytest.approx(whole.norms[0], rel=1e-2)
