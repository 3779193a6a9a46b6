"""Training with `layout: cpu_offload` on one GPU: its peak memory and its speed, beside the same step without.

Llama's 1B shape with fp32 weights and AdamW, the 8B shape with bf16 weights and moments; every layer recomputes, layers
are compiled, a step has several microbatches of the same random tokens. Every case runs in a process of its own. A case
that does not fit on the GPU is written down as not run.

    python benchmarks/cpu_offload.py --json
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Case, finish, parser
from torch import Tensor
from train_gpu import SEQUENCES, SHAPES

from soma.model.transformer import Transformer
from soma.train import loss
from soma.train.config import TrainConfig
from soma.train.optim import build_optimizers
from soma.train.parallel.apply import parallelize
from soma.train.parallel.config import Layout
from soma.train.parallel.offload import offloading
from soma.train.start import fill
from soma.train.world import World

PARAMETERS = {"1B": "fp32", "8B": "bf16", "tiny": "fp32"}
ROWS = {"1B": 8, "8B": 8, "tiny": 2}  # of 4,096 tokens in a microbatch: what travels does so once for all of them
MICROBATCHES, WARMUP, STEPS = 2, 1, 2


def weights(model: Transformer) -> Any:
    """Something to start from, made in no time: one stretch of random numbers over and over."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    some = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02

    def fetch(name: str) -> Tensor:
        if "norm" in name:
            return torch.ones(shapes[name])
        count = math.prod(shapes[name])
        return some.repeat(-(-count // len(some)))[:count].view(shapes[name])

    return fetch


def measure(shape: str, offload: bool, device: torch.device) -> dict[str, Any]:
    """Seconds of each step, those of its update, the GPU's peak memory in bytes."""
    layout = Layout(cpu_offload=offload)
    config = TrainConfig(parameters=PARAMETERS[shape], learning_rate=1e-4, layout=layout)  # type: ignore[arg-type]
    dtype = torch.bfloat16 if config.parameters == "bf16" else torch.float32
    with offloading(layout, device.type):
        world = World.join(layout, device.type)
        model = Transformer(SHAPES[shape], device="meta", dtype=dtype)
        parallel = parallelize(
            model, world.mesh, activation_checkpointing=True, compile_layers=True,
            fill=partial(fill, model, weights(model), device, offload),
        )  # fmt: skip
        if not offload:
            for layer in model.layers:  # alone, the objective compiles the model; here layer by layer on both sides
                layer.forward = torch.compile(layer.forward, dynamic=False)
        (optimizer,) = build_optimizers(model.train(), config, torch.bfloat16, compiled=True)
        parameters, scale = list(model.parameters()), torch.ones((), device=device)
        generator = torch.Generator(device=device).manual_seed(0)
        tokens_BT = torch.randint(
            SHAPES[shape].vocab_size, (ROWS[shape], SEQUENCES[shape][1]), generator=generator, device=device
        )  # fmt: skip
        targets_BT = tokens_BT.roll(-1, 1)

        def chunk_loss(x_ND: Tensor, targets_N: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                logits_NV = model.logits(x_ND)
            return loss.cross_entropy_sum(logits_NV, targets_N)

        def step() -> tuple[float, float, float]:
            started = time.perf_counter()
            for number in range(1, MICROBATCHES + 1):
                parallel.begin(last=number == MICROBATCHES)
                with torch.autocast(device.type, torch.bfloat16):
                    x_BTD, aux = model.features(tokens_BT)
                part = scale / (targets_BT.numel() * MICROBATCHES)
                total = loss.backward(
                    x_BTD, aux, targets_BT, None, chunk_loss, part, part, size=min(2048, targets_BT.numel())
                )  # fmt: skip
            parallel.finish()
            value = float(total / targets_BT.numel())
            parallel.clip(parameters, 1.0)
            before = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            return time.perf_counter() - started, time.perf_counter() - before, value

        first = [step() for _ in range(WARMUP)]
        torch.cuda.reset_peak_memory_stats()
        seconds = [step() for _ in range(STEPS)]
        return {
            "seconds": [each[0] for each in seconds], "update": statistics.median(each[1] for each in seconds),
            "peak": torch.cuda.max_memory_allocated(), "losses": [each[2] for each in first + seconds],
        }  # fmt: skip


def run(shape: str, offload: bool) -> dict[str, Any] | str:
    """One case in a process of its own; the last line of what it said where it failed."""
    command = [sys.executable, str(Path(__file__)), "--one", "offload" if offload else "gpu", "--shapes", shape]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else f"exit code {done.returncode}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{shape} {'offload' if offload else 'gpu'}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def cases(options: argparse.Namespace) -> tuple[list[Case], dict[str, str]]:
    """Memory and speed of each shape, and what did not run."""
    found, not_run = [], {}
    for shape in options.shapes:
        rows, length = ROWS[shape], SEQUENCES[shape][1]
        both = {name: run(shape, name == "offload") for name in ("offload", "gpu")}
        missing = {f"{shape} {name}": result for name, result in both.items() if isinstance(result, str)}
        not_run |= missing
        ours, theirs = both["offload"], both["gpu"]
        if isinstance(ours, str):
            continue
        name = f"{shape}, {PARAMETERS[shape]} weights, {MICROBATCHES} microbatches of {rows} x {length}"
        tokens = rows * length * MICROBATCHES
        for unit, mine, other in (
            ("GB of GPU memory", ours["peak"] / 1e9, float("nan") if missing else theirs["peak"] / 1e9),
            ("tokens/s", tokens / statistics.median(ours["seconds"]),
             float("nan") if missing else tokens / statistics.median(theirs["seconds"])),
            ("seconds of a step's update", ours["update"], float("nan") if missing else theirs["update"]),
        ):  # fmt: skip
            ratio = mine / other if unit == "tokens/s" else other / mine
            found.append(
                Case(f"{name}, {unit}", unit, mine, "without cpu_offload", other, ratio, (ratio, ratio), None, None)
            )
    return found, not_run


def main() -> None:
    command = parser("cpu_offload", __doc__.splitlines()[0])
    command.add_argument("--shapes", nargs="*", default=["1B", "8B"], choices=list(SHAPES))
    command.add_argument("--one", choices=["offload", "gpu"], help=argparse.SUPPRESS)
    options = command.parse_args()
    if options.one:
        print(json.dumps(measure(options.shapes[0], options.one == "offload", torch.device("cuda"))))
        return
    found, not_run = cases(options)
    finish("cpu_offload", options, found, packages=["triton"], not_run=not_run)


if __name__ == "__main__":
    main()
