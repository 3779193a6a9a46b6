"""Our pipeline executor and `torch.distributed.pipelining`'s on the same stages: two ranks, one pinned thread or one
GPU each.
"""

import gc
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
from soma.train.start import fill

RANKS, MICROBATCHES = 2, 8
# Small on CPUs, so that what is not computing shows; large enough for a GPU to have more to do than its launches take.
SHAPES = {
    "cpu": ModelConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "cuda": ModelConfig(
        vocab_size=8192, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16,
        max_position_embeddings=4096,
    ),
}  # fmt: skip
LENGTHS = {"cpu": 64, "cuda": 4096}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Largest difference of a gradient, to its norm: sums in another order; in bf16 they are rounded after every microbatch.
BOUNDS = {"cpu": 1e-5, "cuda": 5e-2}
THEIRS = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zb-v": "ScheduleZBVZeroBubble",
    "dualpipe-v": "ScheduleDualPipeV",
}
if torch.__version__ < "2.12":  # its runtime sends from a rank to itself where a schedule turns round
    del THEIRS["zb-v"], THEIRS["dualpipe-v"]


class PlainStage(nn.Module):
    """One of our stages as torch's runtime wants it: a tensor in, a tensor out."""

    def __init__(self, stage: Stage, model: Transformer) -> None:
        super().__init__()
        self.stage, self.model_of = stage, [model]
        device = next(model.parameters()).device
        self.tokens_BT = torch.zeros(1, LENGTHS[device.type], dtype=torch.int64, device=device)
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


def make_model(config: ModelConfig, device: str, dtype: torch.dtype) -> Transformer:
    """A model, the same on every rank."""
    if device == "cpu":
        return Transformer(config, device, dtype)
    model = Transformer(config, device="meta", dtype=dtype)
    fill_at_random(model, torch.device("cuda", torch.cuda.current_device()))
    return model


def fill_at_random(model: Transformer, device: torch.device) -> None:
    """Give a model on the meta device weights that are drawn where they lie: on a CPU large ones take seconds."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    generator = torch.Generator(device).manual_seed(0)

    def draw(name: str) -> Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], device=device)
        return 0.02 * torch.randn(shapes[name], generator=generator, device=device)

    fill(model, draw, device)


def batch(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (MICROBATCHES, LENGTHS[device])
    tokens, targets = (torch.randint(0, SHAPES[device].vocab_size, size, generator=generator) for _ in range(2))
    return tokens.to(device), targets.to(device)


def ours(name: str, device: str) -> tuple[Transformer, Callable[[], Any]]:
    """A model and its step."""
    model = make_model(SHAPES[device], device, DTYPES[device])
    pipeline = PipelineStep(model, SCHEDULES[name](RANKS, MICROBATCHES))
    tokens, targets = batch(device)
    parts = [Microbatch(*pair) for pair in zip(tokens.split(1), targets.split(1), strict=True)]
    return model, lambda: pipeline.step(parts, 1 / tokens.numel(), 0.0)


def theirs(name: str, rank: int, device: str) -> tuple[Transformer, Callable[[], Any]]:
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    model, plan = make_model(SHAPES[device], device, DTYPES[device]), SCHEDULES[name](RANKS, MICROBATCHES)
    place = next(model.parameters()).device
    stages = [
        pipelining.PipelineStage(PlainStage(stage, model), stage.index, plan.stages, place)
        for stage in cut(model, plan, rank)
    ]
    tokens, targets = batch(device)

    def loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        logits_NV = logits_BTV.flatten(0, 1).float()
        return F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum") / tokens.numel()

    kind = getattr(schedules, THEIRS[name])
    whole = len(stages) > 1
    schedule = kind(stages if whole else stages[0], MICROBATCHES, loss_fn=loss, scale_grads=False)
    words = (tokens,) if any(stage.is_first for stage in stages) else ()
    target = targets if any(stage.is_last for stage in stages) else None

    def step() -> None:
        losses: list[Tensor] = []
        schedule.step(*words, target=target, losses=losses, return_outputs=False)
        total = torch.stack(losses).sum() if losses else torch.zeros((), device=place)
        dist.all_reduce(total)  # every rank has the loss, as from our step

    return model, step


def timed(model: Transformer, step: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds of a step: the longest of the ranks on the clock, and the sum of the ranks of their processors."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    wall, processor = (
        torch.tensor(seconds, device=device) for seconds in (time.perf_counter() - start, time.process_time() - busy)
    )
    dist.all_reduce(wall, op=dist.ReduceOp.MAX)
    dist.all_reduce(processor)
    return float(wall), float(processor)


def join(rank: int, store: str, device: str) -> None:
    """One of the ranks: a pinned thread, or a GPU."""
    cores = sorted(os.sched_getaffinity(0))
    if device == "cuda":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # as `soma.train.parallel.ranks`
        torch.cuda.set_device(rank)
    else:
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=RANKS)


def rank_main(rank: int, store: str, rounds: int, warmup: int, device: str, connection: Connection | None) -> None:
    """What a rank does: for every schedule both runtimes in turn; rank 0 sends (name, times)."""
    join(rank, store, device)
    for name in THEIRS:
        sides = {"ours": ours(name, device), "theirs": theirs(name, rank, device)}
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for round_ in range(-warmup, rounds):
            for side in sorted(sides, reverse=round_ % 2 == 1):
                seconds = timed(*sides[side], device)
                if round_ >= 0:
                    times[side].append(seconds)
        same_gradients(sides["ours"][0], sides["theirs"][0], BOUNDS[device])
        if connection is not None:
            print(f"  {name}: {min(times['ours'])[0]:.4f} s, {min(times['theirs'])[0]:.4f} s", flush=True)
            connection.send((name, times))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def same_gradients(one: Transformer, other: Transformer, bound: float) -> None:
    """Both have computed the same."""
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        apart = float((a.grad - b.grad).float().norm())
        assert apart <= bound * float(b.grad.float().norm()), (name, apart)


def measure(rounds: int, warmup: int, device: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """What `timed` says, by schedule and side ("ours", "theirs"), round by round."""
    context = mp.get_context("spawn")
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        receiving, sending = context.Pipe()
        words = (f"{folder}/store", rounds, warmup, device)
        processes = [
            context.Process(target=rank_main, args=(rank, *words, None if rank else sending), daemon=True)
            for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        sending.close()
        for _ in THEIRS:
            name, times = receiving.recv()
            found[name] = times
        for process in processes:
            process.join()
    return found
