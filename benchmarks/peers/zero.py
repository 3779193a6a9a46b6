"""One optimizer step of data parallelism, taken apart: what is sent between the ranks, what is launched, what the host
waits for. Each layout has processes of its own (DeepSpeed's stage 3 changes torch for all that share its process).
"""

import multiprocessing as mp
import os
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peers.pipelining import fill_at_random
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soma.data.loader import Batch
from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.compute import Compute
from soma.train.config import TrainConfig
from soma.train.journal import Journal
from soma.train.loop import Trainer
from soma.train.objective import LanguageModeling
from soma.train.parallel import apply
from soma.train.parallel.bridge import bridge
from soma.train.parallel.config import Layout
from soma.train.parallel.reduce import BUCKET_BYTES, Reducer
from soma.train.parallel.zero import BUCKET_BYTES as SHARED_BUCKET_BYTES
from soma.train.parallel.zero import SharedUpdates
from soma.train.tracking import NullTracker
from soma.train.world import World

WARM_STEPS = 2  # DeepSpeed's stage 3 learns the order of the modules in the first
ROWS = 4  # of a rank
LENGTHS = {"cpu": 64, "cuda": 1024}
SHAPES = {
    "cpu": ModelConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256,
    ),
    "cuda": ModelConfig(  # 0.55 billion parameters
        vocab_size=32768, hidden_size=1536, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=2048,
    ),
}  # fmt: skip
SCALE = 200  # the larger model has so many times the parameters: buckets on CPUs are as much smaller
KINDS = {
    "allreduce": "all-reduce", "allgather": "all-gather", "reduce_scatter": "reduce-scatter", "alltoall": "all-to-all",
    "broadcast": "broadcast", "reduce": "reduce",
}  # fmt: skip
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int64: "int64"}
PRODUCTS = {"mm", "addmm", "bmm"}
READS = {
    Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__,
    Tensor.__index__,
}  # fmt: skip
SMALL = 1024  # bytes: a loss, a norm, a flag


@dataclass
class Collective:
    """One operation between ranks. `products`: matrix products of the step launched before it."""

    kind: str
    dtype: str
    nbytes: int
    products: int


@dataclass
class Step:
    """What one step of a rank did. Launches are operations that compute or copy; views and allocations are none."""

    collectives: list[Collective] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)  # by phase: the passes, and the update after them
    through_dtensor: int = 0
    reads: int = 0
    products: int = 0

    def large(self) -> list[Collective]:
        """Those that carry parameters or gradients."""
        return [each for each in self.collectives if each.nbytes > SMALL]

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """{"all-gather fp32": (calls, bytes of the whole)}."""
        found: dict[str, list[int]] = defaultdict(list)
        for each in self.large():
            found[f"{each.kind} {each.dtype}"].append(each.nbytes)
        return {name: (len(sizes), sum(sizes)) for name, sizes in sorted(found.items())}

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends, by the rings of these operations: an all-reduce goes round twice."""
        whole = sum(each.nbytes * (2 if each.kind == "all-reduce" else 1) for each in self.large())
        return whole * (ranks - 1) / ranks

    def late(self) -> float:
        """Share of the bytes whose operation starts after the step's last matrix product: nothing hides these."""
        total = sum(each.nbytes for each in self.large())
        return sum(each.nbytes for each in self.large() if each.products == self.products) / total


class Census(TorchDispatchMode):
    """Writes down what is dispatched, in `step`."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.phase = Step(), "passes"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):  # comes again, as what it makes of it
            self.step.through_dtensor += 1
            return NotImplemented
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.note(name, args)
        elif func.namespace in ("aten", "fsdp") and not (func.is_view or "empty" in name or name == "detach"):
            self.step.launches[self.phase] += 1
            self.step.products += name in PRODUCTS
        return func(*args, **(kwargs or {}))

    def note(self, name: str, args: Any) -> None:
        kind = next((word for start, word in KINDS.items() if name.strip("_").startswith(start)), name)
        sides = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args[:2]]
        sizes = [sum(tensor.nbytes for tensor in side) for side in sides]
        tensors = sides[0] or sides[1]
        if tensors:
            dtype = DTYPES.get(tensors[0].dtype, str(tensors[0].dtype))
            self.step.collectives.append(Collective(kind, dtype, max(sizes), self.step.products))


class Reads(TorchFunctionMode):
    """Counts where Python asks for a tensor's value: a GPU is waited for there."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.step.reads += func in READS
        return func(*args, **(kwargs or {}))


class Rows:
    """The same batch again and again; each rank has rows of its own."""

    left_out = 0

    def __init__(self, rank: int, device: str) -> None:
        random, length = np.random.default_rng(rank), LENGTHS[device]
        tokens = random.integers(0, SHAPES[device].vocab_size, (ROWS, length + 1))
        positions = np.broadcast_to(np.arange(length), (ROWS, length)).copy()
        self.batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), positions, np.zeros_like(positions))

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}


