"""One model over several processes, as rank 0 sees it: it starts the others, sends them each step's batch, and watches.

The engine (scheduler, sampler) is rank 0's alone; the others compute. Steps go out over sockets that nobody else can
open, not through torch.distributed: an idle rank then waits without a time-out, and whichever side dies, the other
side's socket ends at once. When a rank ends, fails, or does not come back from a step, the whole group ends.
"""

import logging
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch import Tensor

from soma.base.errors import UserError
from soma.engine.batch import Batch
from soma.engine.launch import launch
from soma.engine.memory import largest_step
from soma.engine.paged import PagedCache
from soma.engine.parallel.links import TIMEOUT
from soma.engine.parallel.part import Part, Plan
from soma.engine.parallel.parts import pack
from soma.engine.parallel.wire import first_line, read, write
from soma.model.config import ModelConfig
from soma.model.hub import load_config
from soma.model.shard import check_split
from soma.model.transformer import Transformer

log = logging.getLogger("soma.engine")

PROGRAM = "import sys; from soma.engine.parallel.rank import main; main(int(sys.argv[1]))"
STEP_SECONDS = 300.0  # after which a step that has not ended is taken for a hang
PING_SECONDS = 1.0


class Peer:
    """Another rank: its process, our end of the socket, and what it has said."""

    def __init__(self, rank: int, name: str) -> None:
        self.rank, self.name = rank, name
        self.process, self.sock = launch(program=PROGRAM)
        self.answers: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.answered = threading.Event()  # a ping


class RankGroup:
    """All ranks of one model, each with its shard loaded. To the engine it is a `Runner`.

    lost: called with a reason, once, when the group is no more; the caller ends the process. step_seconds: how long a
    step may take. Raises UserError: the model cannot be split so, GPUs are missing, or what a rank says.
    """

    name, reason = "parallel", None

    def __init__(self, plan: Plan, lost: Callable[[str], None], step_seconds: float = STEP_SECONDS) -> None:
        check_split(load_config(plan.directory), plan.tensors, plan.stages)
        plan.device_of(0)
        self.plan, self.lost, self.step_seconds = plan, lost, step_seconds
        self.is_ready = False
        self.since = 0.0  # when the step in flight began, 0 if there is none
        self.closing = threading.Event()
        self.ending = threading.Lock()
        self.peers = [Peer(rank, place(rank, plan)) for rank in range(1, plan.world_size)]
        for peer in self.peers:
            threading.Thread(target=self._watch, args=(peer,), name=f"soma-rank-{peer.rank}", daemon=True).start()
        threading.Thread(target=self._clock, name="soma-step-clock", daemon=True).start()
        try:
            for peer in self.peers:
                write(peer.sock, "load", plan, peer.rank)
            self.part = Part(plan, 0)
            for peer in self.peers:
                self._answer(peer)
            # It must live as long as the group: NCCL connects two ranks when they first talk to each other.
            self.store = dist.TCPStore("127.0.0.1", 0, plan.world_size, True, timeout=TIMEOUT, wait_for_workers=False)
            self._all("join", self.store.port)
            self.is_ready = True
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> Transformer:
        """Rank 0's shard."""
        return self.part.model

    @property
    def backend(self) -> "RankGroup":
        """What runs the steps."""
        return self

    @property
    def config(self) -> ModelConfig:
        """That of the whole model."""
        return self.part.config

    @property
    def cache(self) -> PagedCache:
        """Rank 0's part of the cache."""
        assert self.part.stage is not None
        return self.part.stage.cache

    def fitting_tokens(
        self, block_size: int, step_tokens: int, max_running: int, *, gpu_memory_utilization: float, share: int
    ) -> int:
        """As `soma.engine.memory.fitting_tokens`: what fits on the rank with the least room."""
        device = self.part.device
        batch = largest_step(block_size, step_tokens, max_running, device)
        self.start(batch.longest // block_size + 1, block_size)
        found = self._all("measure", pack(batch), gpu_memory_utilization)
        share *= 1 if device.type == "cuda" else self.plan.world_size  # on a CPU all ranks have one memory
        return int(min(room / share / token for room, token in found))

    def start(self, blocks: int, block_size: int) -> None:
        """Give every rank its part of a cache of so many blocks."""
        self._all("start", blocks, block_size)

    def step(self, batch: Batch) -> Tensor:
        """Append the batch's tokens to the cache; the logits (R, V) of the rows that it asks for."""
        message = pack(batch)
        self.since = time.monotonic()
        try:
            for peer in self.peers:
                write(peer.sock, "step", message)
            logits_RV = self.part.step(message)
        except Exception as error:
            log.exception("a step failed on rank 0")
            if not self.closing.wait(2.0):  # a rank that is gone is named by who watches it
                self._lose(f"rank 0 failed: {first_line(error)}")
            raise
        self.since = 0.0
        assert logits_RV is not None
        return logits_RV

    def close(self) -> None:
        """End the other ranks."""
        self.closing.set()
        for peer in self.peers:
            with suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)
        for peer in self.peers:
            try:
                peer.process.wait(5)
            except subprocess.TimeoutExpired:
                peer.process.kill()
                peer.process.wait()

    def _all(self, kind: str, *arguments: Any) -> list[Any]:
        """Have every rank do something at the same time, this one too; the results in rank order."""
        for peer in self.peers:
            write(peer.sock, kind, *arguments)
        return [getattr(self.part, kind)(*arguments), *(self._answer(peer) for peer in self.peers)]

    def _answer(self, peer: Peer) -> Any:
        kind, *rest = peer.answers.get()
        if kind == "failed":
            raise UserError(rest[0]) if rest[1] else RuntimeError(f"{peer.name}: {rest[0]}")
        return rest[0]

    # On threads of their own:

    def _watch(self, peer: Peer) -> None:
        """Take what a rank says; its end is the end of the group."""
        failed = None
        while (message := read(peer.sock)) is not None:
            if message[0] == "pong":
                peer.answered.set()
                continue
            failed = message[1] if message[0] == "failed" else failed
            peer.answers.put(message)
        if self.closing.is_set():
            return
        if failed is None:
            with suppress(subprocess.TimeoutExpired):
                peer.process.wait(5)
            status = peer.process.returncode
            peer.answers.put(("failed", f"ended with status {status}", False))
            self._lose(f"{peer.name} ended with status {status}")
        elif self.is_ready:
            self._lose(f"{peer.name} failed: {failed}")

    def _clock(self) -> None:
        """A step that takes too long is a rank that hangs."""
        while not self.closing.wait(min(1.0, self.step_seconds / 4)):
            began = self.since
            if began and time.monotonic() - began > self.step_seconds:
                for peer in self.peers:
                    with suppress(OSError):
                        write(peer.sock, "ping")
                self.closing.wait(PING_SECONDS)
                deaf = [peer.name for peer in self.peers if not peer.answered.is_set()]
                who = f"{' and '.join(deaf)} does not answer" if deaf else "every rank answers"
                self._lose(f"a step has not ended after {self.step_seconds:g} s; {who}")

    def _lose(self, reason: str) -> None:
        with self.ending:
            if self.closing.is_set():
                return
            self.closing.set()
            for peer in self.peers:
                peer.process.kill()
            self.lost(reason)


def place(rank: int, plan: Plan) -> str:
    """A rank by name, for messages."""
    return f"rank {rank} (tensor {rank % plan.tensors}, stage {rank // plan.tensors})"
