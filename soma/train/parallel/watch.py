"""Who is missing: a collective that hangs or breaks off is answered with the rank and the operation.

Gloo's own time-outs say neither. A thread of every rank writes to the store, every few seconds, what the rank has begun
in each process group (torch numbers the collectives of a group), what it waits for, and where its code stands. When an
operation fails, a rank reads what all have written and follows who waits for whom, to those that wait for nobody.

Over Gloo a rank that waits gets an error, in its main thread. Over NCCL it waits in CUDA, out of which nothing calls
it, until NCCL's own watchdog aborts the process without a word of who is missing: so there the thread itself says it
and ends the process, a little before.
"""

import json
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

from soma.base import progress
from soma.base.errors import UserError

BEAT = 2.0  # seconds between two writes
SILENCE = 6.0  # seconds without one after which a rank counts as silent
FAILED = ("gloo", "nccl", "timed out", "connection")  # words of the errors of lost transfers
NCCL_LATER = 30.0  # seconds after which NCCL's own watchdog may end what this one has not
STATUS = 2  # of a process that is ended here: as that of one whose main thread gets the error
LONG_WAITS = "long waits"  # description of a group in which ranks wait as long as it takes
Edges = dict[int, str]


class LostRankError(UserError):
    """An operation between ranks did not end. The message names the operation and the ranks that are missing."""


@dataclass
class State:
    """What a rank writes: `groups` the number of its last collective in each process group, `operations` which one that
    was, the newest last (once the numbers have not moved for a beat); `wait` the rank and the words of a transfer that
    it waits for; `sent` and `received` the number of transfers to and from a rank that it has begun; `at` where its
    code stands."""

    beat: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    operations: dict[str, str] = field(default_factory=dict)
    wait: tuple[int, str] | None = None
    sent: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    at: str = ""
    ended: bool = False


waits: list[tuple[int, str]] = []  # transfers that this process's main thread waits for, innermost last
# Transfers to and from ranks that were begun between GPUs, which wait for each other there: the host goes on.
sent: Counter[int] = Counter()
received: Counter[int] = Counter()


@contextmanager
def waiting(rank: int, what: str) -> Iterator[None]:
    """While this rank waits for a transfer from or to a (global) rank: torch keeps no record of those over Gloo."""
    waits.append((rank, what))
    yield
    waits.pop()  # not after an error: it is what the rank waited for


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Within it an operation of the process groups that takes longer than `seconds` fails, with a LostRankError."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    limit_operations(seconds)
    watch = Watch(min(BEAT, seconds / 8), seconds / 2, seconds if uses_nccl() else None)
    try:
        with answering_sigterm():
            yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in FAILED):
            raise
        raise LostRankError(f"{watch.after(error)} ({str(error).splitlines()[0]})") from error
    finally:
        watch.stop()
        forget()


def forget() -> None:
    """What was begun before."""
    for record in (waits, sent, received):
        record.clear()


def uses_nccl() -> bool:
    """Whether ranks wait for each other on their GPUs."""
    return "nccl" in dist.get_backend()


@contextmanager
def answering_sigterm() -> Iterator[None]:
    """Over NCCL SIGTERM ends this process at once: a main thread that waits for its GPU runs no handler of Python's,
    and torchrun, which ends the others so when a rank is lost, would wait half a minute for it."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL) if is_main and uses_nccl() else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def limit_operations(seconds: float) -> None:
    """Let operations of the process groups that there are time out; those that are meant to last (`ranks`) do not."""
    for group in list(distributed_c10d._world.pg_map):
        if group.group_desc != LONG_WAITS:
            for backend in backends(group):
                later = NCCL_LATER if backend.name() == "nccl" else 0.0
                backend._set_default_timeout(timedelta(seconds=seconds + later))


def backends(group: dist.ProcessGroup) -> list[Any]:
    """The back ends of a group, its default first: Gloo for CPUs and NCCL for GPUs, or one of them."""
    own = {id(backend): backend for backend in map(group._get_backend, group._device_types)}
    return sorted(own.values(), key=lambda backend: backend.name() != "nccl")


def numbers() -> dict[str, int]:
    """By group the number of the last collective that this process has begun in it; `NAME:gloo` beside NCCL's."""
    found = {}
    for group in list(distributed_c10d._world.pg_map):
        first, *others = backends(group)
        found[str(group.group_name)] = first._get_sequence_number_for_group()
        found |= {f"{group.group_name}:{other.name()}": other._get_sequence_number_for_group() for other in others}
    return found


