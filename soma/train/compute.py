"""How a run computes on this machine: device, precision, compilation, seeds."""

import importlib.util
import random
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from soma.base import machine, progress
from soma.base.errors import UserError
from soma.train.config import TrainConfig

# `compile: auto`: compiling a small Llama's training step took 54 s (one busy CPU thread) and made it 1.13 (4.7M
# parameters) to 1.32 (10M) times as fast; taken as 50 s and 1.2, the eager run must last more than
# 50 / (1 - 1/1.2) = 300 s. The eager speed is taken from these nominal rates (measured: 91e9 in bf16) and not from a
# clock, so that two runs of one recipe decide alike.
COMPILE_PAYS_SECONDS = 300.0
NOMINAL_FLOPS = {("cpu", "bf16"): 90e9, ("cpu", "fp32"): 45e9, ("cpu", "fp16"): 45e9}  # per CPU thread
NOMINAL_GPU_FLOPS = 100e12

ATTENTION = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """How a run computes: resolved, nothing is "auto" any more."""

    device: torch.device
    precision: str
    compile: bool

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products."""
        return DTYPES[self.precision]

    @property
    def muon_dtype(self) -> torch.dtype:
        """Dtype of Muon's iteration: bf16 where it is native."""
        return torch.bfloat16 if native_bf16(self.device) else torch.float32

    def autocast(self) -> torch.autocast:
        """The context of forward passes; parameters stay fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.precision != "fp32")


@contextmanager
def fast_attention(device: torch.device) -> Iterator[None]:
    """Within it, plain causal attention asks cuDNN first on GPUs from Hopper on, in all threads: autograd's too, and so
    recomputation. There it outruns FlashAttention 2, which torch takes first (`docs/lab.md`)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        yield
        return
    with sdpa_kernel(ATTENTION, set_priority=True):
        yield


def resolve(config: TrainConfig, flops: float) -> Compute:
    """Settle device, precision and compilation for a run of `flops` floating-point operations.

    Raises UserError where a GPU or a precision is asked for that is not there.
    """
    device = resolve_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if native_bf16(device) else "fp32"
    return Compute(device, precision, resolve_compile(config, device, precision, flops))


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` as a device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device: {name} was asked for, but torch sees {torch.cuda.device_count()} GPUs: use device: auto, or "
            "install a build of torch for your GPU"
        )
    return device


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 by itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return machine.native_bf16()


def resolve_compile(config: TrainConfig, device: torch.device, precision: str, flops: float) -> bool:
    """Whether to compile; without a compiler it is off, with a notice if it was asked for or would have paid."""
    if config.compile is False:
        return False
    if config.compile == "auto":
        rate = NOMINAL_GPU_FLOPS if device.type == "cuda" else torch.get_num_threads() * NOMINAL_FLOPS["cpu", precision]
        seconds = min(flops / rate, config.max_seconds or float("inf"))
        if seconds < COMPILE_PAYS_SECONDS:
            return False
    missing = missing_for_compile(device)
    if missing:
        progress.current().note(f"torch.compile is off: {missing}; training runs eagerly, some 1.2 times slower")
    return not missing


def missing_for_compile(device: torch.device) -> str | None:
    """What torch.compile lacks here, None if nothing."""
    compiler = machine.compiler("c++")
    if compiler is None:
        return "no C++ compiler was found (install g++ or clang++, or set CXX)"
    if not compiler.works:
        return f"the C++ compiler {compiler.path} does not work ({compiler.error})"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def peak_memory() -> int:
    """Most bytes of RAM that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
