"""One training step under each layout of two ranks, in turn: two processes, one pinned thread each."""

import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from soma.data.loader import Batch
from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.compute import Compute
from soma.train.config import TrainConfig
from soma.train.journal import Journal
from soma.train.loop import Trainer
from soma.train.objective import LanguageModeling, Objective
from soma.train.parallel.apply import Parallel, parallelize
from soma.train.parallel.config import Layout
from soma.train.parallel.pipeline.training import stage_model
from soma.train.tracking import NullTracker
from soma.train.world import World

SHAPE = ModelConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=512,
)  # fmt: skip
RANKS, ROWS, LENGTH, MICROBATCH = 2, 8, 256, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "DDP": {"dp": 2},
    "FSDP (zero 3)": {"fsdp": 2},
    "FSDP (zero 2)": {"fsdp": 2, "zero": 2},
    "FSDP (zero 1)": {"fsdp": 2, "zero": 1},
    "TP": {"tp": 2},
    "TP with SP": {"tp": 2, "sp": True},
    "PP, 1f1b": {"pp": 2, "schedule": "1f1b"},
    "PP, zb-h1": {"pp": 2, "schedule": "zb-h1"},
}


class Rows:
    """The same batch again and again; a data rank's rows of it."""

    left_out = 0

    def __init__(self, world: World) -> None:
        random = np.random.default_rng(0)
        tokens = random.integers(0, SHAPE.vocab_size, (ROWS, LENGTH + 1))
        count = ROWS // world.data_size
        own = tokens[world.data_rank * count : (world.data_rank + 1) * count]
        positions = np.broadcast_to(np.arange(LENGTH), (count, LENGTH)).copy()
        self.batch = Batch(own[:, :-1].copy(), own[:, 1:].copy(), positions, np.zeros_like(positions))

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}


def make_step(layout: dict[str, Any], folder: Path) -> Callable[[], float]:
    """A trainer's step, which returns its loss."""
    world = World.join(Layout(**layout), "cpu")
    config = TrainConfig(
        steps=10**6, batch_size=ROWS, microbatch_size=MICROBATCH, sequence_length=LENGTH, warmup=1,
        isolate_documents=False, precision="fp32", log_every=10**6, layout=world.mesh.layout, learning_rate=1e-4,
    )  # fmt: skip
    model = Transformer(SHAPE, device="cpu", dtype=torch.float32)
    model.init_weights(0)
    compute = Compute(torch.device("cpu"), "fp32", False)
    parallel: Parallel
    objective: Objective
    if world.mesh.layout.pp > 1:
        parallel, objective = stage_model(model, config, world.mesh, compute)
    else:
        parallel = parallelize(model, world.mesh)
        objective = LanguageModeling(model, config, compute, parallel.cross_entropy_sum)
    tokenizer: Any = None
    trainer = Trainer(
        config, folder, parallel=parallel, objective=objective, loader=Rows(world), validation=None, steps=10**6,
        compute=compute, tokenizer=tokenizer, identity="", world=world,
        journal=Journal(folder / "metrics.jsonl", NullTracker(), False),
    )  # fmt: skip

    def step() -> float:
        trainer.train_step()
        trainer.at.done += 1
        return trainer.at.last_loss

    return step


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a step, the longest of the ranks, and its loss."""
    dist.barrier()
    start = time.perf_counter()
    loss = step()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds), loss


def rank_main(rank: int, folder: str, rounds: int, warmup: int, connection: Connection | None) -> None:
    """Every layout once a round; rank 0 sends {layout: seconds of each round}."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    steps = {name: make_step(layout, Path(folder)) for name, layout in LAYOUTS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(-warmup, rounds):
        losses = {}
        names = list(steps)
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            seconds, losses[name] = timed(steps[name])
            if round_ >= 0:
                times[name].append(seconds)
                if rank == 0:
                    print(f"  round {round_ + 1}/{rounds}  {name}: {seconds:.3f} s", flush=True)
        assert max(losses.values()) - min(losses.values()) < 1e-3, losses  # they train the same model
    if connection is not None:
        connection.send(times)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def measure(rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of a step by layout, round by round."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiving, sending = context.Pipe()
        processes = [
            context.Process(
                target=rank_main, args=(rank, folder, rounds, warmup, None if rank else sending), daemon=True
            )
            for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        sending.close()
        times: dict[str, list[float]] = receiving.recv()
        for process in processes:
            process.join()
    return times
