"""A rank that hangs in the middle of a step: the others say which one it is, and in what they wait for it."""

import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from soma.train.parallel import watch
from soma.train.parallel.config import GRID, Layout
from soma.train.parallel.watch import LostRankError, State, explain, watched
from soma.train.world import World
from tests.train.parity import Case, make_trainer
from tests.train.pool import Pool, PoolError

TIMEOUT = 8.0  # a busy machine may keep a rank from its step for seconds
LIMIT = 90.0  # seconds for all of a test on a busy machine


def until(condition: Callable[[], bool]) -> None:
    """Poll."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sleep(folder: Path, world_size: int) -> None:
    """Stay away until all others have given up."""
    until(lambda: len(list(folder.glob("told-*"))) == world_size - 1)


def stop(folder: Path, world_size: int) -> None:
    """As a debugger or a frozen virtual machine would: no thread of this process runs any more."""
    os.kill(os.getpid(), signal.SIGSTOP)


def train_with_a_hole(
    rank: int, world_size: int, layout: dict[str, Any], case: Case, folder: str, fault: Callable[[Path, int], None]
) -> None:  # fmt: skip
    """Two steps; in the second the last rank does not come to the sum of its gradients. Ends with the error."""
    place = Path(folder)
    world = World.join(Layout(**layout, timeout=TIMEOUT), "cpu")
    with tempfile.TemporaryDirectory() as work:
        trainer = make_trainer(case, world, Path(work))
        trainer.train_step()
        if rank == world_size - 1:
            finish = trainer.parallel.finish

            def hang() -> None:
                fault(place, world_size)
                finish()

            trainer.parallel.finish = hang  # type: ignore[method-assign]
        try:
            with watched(world.mesh.layout.timeout):
                trainer.train_step()
        except LostRankError as error:
            (place / f"told-{rank}").write_text(str(error))
            until(lambda: len(list(place.glob("told-*"))) >= world_size - 1)
            raise


@pytest.fixture
def own_pool() -> Iterator[Pool]:
    """Ranks of this test alone: it breaks them."""
    ranks = Pool()
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("layout", "case", "fault", "operation"),
    [
        ({"dp": 2, "tp": 2}, Case(), sleep, "all_reduce"),
        pytest.param({"fsdp": 2}, Case(), stop, "all_reduce number", marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "cp": 2}, Case(), stop, "all_reduce number", marks=pytest.mark.slow),
        pytest.param({"pp": 2, "dp": 2}, Case(microbatch=2), sleep, "of ranks", marks=pytest.mark.slow),
        pytest.param({"dp": 2, "ep": 2}, Case(model="moe"), stop, "all_reduce number", marks=pytest.mark.slow),
    ],
)
def test_missing_rank_is_named(
    own_pool: Pool, tmp_path: Path, layout: dict[str, Any], case: Case, fault: Callable[[Path, int], None],
    operation: str,
) -> None:  # fmt: skip
    ranks = prod(layout[name] for name in GRID if name in layout)
    with pytest.raises(PoolError) as found:
        own_pool.run(train_with_a_hole, ranks, layout, case, str(tmp_path), fault, timeout=LIMIT)
    for rank in range(ranks - 1):
        assert (tmp_path / f"told-{rank}").exists(), found.value
        text = (tmp_path / f"told-{rank}").read_text()
        assert operation in text, text
        assert text.startswith(f"rank {rank} waits at "), text
        assert f" for rank {ranks - 1}, which " in text, text
        assert ("stands at test_watch.py" if fault is sleep else "gives no sign of life") in text, text


EVERYONE = [0, 1, 2]


def told(silent: set[int], **states: State) -> str:
    """The sentence of rank 0 of three."""
    return explain(0, dict(enumerate(states.values())), silent, {"w": EVERYONE})


def test_chains_and_circles() -> None:
    """Who is missing, from what the ranks have written."""
    here, behind = {"w": 7}, {"w": 6}
    waits = State(groups=here, operations={"w": "broadcast"}, at="a.py:1 in f")
    late = State(groups=behind, at="b.py:2 in g")
    start = "rank 0 waits at a.py:1 in f in broadcast number 7 of ranks 0-2 "
    assert told(set(), a=waits, b=waits, c=late) == start + "for rank 2, which is alive and stands at b.py:2 in g"
    assert told({1}, a=waits, b=waits, c=waits).startswith(start + "for rank 1, which gives no sign of life")
    assert told(set(), a=waits, b=waits, c=State(groups=behind, ended=True)) == start + "for rank 2, which has ended"
    receives = State(groups=here, wait=(2, "the receipt of F0.0"))
    assert told(set(), a=receives, b=waits, c=late).startswith("rank 0 waits at  in the receipt of F0.0 for rank 2")
    pair = {"w": 6, "p": 1}
    chain = told(set(), a=waits, b=State(groups={"w": 6, "p": 2}), c=State(groups=pair, at="c.py:3 in h"))
    assert chain == start + "by way of rank 1 for rank 2, which is alive and stands at c.py:3 in h"
    circle = told(set(), a=waits, b=State(groups={"w": 6, "p": 2}), c=State(groups={"w": 8, "p": 1}))
    assert circle.startswith("ranks wait for each other: rank 0 in broadcast number 7")
    assert told(set(), a=waits, b=waits, c=waits).endswith("and no rank is missing in any")


def test_transfers_between_gpus() -> None:
    """A receipt waits for whoever has not begun to send it; what was sent and not taken is nobody's fault."""
    here = {"w": 7}
    takes, gives = State(groups=here, received={"1": 3}, at="a.py:1 in f"), State(groups=here, sent={"0": 2}, at="b")
    text = explain(0, {0: takes, 1: gives}, set(), {})
    assert (
        text == "rank 0 waits at a.py:1 in f in receipt number 3 from rank 1 for rank 1, which is alive and stands at b"
    )
    gives.sent["0"] = 4
    assert explain(0, {0: takes, 1: gives}, set(), {}).endswith("no rank is missing in any")


def wait_on_a_gpu(rank: int, world_size: int, folder: str) -> list[str]:
    """As over NCCL: what rank 0 has begun waits elsewhere, its main thread does not come back."""
    told: list[str] = []
    done = Path(folder) / "done"
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "uses_nccl", lambda: True)
        patch.setattr(watch, "limit_operations", lambda seconds: None)
        patch.setattr(watch, "end", told.append)
        with watched(2.0):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            work = dist.all_reduce(torch.ones(1), async_op=True) if rank == 0 else None
            until(lambda: bool(told) if rank == 0 else done.exists())
            done.touch()
            (dist.all_reduce(torch.ones(1), async_op=True) if work is None else work).wait()  # type: ignore[union-attr]
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_IGN
    return told


def test_a_rank_that_waits_on_its_gpu_is_ended(own_pool: Pool, tmp_path: Path) -> None:
    told, of_the_missing = own_pool.run(wait_on_a_gpu, 2, str(tmp_path), timeout=LIMIT)
    assert not of_the_missing
    who = r"rank 0 waits at \S+:\d+ in \S+ in all_reduce number \d+ of ranks 0,1 for rank 1, which "
    assert re.match(who + r"(is alive and stands at|gives no sign of life).* \(for \d+ s; ", told[0]), told


def slow_rank(rank: int, world_size: int) -> int:
    """A rank that is late but comes."""
    world = World.join(Layout(dp=2), "cpu")
    with watched(30.0):
        if rank == 1:
            time.sleep(1.0)
        return int(world.sum(torch.ones(())))


def test_patience(pool: Pool) -> None:
    assert pool.run(slow_rank, 2) == [2, 2]
