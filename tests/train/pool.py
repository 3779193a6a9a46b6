"""Processes that live through the whole test session, for tests on several ranks.

Starting four ranks takes seconds, a test on them tenths of one: so they are started once and every test gets them
with a new Gloo process group.

    def answer(rank: int, world_size: int, x: int) -> int:      # at the top level of a test module
        return x + dist.get_rank()

    def test_answer(pool: Pool) -> None:                        # the fixture of tests/train/conftest.py
        assert pool.run(answer, 4, 10) == [10, 11, 12, 13]

`Pool("cuda")` gives each rank a GPU of its own, and the groups NCCL beside Gloo. `device()` says on a rank where it
computes.

Arguments and results are pickled. `timeout` is in seconds. A rank that raises fails the test with that rank's
traceback, a rank that does not come back with its number and the place where it stands; then all processes are killed
and the next test gets new ones.
"""

import datetime
import faulthandler
import multiprocessing as mp
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from soma.base.parent import end_with_spawner

ATTEMPTS = 3  # at a call whose processes die
GRACE = 1.5  # seconds that the other ranks have to come back after one has failed
LOST = "gloo/transport"  # in the error of a rank whose peer has gone
# Imported once, by the server that processes are forked from: 1 s of CPU time less for each of them.
PRELOADED = ["torch", "torch.distributed", "tests.train.pool", "tests.train.parity", "tests.train.pipeline_case"]
here = ["cpu"]  # the type of device of this process


class PoolError(AssertionError):
    """A rank raised or did not come back: the message names the ranks and shows their tracebacks."""


class DiedError(PoolError):
    """A process was ended by a signal."""


def device() -> Any:
    """The torch.device that this process computes on: the CPU, unless it is a rank of a pool of GPUs."""
    import torch

    return torch.device(here[0])


class Pool:
    """Up to as many processes as the largest `world_size` asked for; each has one thread, and of "cuda" one GPU."""

    def __init__(self, device_type: str = "cpu") -> None:
        self.device_type = device_type
        self.folder = Path(tempfile.mkdtemp(prefix="soma-pool-"))
        self.workers: list[tuple[Any, Connection]] = []
        self.runs = 0

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
        """`fn(rank, world_size, *args)` on every rank, in a process group of just these; the results in rank order.

        Where a process dies of a signal (on CPUs) it is done again, with new processes, and pytest shows a warning with
        the place: threads of Gloo have been seen to abort (docs/lab.md), which says nothing of what is tested. What
        dies ATTEMPTS times has failed.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self.attempt(fn, world_size, *args, timeout=timeout)
            except DiedError as error:
                if attempt == ATTEMPTS or self.device_type != "cpu":
                    raise
                warnings.warn(f"done again, since a process died: {error}", stacklevel=2)
        raise AssertionError

    def attempt(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float) -> list[Any]:
        """`run`, once."""
        if any(not process.is_alive() for process, _ in self.workers):
            self.close()  # one has died since it answered
        while len(self.workers) < world_size:
            self.start()
        self.runs += 1
        store = self.folder / f"store-{self.runs}"
        for rank in range(world_size):
            # No pickler of multiprocessing: it would pass tensors through shared memory.
            self.workers[rank][1].send_bytes(pickle.dumps((str(store), rank, world_size, fn, args)))
        results, errors = self.collect(world_size, time.monotonic() + timeout)
        store.unlink(missing_ok=True)
        busy = [rank for rank in range(world_size) if rank not in results and rank not in errors]
        if errors or busy:
            message = self.describe(errors, busy, timeout)
            has_died = any(process.exitcode is not None and process.exitcode < 0 for process, _ in self.workers)
            self.close()
            raise (DiedError if has_died else PoolError)(message)
        return [results[rank] for rank in range(world_size)]

    def start(self) -> None:
        """One more process. They are forked from a server that has imported the rest: less time, shared memory."""
        self.folder.mkdir(exist_ok=True)
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        ours, theirs = context.Pipe()
        place = self.folder / f"stack-{len(self.workers)}"
        process = context.Process(target=work, args=(theirs, str(place), self.device_type), daemon=True)
        process.start()
        theirs.close()
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
        self.workers.append((process, ours))

    def collect(self, world_size: int, deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
        """Answers by rank and tracebacks by rank, until all are there or the time is over."""
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        open_: dict[Any, int] = {self.workers[rank][1]: rank for rank in range(world_size)}
        while open_ and time.monotonic() < deadline:
            for connection in wait(list(open_), timeout=max(0.0, deadline - time.monotonic())):
                rank = open_.pop(connection)
                try:
                    is_well, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    self.workers[rank][0].join(30)
                    code = self.workers[rank][0].exitcode
                    is_well, value = False, f"{self.stack(rank)}\nthe process died (exit code {code})"
                if is_well:
                    results[rank] = value
                else:
                    errors[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        return results, errors

    def describe(self, errors: dict[int, str], busy: list[int], timeout: float) -> str:
        """What went wrong on which rank, and where those are that are still busy: the likely cause first, in a line
        each, then at length."""
        causes = sorted(errors, key=lambda rank: (LOST in errors[rank], rank))  # a lost rank's peers fail after it
        lines = [f"rank {rank}: {cause(errors[rank])}" for rank in causes]
        if busy:
            after = f"{GRACE:g} s after that" if errors else f"after {timeout:g} s"
            lines.append(f"still busy {after}: ranks {', '.join(map(str, busy))}")
        parts = ["\n".join(lines), *(f"rank {rank} failed:\n{errors[rank]}" for rank in causes)]
        for rank in busy:
            os.kill(self.workers[rank][0].pid, signal.SIGUSR1)
            time.sleep(0.2)
            parts.append(f"rank {rank} stands at:\n{self.stack(rank)}")
        return "\n".join(parts)

    def stack(self, rank: int) -> str:
        """What a rank's faulthandler has written."""
        place = self.folder / f"stack-{rank}"
        return place.read_text() if place.exists() else ""

    def close(self) -> None:
        """End all processes."""
        for process, connection in self.workers:
            connection.close()
            process.kill()
        for process, _ in self.workers:
            process.join(10)
        self.workers.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def cause(text: str) -> str:
    """The end of a traceback in a line: the error, and the notes that it carries (which case of many it was)."""
    lines = text.strip().splitlines()
    frames = ("  ", "Extension modules:")  # the latter ends what faulthandler writes
    start = next((place for place in range(len(lines), 0, -1) if lines[place - 1].startswith(frames)), 0)
    return " | ".join(line for line in lines[start:] if line)[:400]


