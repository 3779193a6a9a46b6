"""How many tokens the cache can hold: the largest step is run once, and the cache gets a share of what that leaves.

Shape letters: S sequences, R rows of logits, V vocabulary.
"""

import logging
from typing import Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from soma.base.machine import PeakMemory, memory_available
from soma.engine.batch import Batch, make_batch
from soma.engine.paged import PagedCache
from soma.engine.runner import Runner
from soma.model.transformer import Transformer

GPU_SHARE = 0.9  # of a GPU's memory, for weights, the largest step and the cache together
CPU_SHARE = 0.25  # of the memory that is free beside the largest step: a machine has other things to do

log = logging.getLogger("soma.engine")


def fitting_tokens(
    model: Transformer, block_size: int, step_tokens: int, max_running: int, *, backend: str = "auto",
    gpu_memory_utilization: float = GPU_SHARE, share: int = 1, cache_dtype: torch.dtype | None = None,
) -> int:  # fmt: skip
    """Tokens that the cache of one of `share` engines for this model may have; 0 or less if there is no room at all."""
    dtype = cache_dtype or model.dtype
    token_bytes = PagedCache.block_bytes(model.config, block_size, dtype) / block_size
    batch = largest_step(block_size, step_tokens, max_running, model.device)
    with torch.inference_mode():
        cache = PagedCache(model.config, batch.longest // block_size + 1, block_size, dtype, model.device)
        runner = Runner(model, cache, backend=backend)
        return int(room(runner, batch, gpu_memory_utilization) / share / token_bytes)


class Measurable(Protocol):
    """What runs steps over a cache: a `Runner`, or one of several ranks."""

    cache: PagedCache

    def step(self, batch: Batch) -> Tensor: ...


def room(runner: Measurable, batch: Batch, gpu_memory_utilization: float) -> float:
    """Bytes that a cache may have beside the step `batch`."""
    if batch.tokens_T.device.type == "cuda":
        return _gpu_room(runner, batch, gpu_memory_utilization)
    return _cpu_room(runner, batch)


def largest_step(block_size: int, step_tokens: int, max_running: int, device: torch.device) -> Batch:
    """A step of `step_tokens` tokens of `max_running` sequences, each with a row of logits, all in the same blocks."""
    sequences = min(max_running, step_tokens)
    counts = [step_tokens // sequences + (s < step_tokens % sequences) for s in range(sequences)]
    table = np.arange(-(-counts[0] // block_size), dtype=np.int32)
    tokens = ([0] * count for count in counts)
    rows = np.cumsum(counts, dtype=np.int64) - 1
    return make_batch(tokens, [0] * sequences, counts, [table] * sequences, rows, block_size, device)


def run_largest(runner: Measurable, batch: Batch) -> None:
    """The step and what a sampler makes of its logits."""
    logits_RV = runner.step(batch).float()
    torch.softmax(logits_RV, -1).sum()


def _gpu_room(runner: Measurable, batch: Batch, utilization: float) -> float:
    device = runner.cache.keys[0].device
    run_largest(runner, batch)  # compiles, tunes and makes workspaces, which stay
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_largest(runner, batch)
    torch.cuda.synchronize(device)
    step = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    room = free - (1 - utilization) * total - step
    log.info("a step takes %.2f GiB, the cache gets %.2f GiB", step / 2**30, room / 2**30)
    return room


def _cpu_room(runner: Measurable, batch: Batch) -> float:
    before = psutil.Process().memory_info().rss
    with PeakMemory(interval=0.01) as peak:
        run_largest(runner, batch)
    # What the step took may be given back or not; either way it is needed again.
    step = peak.bytes - before
    return CPU_SHARE * (memory_available() - step)
