"""Our pipeline executor and `torch.distributed.pipelining`'s on the same stages: two ranks, one pinned thread each."""

import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train.parallel.pipeline.execute import PipelineStep
from soma.train.parallel.pipeline.microbatch import Microbatch
from soma.train.parallel.pipeline.schedules import SCHEDULES
from soma.train.parallel.pipeline.stage import Stage, cut

SHAPE = ModelConfig(
    vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4,
    max_position_embeddings=256,
)  # fmt: skip
RANKS, MICROBATCHES, T = 2, 8, 64
THEIRS = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipe-v": "ScheduleDualPipeV",
}


class PlainStage(nn.Module):
    """One of our stages as torch's runtime wants it: a tensor in, a tensor out."""

    def __init__(self, stage: Stage, model: Transformer) -> None:
        super().__init__()
        self.stage, self.model_of = stage, [model]
        self.tokens_BT = torch.zeros(1, T, dtype=torch.int64)
        # It splits the backward over the parameters that it finds in the stage.
        self.ends = nn.ModuleList([model.embed_tokens] if stage.is_first else [])
        if stage.is_last:
            assert model.lm_head is not None
            self.ends.extend([model.norm, model.lm_head])

    def forward(self, x: Tensor) -> Tensor:
        if self.stage.is_first:
            y_BTD, _ = self.stage(None, x, None, None)
        else:
            y_BTD, _ = self.stage(x, self.tokens_BT, None, None)
        return self.model_of[0].logits(y_BTD) if self.stage.is_last else y_BTD


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, SHAPE.vocab_size, (MICROBATCHES, T), generator=generator) for _ in range(2))
    return tokens, targets


def ours(name: str) -> tuple[Transformer, Callable[[], Any]]:
    """A model and its step."""
    model = Transformer(SHAPE)
    pipeline = PipelineStep(model, SCHEDULES[name](RANKS, MICROBATCHES))
    tokens, targets = batch()
    parts = [Microbatch(*pair) for pair in zip(tokens.split(1), targets.split(1), strict=True)]
    return model, lambda: pipeline.step(parts, 1 / tokens.numel(), 0.0)


def theirs(name: str, rank: int) -> tuple[Transformer, Callable[[], Any]]:
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    model, plan = Transformer(SHAPE), SCHEDULES[name](RANKS, MICROBATCHES)
    stages = [
        pipelining.PipelineStage(PlainStage(stage, model), stage.index, plan.stages, torch.device("cpu"))
        for stage in cut(model, plan, rank)
    ]
    tokens, targets = batch()

    def loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum") / tokens.numel()

    kind = getattr(schedules, THEIRS[name])
    whole = len(stages) > 1
    schedule = kind(stages if whole else stages[0], MICROBATCHES, loss_fn=loss, scale_grads=False)
    words = (tokens,) if any(stage.is_first for stage in stages) else ()
    target = targets if any(stage.is_last for stage in stages) else None
    losses: list[Tensor] = []
    return model, lambda: schedule.step(*words, target=target, losses=losses, return_outputs=False)


def timed(model: Transformer, step: Callable[[], Any]) -> float:
    """Seconds of a step, the longest of the ranks."""
    model.zero_grad(set_to_none=True)
    dist.barrier()
    start = time.perf_counter()
    step()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def rank_main(rank: int, store: str, rounds: int, warmup: int, connection: Connection | None) -> None:
    """What a rank does: for every schedule both runtimes in turn; rank 0 sends (name, ours, theirs)."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for name in THEIRS:
        sides = {"ours": ours(name), "theirs": theirs(name, rank)}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for round_ in range(-warmup, rounds):
            for side in sorted(sides, reverse=round_ % 2 == 1):
                seconds = timed(*sides[side])
                if round_ >= 0:
                    times[side].append(seconds)
        same_gradients(sides["ours"][0], sides["theirs"][0])
        if connection is not None:
            print(f"  {name}: {min(times['ours']):.4f} s, {min(times['theirs']):.4f} s", flush=True)
            connection.send((name, times["ours"], times["theirs"]))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def same_gradients(one: Transformer, other: Transformer) -> None:
    """Both have computed the same."""
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float((a.grad - b.grad).norm()) <= 1e-5 * float(b.grad.norm()), name


def measure(rounds: int, warmup: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of a step by schedule, ours and torch's, round by round."""
    context = mp.get_context("spawn")
    found: dict[str, tuple[list[float], list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        receiving, sending = context.Pipe()
        words = (f"{folder}/store", rounds, warmup)
        processes = [
            context.Process(target=rank_main, args=(rank, *words, None if rank else sending), daemon=True)
            for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        sending.close()
        for _ in THEIRS:
            name, *times = receiving.recv()
            found[name] = (times[0], times[1])
        for process in processes:
            process.join()
    return found
