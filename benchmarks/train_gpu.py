"""Training speed of a 1B and an 8B Llama on one GPU: tokens/s and model FLOPs utilization, ours and a plain loop's.

Every case runs in a process of its own, since two 8B models in training do not fit side by side. All sides keep bf16
weights, gradients and moments, and take random tokens. Ours rounds stochastically and recomputes as many layers as the
memory asks for; the peer is a transformers model with fused AdamW, with and without torch.compile, and, where it has
to, gradient checkpointing. MFU is 6·N + attention FLOPs a token (`soma.model.formulas`) over the dense bf16 peak that
the vendor gives; 8-bit cases are held against the same peak. Where there are several GPUs, as many cases run at a time,
each on one of its own and on its part of the CPU's cores.

    python benchmarks/train_gpu.py --json
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import Case, finish, parser
from torch import Tensor

from soma.model.config import ModelConfig
from soma.model.float8 import use_float8
from soma.model.formulas import flops_per_token
from soma.model.transformer import Transformer
from soma.train import loss
from soma.train.compute import fast_attention
from soma.train.peak import matmul_peak
from soma.train.recompute import recompute_layers
from soma.train.rounding import RoundedAdamW

SHAPES = {
    "8B": ModelConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
    ),
    "1B": ModelConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=True,
    ),
    "tiny": ModelConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    ),
}  # fmt: skip
SEQUENCES = {"8B": (2, 4096), "1B": (8, 4096), "tiny": (2, 64)}  # of a step: rows, length
PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # dense bf16, NVIDIA's data sheets
RESERVE = 10e9  # bytes left for logits, workspaces and fragmentation
BAR = 0.55  # MFU of the 8B shape, compiled bf16
OURS = {"ours eager": (False, False), "ours": (True, False), "ours 8-bit": (True, True)}  # compiled, in 8 bits
PEERS = {"transformers eager": False, "transformers compiled": True}
CASES = (*OURS, *PEERS)
CHUNK = 2048  # positions whose logits exist at a time
WARMUP, STEPS = 3, 5


def batches(shape: str, device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
    """Random tokens and targets, new ones at each call."""
    rows, length = SEQUENCES[shape]
    generator = torch.Generator(device=device).manual_seed(0)

    def draw() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(SHAPES[shape].vocab_size, (rows, length + 1), generator=generator, device=device)
        return tokens[:, :-1], tokens[:, 1:].contiguous()

    return draw


def ours(shape: str, device: torch.device, *, compiled: bool, eight: bool) -> tuple[Callable[[], float], str]:
    """A function that does one step and gives its loss, and how it keeps activations."""
    config = SHAPES[shape]
    model = Transformer(config, device="meta", dtype=torch.bfloat16).to_empty(device=device).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    if eight:
        use_float8(model)
    draw, scale = batches(shape, device), torch.ones((), device=device)
    optimizer = RoundedAdamW(model.parameters(), lr=1e-4, compiled=compiled)
    mode: bool | str = False
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] - 6 * sum(p.numel() for p in model.parameters()) - RESERVE
        mode = f"budget:{max(free, 0) / 1e9:.3f}GB"
    tokens, _ = draw()
    again = recompute_layers(model, mode, lambda: model.features(tokens))

    def chunk_loss(x_ND: Tensor, targets_N: Tensor) -> Tensor:
        return loss.cross_entropy_sum(model.logits(x_ND), targets_N)

    if compiled:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        chunk_loss = torch.compile(chunk_loss, dynamic=False)

    def step() -> float:
        tokens_BT, targets_BT = draw()
        part, size = scale / targets_BT.numel(), min(CHUNK, targets_BT.numel())
        with fast_attention(device):
            x_BTD, aux = model.features(tokens_BT)
            total = loss.backward(x_BTD, aux, targets_BT, None, chunk_loss, part, scale, size=size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(total / targets_BT.numel())

    return step, f"{again} of {config.num_hidden_layers} layers recompute"


def theirs(shape: str, device: torch.device, *, compiled: bool) -> tuple[Callable[[], float], str]:
    """The transformers model as a plain loop would train it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = SHAPES[shape]
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rope_theta", "tie_word_embeddings",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names}, use_cache=False))
    torch.set_default_dtype(torch.float32)
    recompute = shape == "8B" and torch.cuda.mem_get_info(device)[1] < 100e9
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    draw = batches(shape, device)

    def mean_loss(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = model(input_ids=tokens_BT).logits
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())

    forward = torch.compile(mean_loss) if compiled else mean_loss

    def step() -> float:
        value = forward(*draw())
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(value)

    return step, "gradient checkpointing" if recompute else "nothing is recomputed"