def work(connection: Connection, place: str, device_type: str) -> None:
    """What a process does: take a call, run it in a process group of its own, answer."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    here[0], backend = device_type, "gloo"
    if device_type == "cuda":
        from soma.train.parallel.ranks import STREAMS

        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", STREAMS)
        backend = "cpu:gloo,cuda:nccl"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the session's: it closes the pool
    end_with_spawner()  # of a session that was killed
    with open(place, "w") as stack:
        faulthandler.enable(file=stack)
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        while True:
            try:
                store, rank, world_size, fn, args = pickle.loads(connection.recv_bytes())
            except EOFError:
                os._exit(0)  # not by way of the interpreter: Gloo's threads may still free tensors then
            except Exception:  # noqa: BLE001 - a function that cannot be imported here is the test's failure
                connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
                continue
            limit = datetime.timedelta(minutes=10)
            try:
                if device_type == "cuda":
                    torch.cuda.set_device(rank)
                dist.init_process_group(
                    backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit
                )
                is_well, answer = True, pickle.dumps((True, fn(rank, world_size, *args)))
            except BaseException:  # noqa: BLE001 - SystemExit too is the rank's answer
                is_well, answer = False, pickle.dumps((False, traceback.format_exc()))
            sys.stdout.flush()
            connection.send_bytes(answer)
            if is_well:  # else the pool is closed
                dist.barrier()
                dist.destroy_process_group()
                forget_meshes()


def forget_meshes() -> None:
    """Meshes of one shape are equal to torch, which remembers the first, with groups that have ended."""
    from torch.distributed.tensor import _redistribute, debug

    for owner, name in ((debug, "_clear_sharding_prop_cache"), (debug, "_clear_python_sharding_prop_cache")):
        getattr(owner, name, lambda: None)()  # as torch's versions have them
    _redistribute._gen_transform_infos.cache_clear()
