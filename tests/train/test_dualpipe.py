"""DualPipe's overlapped chunk: forward and backward in turns, with experts on other ranks, equal one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from soma.train.parallel.config import Layout
from soma.train.parallel.exchange import Arriving
from soma.train.parallel.pipeline import execute, overlap
from soma.train.parallel.pipeline.pieces import Piece
from soma.train.world import World
from tests.train.bounds import differences
from tests.train.parity import Case, Outcome, alone, jobs, train
from tests.train.pool import Pool

LAYOUT = {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"}
FOLDED = {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe-v"}
SHARDED = {"pp": 2, "fsdp": 2, "ep": 2, "schedule": "dualpipe"}


class Turns:
    """Counts what runs in turns on this rank, and notes the exchanges in the order in which they start."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pairs, self.order = 0, list[tuple[int, int]]()
        inner, begin = execute.in_turns, overlap.start

        def in_turns(forward: Any, backward: Any) -> Any:
            self.pairs += 1
            return inner(forward, backward)

        def start(exchange: Any, x_PD: Tensor, to_R: list[int], from_R: list[int], ready: Any) -> Any:
            self.order.append((sum(to_R), sum(from_R)))
            return begin(exchange, x_PD, to_R, from_R, ready)

        patch.setattr(execute, "in_turns", in_turns)
        patch.setattr(overlap, "start", start)


def on_rank(
    rank: int, world_size: int, layout: dict[str, Any], given: list[Any], spoil: Callable[[pytest.MonkeyPatch], None]
) -> tuple[list[Outcome], int, list[tuple[int, int]]]:  # fmt: skip
    world = World.join(Layout(**layout), "cpu")
    with pytest.MonkeyPatch.context() as patch:
        turns = Turns(patch)
        spoil(patch)
        outcomes = [train(case, world, choices) for case, choices in given]
    return outcomes if rank == 0 else [], turns.pairs, turns.order


def nothing(patch: pytest.MonkeyPatch) -> None:
    """All as it is."""


def check(pool: Pool, layout: dict[str, Any], cases: list[Case], ranks: int = 4) -> None:
    answers = pool.run(on_rank, ranks, layout, jobs(cases), nothing, timeout=300)
    for case, ours in zip(cases, answers[0][0], strict=True):
        assert differences(ours, alone(case), case.precision) == [], case
    assert all(pairs > 0 for _, pairs, _ in answers)
    # Two ranks that share experts start the same exchanges: what one sends of each is what the other awaits.
    (_, _, one), (_, _, other) = answers[0], answers[1]
    assert len(one) == len(other) > 0
    assert all(a[0] + b[0] == a[1] + b[1] for a, b in zip(one, other, strict=True))


def test_equals_one_process(pool: Pool) -> None:
    """Tied embeddings, packed documents, router losses; then latents, a dense layer, shared experts, biased routers."""
    check(pool, LAYOUT, [Case("moe4", microbatch=2), Case("latent4", microbatch=2)])


@pytest.mark.parallel
@pytest.mark.parametrize("layout", [LAYOUT, FOLDED, SHARDED, SHARDED | {"zero": 1}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_grid(pool: Pool, layout: dict[str, Any], precision: str, optimizer: str) -> None:
    depth = 5 if layout == FOLDED else 4
    models = [(f"moe{depth}", ""), (f"latent{depth}", ""), (f"latent{depth}", "full")]
    cases = [Case(model, precision, 1, optimizer, lora=lora) for model, lora in models]
    check(pool, layout, [*cases, Case(f"moe{depth}", precision, 1, optimizer, checkpointing=True)])


@pytest.mark.parallel
def test_four_stages_on_eight_ranks() -> None:
    own = Pool()
    check(own, LAYOUT | {"pp": 4}, [Case("moe4", microbatch=1), Case("latent4", microbatch=1)], ranks=8)
    own.close()


def forget_weights(patch: pytest.MonkeyPatch) -> None:
    """The second part of a piece's backward does not come."""
    patch.setattr(Piece, "weights", lambda self: None)


def forget_losses(patch: pytest.MonkeyPatch) -> None:
    """The routers' losses have no gradient."""
    whole = Piece.backward
    patch.setattr(Piece, "backward", lambda self, grads, seed: whole(self, grads, torch.zeros_like(seed)))


def lose_rows(patch: pytest.MonkeyPatch) -> None:
    """The first row of every exchange comes empty."""
    whole = Arriving.wait

    def wait(self: Arriving) -> Tensor:
        rows = whole(self)
        rows[:1] = 0
        return rows

    patch.setattr(Arriving, "wait", wait)


@pytest.mark.parametrize(
    ("fault", "said"),
    [(forget_weights, "mlp.experts"), (forget_losses, "mlp.gate"), (lose_rows, "mlp.experts")],
)
def test_faults_are_seen(pool: Pool, fault: Callable[[pytest.MonkeyPatch], None], said: str) -> None:
    case = Case("moe4", microbatch=2)
    ours = pool.run(on_rank, 4, LAYOUT, jobs([case]), fault, timeout=300)[0][0][0]
    found = differences(ours, alone(case), "fp32")
    assert any(said in line for line in found), found
