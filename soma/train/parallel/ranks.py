"""A run under `torchrun`: rank 0 walks through the recipe, the others wait and join in whenever it trains.

So only one process reads and writes the store, and a stage that trains is the same call on every rank. All ranks must
see the runs folder under the same path.
"""

import datetime
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from soma.base.errors import UserError
from soma.train.parallel.watch import LONG_WAITS

# GPU streams beyond this number wait for each other by chance, and one that waits for another rank (each process group
# has its own) may then hold up what that rank waits for. CUDA's default is 8, this its most.
STREAMS = "32"
LONG = datetime.timedelta(days=30)  # that rank 0 may spend on other stages before it trains


def join() -> int:
    """Join the process group that `torchrun` describes; this process's rank. GPUs are dealt out by local rank."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the record of operations that `watch` reads
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", STREAMS)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(store_prefix(), store), rank=rank, world_size=size)
    return rank


def store_prefix() -> str:
    """What this start of the job puts before its keys in the store.

    An agent of torchrun keeps its store when it starts its ranks anew, and torch puts nothing before the keys: a rank
    would read where the one before it has listened (Gloo), or the name of a communicator that is gone (NCCL). Agents of
    several nodes do not count alike; there each start has a store of its own (`launch.OWN_STORE`).
    """
    is_alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if is_alone else 'any'}"


class Calls:
    """Calls that rank 0 makes and the others take part in. Every rank makes one, at the same time."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=LONG, group_desc=LONG_WAITS)

    def together(self, job: dict[str, Any] | None) -> None:
        """On rank 0: let the others call with these arguments; None: there are no more calls."""
        dist.broadcast_object_list([job], src=0, group=self.group)

    def follow(self, function: Callable[..., Any]) -> None:
        """On the other ranks: `function(**job)` for every job, to the last. Raises UserError if rank 0 ends before."""
        while True:
            box: list[dict[str, Any] | None] = [None]
            try:
                dist.broadcast_object_list(box, src=0, group=self.group)
            except RuntimeError as error:
                raise UserError(f"rank {dist.get_rank()} ends too: rank 0 is gone, and its message says why") from error
            if box[0] is None:
                return
            function(**box[0])


calls: Calls | None = None  # of this process, while it is one of several


def begin() -> int:
    """Join, and be ready for `together`; this process's rank."""
    global calls
    rank = join()
    calls = Calls()
    return rank


def together(job: dict[str, Any]) -> None:
    """Before rank 0 trains: the others do too, with the same arguments. Alone: nothing."""
    if calls is not None:
        calls.together(job)


def follow(function: Callable[..., Any]) -> None:
    """The life of a rank that is not 0."""
    assert calls is not None
    calls.follow(function)


def leave() -> None:
    """End this process once all ranks are done. Not by way of the interpreter's exit: there a thread of Gloo may free a
    tensor while Python is gone (half of 34 runs with pipelines ended in an abort)."""
    if calls is not None and dist.get_rank() == 0:
        calls.together(None)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
