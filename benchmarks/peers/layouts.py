"""One training step under each layout of two ranks, and under torch's own DDP, in turn: two processes, one pinned
thread or one GPU each.
"""

import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers.pipelining import join, make_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from soma.data.loader import Batch
from soma.model.config import ModelConfig
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

RANKS, ROWS, MICROBATCH, RATE = 2, 8, 2, 1e-4
SHAPES = {
    "cpu": ModelConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512,
    ),
    "cuda": ModelConfig(
        vocab_size=8192, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=2048,
    ),
}  # fmt: skip
LENGTHS = {"cpu": 256, "cuda": 2048}
PRECISIONS = {"cpu": "fp32", "cuda": "bf16"}
BOUNDS = {"cpu": 1e-3, "cuda": 5e-2}  # of the losses, in nats, after some steps in other orders of summation
PLAIN = "torch's DistributedDataParallel"
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

    def __init__(self, data_rank: int, data_size: int, device: str) -> None:
        random, length = np.random.default_rng(0), LENGTHS[device]
        tokens = random.integers(0, SHAPES[device].vocab_size, (ROWS, length + 1))
        count = ROWS // data_size
        own = tokens[data_rank * count : (data_rank + 1) * count]
        positions = np.broadcast_to(np.arange(length), (count, length)).copy()
        self.batch = Batch(own[:, :-1].copy(), own[:, 1:].copy(), positions, np.zeros_like(positions))

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}


def make_step(layout: dict[str, Any], folder: Path, device: str) -> Callable[[], float]:
    """A trainer's step, which returns its loss."""
    world = World.join(Layout(**layout), device)
    config = TrainConfig(
        steps=10**6, batch_size=ROWS, microbatch_size=MICROBATCH, sequence_length=LENGTHS[device], warmup=1,
        isolate_documents=False, precision=PRECISIONS[device], log_every=10**6, layout=world.mesh.layout,
        learning_rate=RATE,
    )  # fmt: skip
    place = own_device(device)
    model = make_model(SHAPES[device], device, torch.float32)
    compute = Compute(place, config.precision, False)
    parallel: Parallel
    objective: Objective
    if world.mesh.layout.pp > 1:
        parallel, objective = stage_model(model, config, world.mesh, compute)
    else:
        parallel = parallelize(model, world.mesh)
        objective = LanguageModeling(model, config, compute, parallel.cross_entropy_sum)
    tokenizer: Any = None
    trainer = Trainer(
        config, folder, parallel=parallel, objective=objective,
        loader=Rows(world.data_rank, world.data_size, device), validation=None, steps=10**6,
        compute=compute, tokenizer=tokenizer, identity="", world=world,
        journal=Journal(folder / "metrics.jsonl", NullTracker(), False),
    )  # fmt: skip

    def step() -> float:
        trainer.train_step()
        trainer.at.done += 1
        return trainer.at.last_loss

    return step


def make_plain_step(rank: int, device: str) -> Callable[[], float]:
    """The same step as a plain loop over torch's DistributedDataParallel, which sums gradients once a step."""
    place = own_device(device)
    model = make_model(SHAPES[device], device, torch.float32)
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    optimizer = torch.optim.AdamW(matrices, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0})
    batch = Rows(rank, RANKS, device).batch
    tokens, targets = (torch.from_numpy(a).to(place).split(MICROBATCH) for a in (batch.tokens, batch.targets))

    def step() -> float:
        total = torch.zeros((), device=place)
        for index, (tokens_BT, targets_BT) in enumerate(zip(tokens, targets, strict=True)):
            with nullcontext() if index == len(tokens) - 1 else replica.no_sync():
                with torch.autocast(place.type, torch.bfloat16, enabled=PRECISIONS[device] == "bf16"):
                    logits_BTV = replica(tokens_BT)
                loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten()) / len(tokens)
                loss.backward()
                total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        return float(total) / RANKS

    return step


def own_device(device: str) -> torch.device:
    """This rank's device, with its number."""
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")


def timed(step: Callable[[], float], device: str) -> tuple[float, float]:
    """Seconds of a step, the longest of the ranks, and its loss."""
    dist.barrier()
    start = time.perf_counter()
    loss = step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - start, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds), loss


def rank_main(rank: int, folder: str, rounds: int, warmup: int, device: str, connection: Connection | None) -> None:
    """Every layout once a round; rank 0 sends {layout: seconds of each round}."""
    join(rank, f"{folder}/store", device)
    steps = {name: make_step(layout, Path(folder), device) for name, layout in LAYOUTS.items()}
    steps[PLAIN] = make_plain_step(rank, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(-warmup, rounds):
        losses = {}
        names = list(steps)
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            seconds, losses[name] = timed(steps[name], device)
            if round_ >= 0:
                times[name].append(seconds)
                if rank == 0:
                    print(f"  round {round_ + 1}/{rounds}  {name}: {seconds:.3f} s", flush=True)
        assert max(losses.values()) - min(losses.values()) < BOUNDS[device], losses  # they train the same model
    if connection is not None:
        connection.send(times)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def measure(rounds: int, warmup: int, device: str) -> dict[str, list[float]]:
    """Seconds of a step by layout, round by round."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiving, sending = context.Pipe()
        processes = [
            context.Process(
                target=rank_main, args=(rank, folder, rounds, warmup, device, None if rank else sending), daemon=True
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