def measure(case: str, shape: str, device: torch.device) -> dict[str, Any]:
    """Seconds of each step after warming up, peak memory, the losses at both ends."""
    if case in PEERS:
        step, note = theirs(shape, device, compiled=PEERS[case])
    else:
        compiled, eight = OURS[case]
        step, note = ours(shape, device, compiled=compiled, eight=eight)
    began = time.perf_counter()
    first = [step() for _ in range(WARMUP)]
    warm, seconds, last = time.perf_counter() - began, [], first[-1]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        started = time.perf_counter()
        last = step()  # its loss is read: the GPU is waited for
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "seconds": seconds, "warmup": warm, "peak_gb": peak / 1e9, "first_loss": first[0], "last_loss": last,
        "note": note, "matmul_peak": matmul_peak(device, torch.bfloat16),
    }  # fmt: skip


def visible(number: int, count: int) -> dict[str, str]:
    """The environment in which a process sees one of the `count` GPUs that this one sees."""
    if count == 1:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": seen.split(",")[number] if seen else str(number)}


def run(case: str, shape: str, device: str, gpus: "queue.Queue[int]", count: int) -> dict[str, Any] | str:
    """One case in a process of its own, on one of `count` GPUs; the last line of what it said where it failed."""
    command = [sys.executable, str(Path(__file__)), "--one", case, "--shapes", shape, "--device", device]
    number = gpus.get()
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // count
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | visible(number, count),
            preexec_fn=lambda: os.sched_setaffinity(0, cores[number * share : (number + 1) * share]),
        )  # fmt: skip
    finally:
        gpus.put(number)
    if done.returncode:
        print(f"{shape} {case}: failed\n{done.stderr[-1500:]}", file=sys.stderr, flush=True)
        return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1][:200]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{shape} {case}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def cases(options: argparse.Namespace, name: str) -> tuple[list[Case], dict[str, str]]:
    """All cases of the shapes that were asked for, and those that failed."""
    bf16_peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    found, not_run = [], {}
    gpus: queue.Queue[int] = queue.Queue()
    count = max(1, torch.cuda.device_count()) if options.device == "cuda" else 1
    for number in range(count):
        gpus.put(number)
    with ThreadPoolExecutor(count) as pool:
        results = {
            (shape, case): pool.submit(run, case, shape, options.device, gpus, count)
            for shape in options.shapes for case in options.cases
        }  # fmt: skip
    for shape in options.shapes:
        rows, length = SEQUENCES[shape]
        tokens = rows * length
        speeds, notes = {}, {}
        for case in options.cases:
            one = results[shape, case].result()
            if isinstance(one, str):
                not_run[f"{shape} {case}"] = one
                continue
            speeds[case], notes[case] = [tokens / seconds for seconds in one["seconds"]], one["note"]
        middle = {case: statistics.median(values) for case, values in speeds.items()}
        for case in (case for case in OURS if case in speeds):
            for peer in (peer for peer in PEERS if peer in speeds):
                spread = (min(speeds[case]) / middle[peer], max(speeds[case]) / middle[peer])
                found.append(
                    Case(f"{shape} {case}", f"tokens/s ({notes[case]}; peer: {notes[peer]})", middle[case], peer,
                         middle[peer], middle[case] / middle[peer], spread, None, None)
                )  # fmt: skip
            if bf16_peak:
                mfus = [value * flops_per_token(SHAPES[shape], length) / bf16_peak for value in speeds[case]]
                mfu = statistics.median(mfus)
                bar = BAR if (shape, case) == ("8B", "ours") else None
                found.append(
                    Case(f"{shape} {case}", "MFU of the vendor's peak", mfu, "the bar", BAR, mfu / BAR,
                         (min(mfus) / BAR, max(mfus) / BAR), None if bar is None else 1.0,
                         None if bar is None else mfu >= bar)
                )  # fmt: skip
    return found, not_run


def main() -> None:
    command = parser("train_gpu", __doc__.splitlines()[0])
    command.add_argument("--shapes", nargs="*", default=["1B", "8B"], choices=list(SHAPES))
    command.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    command.add_argument("--device", default="cuda")
    command.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options = command.parse_args()
    device = torch.device(options.device)
    if options.one:
        print(json.dumps(measure(options.one, options.shapes[0], device)))
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found, not_run = cases(options, name)
    finish("train_gpu", options, found, packages=["transformers", "triton"], not_run=not_run)


if __name__ == "__main__":
    main()