def make_trainer(layout: dict[str, Any], microbatches: int, folder: Path, device: str) -> Trainer:
    """The real loop, with AdamW, clipping, fp32 parameters and bf16 products. A layout with `fsdp2` leaves stages
    1 and 2 to FSDP2, as layouts with replicas or tensor parallelism beside them do."""
    if layout.pop("fsdp2", False):
        apply.keeps_whole = lambda mesh: False  # type: ignore[assignment]
    world = World.join(Layout(**layout), device)
    config = TrainConfig(
        steps=10**6, batch_size=ROWS * world.data_size, microbatch_size=ROWS // microbatches, warmup=1,
        sequence_length=LENGTHS[device], isolate_documents=False, precision="bf16", log_every=10**6,
        layout=world.mesh.layout, learning_rate=1e-4,
    )  # fmt: skip
    place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    model = Transformer(SHAPES[device], device="meta", dtype=torch.float32)
    fill_at_random(model, place)
    compute = Compute(place, "bf16", False)
    if world.mesh.layout.engine == "soma":
        parallel: Any = apply.parallelize(model, world.mesh)
        objective = LanguageModeling(model, config, compute, parallel.cross_entropy_sum)
    else:
        parallel, objective = bridge(model, config, world.mesh, compute)
    tokenizer: Any = None
    return Trainer(
        config, folder, parallel=parallel, objective=objective, loader=Rows(world.rank, device), validation=None,
        steps=10**6, compute=compute, tokenizer=tokenizer, identity="", world=world,
        journal=Journal(folder / "metrics.jsonl", NullTracker(), False),
    )  # fmt: skip


def advance(trainer: Trainer) -> None:
    trainer.train_step()
    trainer.at.done += 1


def counted(trainer: Trainer) -> Step:
    """One step, taken apart."""
    census, finish = Census(), trainer.parallel.finish

    def marked() -> None:
        census.phase = "update"
        finish()

    trainer.parallel.finish = marked  # type: ignore[method-assign]
    try:
        with Reads(census.step), census:
            advance(trainer)
    finally:
        trainer.parallel.finish = finish  # type: ignore[method-assign]
    return census.step


def timed(trainer: Trainer) -> tuple[float, float, float, float]:
    """Seconds of a step, the longest of the ranks, and of their processors together; its loss; the most GiB of a GPU so
    far (0 without one)."""
    is_cuda = trainer.compute.device.type == "cuda"
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    advance(trainer)
    if is_cuda:
        torch.cuda.synchronize()
    seconds, processor = (
        torch.tensor(each, device=trainer.compute.device)
        for each in (time.perf_counter() - start, time.process_time() - busy)
    )
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    dist.all_reduce(processor)
    peak = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0
    return float(seconds), float(processor), trainer.at.last_loss, peak


ANSWERS: dict[str, Callable[[Trainer], Any]] = {"count": counted, "time": timed}


def serve(rank: int, size: int, folder: str, layout: dict[str, Any], microbatches: int, device: str,
          connection: Connection) -> None:  # fmt: skip
    """A rank: it does what it is told, and answers."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
    if device == "cuda":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # as `soma.train.parallel.ranks`
        torch.cuda.set_device(rank)
    else:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        apply.Reducer = partial(Reducer, bucket_bytes=BUCKET_BYTES // SCALE)  # type: ignore[misc]
        apply.SharedUpdates = partial(SharedUpdates, bucket_bytes=SHARED_BUCKET_BYTES // SCALE)  # type: ignore[misc]
        if layout.get("engine") == "accelerate":
            import accelerate

            options = partial(accelerate.DistributedDataParallelKwargs, bucket_cap_mb=(BUCKET_BYTES >> 20) / SCALE)
            accelerate.DistributedDataParallelKwargs = options
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
    trainer = make_trainer(layout, microbatches, Path(folder), device)
    for _ in range(WARM_STEPS):
        advance(trainer)
    connection.send(None)
    while (what := connection.recv()) is not None:
        connection.send(ANSWERS[what](trainer))
    dist.barrier()
    os._exit(0)


class Ranks:
    """Processes that train under a layout, and take a step when they are asked to."""

    def __init__(self, size: int, layout: dict[str, Any], microbatches: int, device: str) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            words = (rank, size, self.folder.name, layout, microbatches, device, theirs)
            process = context.Process(target=serve, args=words, daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        self.answers()

    def answers(self) -> list[Any]:
        return [connection.recv() for connection in self.connections]

    def ask(self, what: str) -> Any:
        """Rank 0's answer to "count" or "time"; all ranks take part."""
        for connection in self.connections:
            connection.send(what)
        return self.answers()[0]

    def close(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join()
        self.folder.cleanup()