class Watch:
    """Writes this rank's state every `beat` seconds; notes once what has not ended for `late` seconds.

    limit: seconds after which a rank that is waited for is missed, and this process ended; None: the main thread will
    get an error.
    """

    def __init__(self, beat: float, late: float, limit: float | None = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.beat, self.late, self.limit = beat, late, limit
        self.store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.main = threading.get_ident()
        self.members = {
            name: dist.get_process_group_ranks(group)
            for group in list(distributed_c10d._world.pg_map)
            for name in (str(group.group_name), f"{group.group_name}:gloo")
        }
        self.state = State()
        self.stuck_since, self.noted, self.frozen = time.monotonic(), False, False
        self.lock, self.ending = threading.Lock(), threading.Event()
        forget()
        self.write()
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()

    def run(self) -> None:
        """The thread's life."""
        try:
            while not self.ending.wait(self.beat):
                before = self.state
                self.write()
                if not same(before, self.state):
                    self.stuck_since, self.noted = time.monotonic(), False
                    continue
                stuck = time.monotonic() - self.stuck_since
                if stuck > self.late and not self.noted:
                    self.noted = True
                    progress.current().note(f"after {stuck:.0f} s: {self.report()}")
                elif self.limit is not None and stuck > self.limit:
                    self.give_up(stuck)
        except dist.DistError:
            return  # the store is gone: the job ends

    def give_up(self, seconds: float) -> None:
        """End this process, if it waits for a rank that has not come for so long."""
        states, silent = self.look()
        states[self.rank] = self.state
        if edges(self.rank, states, silent, self.members):
            text = explain(self.rank, states, silent, self.members)
            end(f"{text} (for {seconds:.0f} s; the layout's timeout is {self.limit:.0f} s)")

    def write(self) -> None:
        """One beat."""
        with self.lock:
            if not self.frozen:
                self.take()
            self.send()

    def take(self) -> None:
        """This rank's state as it is now."""
        groups = numbers()
        # torch's record of operations is long: it is read only when this rank has begun nothing new.
        operations = last_operations(groups) if groups == self.state.groups else {}
        to, from_ = ({str(rank): count for rank, count in list(begun.items())} for begun in (sent, received))
        wait = waits[-1] if waits else None
        self.state = State(self.state.beat, groups, operations, wait, to, from_, self.stands())

    def stands(self) -> str:
        """Where the main thread's code is."""
        frame = sys._current_frames().get(self.main)
        return place(reversed([one for one, _ in traceback.walk_stack(frame)])) if frame is not None else ""

    def send(self) -> None:
        """Write the state to the store."""
        self.state.beat += 1
        self.store.set(f"watch/{self.rank}", json.dumps(asdict(self.state)))

    def freeze(self, error: BaseException) -> None:
        """An operation has failed: the state is that of this moment from now on."""
        with self.lock:
            self.take()
            self.state.operations = last_operations(self.state.groups)
            self.state.at = place(frame for frame, _ in traceback.walk_tb(error.__traceback__))
            self.frozen = True
            self.send()

    def report(self) -> str:
        """What this rank waits for and who is missing there, in one sentence."""
        states, silent = self.look()
        states[self.rank] = self.state
        return explain(self.rank, states, silent, self.members)

    def after(self, error: RuntimeError) -> str:
        """What is known of an operation that has failed."""
        try:
            self.freeze(error)
            return self.report()
        except dist.DistError:  # it lives in rank 0's process, or with torchrun
            return f"rank {self.rank}: an operation failed, and the store of the process group is gone too"

    def look(self) -> tuple[dict[int, State], set[int]]:
        """All ranks' states, and the ranks that have written none for SILENCE seconds, though they have not ended."""
        first, until = self.read(), time.monotonic() + max(SILENCE, 3 * self.beat)
        while True:
            time.sleep(self.beat / 2)
            states = self.read()
            silent = {
                rank for rank, state in states.items()
                if rank != self.rank and not state.ended and state.beat == first[rank].beat
            }  # fmt: skip
            if not silent or time.monotonic() > until:
                return states, silent

    def read(self) -> dict[int, State]:
        """What the ranks have written last."""
        states = {}
        for rank in range(self.size):
            key = f"watch/{rank}"
            states[rank] = State(**json.loads(self.store.get(key))) if self.store.check([key]) else State()
        return states

    def stop(self) -> None:
        """End the thread; the last state stays for ranks that look for one that is missing."""
        self.ending.set()
        self.thread.join()
        try:
            self.state.ended = True
            self.send()
        except dist.DistError:
            pass  # the process that keeps the store has ended before this one


def same(one: State, other: State) -> bool:
    """Whether a rank has begun nothing and gone nowhere between two beats."""
    return all(getattr(one, name) == getattr(other, name) for name in ("groups", "wait", "sent", "received", "at"))


def end(message: str) -> None:
    """Say it and end this process, whose main thread cannot."""
    sys.stdout.flush()
    print(f"soma: {message}", file=sys.stderr, flush=True)
    os._exit(STATUS)


def last_operations(groups: Mapping[str, int]) -> dict[str, str]:
    """By group what the collective was that this rank has begun last, the newest at the end. (Whether it has ended the
    record says too, but of Gloo's sometimes late and sometimes early.)"""
    dumps = [getattr(c10d, name, None) for name in ("_dump_fr_trace", "_dump_nccl_trace")]  # Gloo's, NCCL's
    entries = [entry for dump in dumps if dump for entry in pickle.loads(dump(includeStackTraces=False))["entries"]]
    found: dict[str, str] = {}
    for entry in sorted(entries, key=lambda entry: entry["time_created_ns"]):
        backend, _, operation = entry["profiling_name"].partition(":")
        group = entry["process_group"][0]
        group = f"{group}:{backend}" if f"{group}:{backend}" in groups else group
        if group in groups and not entry["is_p2p"]:
            found.pop(group, None)
            found[group] = operation
    return found


def place(frames: Iterable[FrameType]) -> str:
    """Where code stands: of frames, the outermost first, the innermost line that is not torch's or this file's."""
    found = ""
    for frame in frames:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path.name not in (Path(__file__).name, "contextlib.py"):
            found = f"{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"
    return found


def explain(
    rank: int, states: Mapping[int, State], silent: set[int], members: Mapping[str, list[int]]
) -> str:  # fmt: skip
    """What `rank` waits for, and the ranks at the end of the chain of those that wait."""
    waits_for = {one: edges(one, states, silent, members) for one in states}
    waits_for |= {one: {} for one in silent}
    reached, frontier = {rank}, [rank]
    while frontier:
        for other in waits_for[frontier.pop()]:
            if other not in reached:
                reached.add(other)
                frontier.append(other)
    missing = sorted(one for one in reached - {rank} if not waits_for[one])
    own = waits_for[rank]
    if not own:
        return f"rank {rank}: an operation failed at {states[rank].at}, and no rank is missing in any"
    what = next(iter(own.values()))
    if not missing:
        circle = ", ".join(
            f"rank {one} in {next(iter(waits_for[one].values()))} at {states[one].at}" for one in sorted(reached)
        )
        return f"ranks wait for each other: {circle}"
    told = "; ".join(describe(one, states[one], one in silent) for one in missing)
    through = sorted(set(own) - set(missing))
    via = f" by way of rank{'s' * (len(through) > 1)} {', '.join(map(str, through))}" if through else ""
    return f"rank {rank} waits at {states[rank].at} in {what}{via} for {told}"


def describe(rank: int, state: State, is_silent: bool) -> str:
    """A missing rank."""
    if is_silent:
        last = f", last seen at {state.at}" if state.at else ""
        return f"rank {rank}, which gives no sign of life (stopped, dead, or off the network{last})"
    if state.ended:
        return f"rank {rank}, which has ended"
    return f"rank {rank}, which is alive and stands at {state.at}"


def edges(
    rank: int, states: Mapping[int, State], silent: set[int], members: Mapping[str, list[int]]
) -> Edges:  # fmt: skip
    """The ranks that a rank waits for, each with the operation; `members` are those of groups that the reader knows."""
    state, found = states[rank], Edges()
    if state.wait is not None:
        found[state.wait[0]] = state.wait[1]
    known = list(reversed(state.operations))
    for group in known + [group for group in state.groups if group not in known]:
        number = state.groups[group]
        within = [one for one in states if group in states[one].groups or one in members.get(group, ())]
        late = [one for one in within if states[one].groups.get(group, 0) < number]
        for one in late or (silent.intersection(within) - {rank} if number else ()):
            what = f"{state.operations.get(group, 'collective')} number {number} of ranks {spelled(within)}"
            found.setdefault(one, what)
    for source, number in state.received.items():
        one = int(source)
        if one in states and states[one].sent.get(str(rank), 0) < number:
            found.setdefault(one, f"receipt number {number} from rank {source}")
    return found


def spelled(ranks: list[int]) -> str:
    """`0-3` or `0,2,4`."""
    ranks = sorted(ranks)
    run = ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 2
    return f"{ranks[0]}-{ranks[-1]}" if run else ",".join(map(str, ranks))
