"""The pool of ranks: results in order, errors with the rank's traceback, and no test waits for ever."""

import ctypes
import os
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.train.pool import Pool, PoolError


def total(rank: int, world_size: int, x: torch.Tensor) -> tuple[int, torch.Tensor, int]:
    x = x * rank
    dist.all_reduce(x)
    return os.getpid(), x, torch.get_num_threads()


def fail_on(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        error = RuntimeError("one rank is ill")
        error.add_note("in the third case")
        raise error
    dist.barrier()


def answer_what_cannot_travel(rank: int, world_size: int) -> object:
    return (lambda: rank) if rank == 1 else rank


def hang_on(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        time.sleep(600)


def test_pool(pool: Pool) -> None:
    first = pool.run(total, 3, torch.ones(2))
    assert [x.tolist() for _, x, _ in first] == [[3.0, 3.0]] * 3
    assert {threads for *_, threads in first} == {1}
    again = pool.run(total, 2, torch.ones(2))
    assert [pid for pid, *_ in again] == [pid for pid, *_ in first[:2]]
    assert again[0][1].tolist() == [1.0, 1.0]


def test_failures_name_the_rank() -> None:
    own = Pool()
    with pytest.raises(
        PoolError,
        match=r"^rank 1: RuntimeError: one rank is ill \| in the third case\n"
        r"still busy 1.5 s after that: ranks 0\nrank 1 fail",
    ):
        own.run(fail_on, 2, 1)
    first = own.run(total, 2, torch.ones(1))  # new processes have imported this file then
    with pytest.raises(PoolError, match=r"(?s)^rank 1: .*pickle.*answer_what_cannot_travel"):
        own.run(answer_what_cannot_travel, 2)
    assert len({pid for pid, *_ in own.run(total, 2, torch.ones(1))} & {pid for pid, *_ in first}) == 0  # all are new
    own.close()


def test_who_hangs_is_named() -> None:
    own, found = Pool(), ""
    for limit in (2, 8, 30, 90):  # a busy machine may take seconds until a rank is where it hangs
        assert len(own.run(total, 2, torch.ones(1))) == 2  # new processes have imported this file then
        with pytest.raises(PoolError) as error:
            own.run(hang_on, 2, 1, timeout=limit)
        found = str(error.value)
        if re.match(rf"(?s)still busy after {limit} s: ranks 1\n.*in hang_on", found):
            break
    else:
        pytest.fail(found)
    own.close()


def crash_on(rank: int, world_size: int, bad: int, once: str) -> int:
    if rank == bad and not (once and Path(once).exists()):
        if once:
            Path(once).touch()
        ctypes.string_at(0)
    dist.all_reduce(torch.ones(1))
    return rank


def test_what_dies_is_done_again(tmp_path: Path) -> None:
    own = Pool()
    with pytest.warns(UserWarning, match=r"(?s)^done again.*rank 1: the process died \(exit code -11\)"):
        assert own.run(crash_on, 2, 1, str(tmp_path / "crashed")) == [0, 1]
    own.workers[0][0].kill()  # between two runs
    own.workers[0][0].join()
    assert len(own.run(total, 2, torch.ones(1))) == 2
    with (
        pytest.warns(UserWarning, match="done again"),
        pytest.raises(PoolError, match=r"(?s)^rank 1: the process died \(exit code -11\).*rank 1 failed:.*crash_on"),
    ):
        own.run(crash_on, 2, 1, "")
    own.close()
