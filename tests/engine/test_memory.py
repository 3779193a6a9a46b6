"""The cache's size: what the largest step leaves, on a CPU measured, on a GPU by arithmetic over measured figures."""

from collections.abc import Callable

import pytest
import torch
from family_models import make

from soma.engine import memory
from soma.engine.engine import Engine
from soma.engine.memory import CPU_SHARE, fitting_tokens, largest_step
from soma.engine.paged import FP8, PagedCache
from soma.engine.runner import Runner


def test_the_largest_step() -> None:
    """All tokens that a step may have, spread over all requests that may run, each with a row of logits."""
    batch = largest_step(16, 103, 10, torch.device("cpu"))
    assert (batch.num_tokens, batch.num_sequences, batch.logit_rows_R.numel()) == (103, 10, 10)
    assert batch.logit_rows_R.tolist() == [11 * (s + 1) - 1 if s < 3 else 33 + 10 * (s - 2) - 1 for s in range(10)]
    assert batch.longest == 11


def test_a_cpu_cache_gets_a_share_of_what_the_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes 256 MiB more takes its share from the cache."""
    model = make("llama")
    token_bytes = PagedCache.block_bytes(model.config, 16, torch.float32) / 16
    monkeypatch.setattr(memory, "memory_available", lambda: 4 << 30)
    usual = fitting_tokens(model, 16, 64, 4)
    assert 0.9 < usual * token_bytes / (CPU_SHARE * (4 << 30)) <= 1.0
    step = Runner.step

    def hungry(runner: Runner, batch) -> torch.Tensor:
        memory_taken.append(torch.ones(64 << 20))
        return step(runner, batch)

    memory_taken: list[torch.Tensor] = []
    monkeypatch.setattr(Runner, "step", hungry)
    less = usual - fitting_tokens(model, 16, 64, 4)
    assert 0.8 < less * token_bytes / (CPU_SHARE * (256 << 20)) < 1.4


def test_smaller_numbers_give_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    monkeypatch.setattr(memory, "memory_available", lambda: 4 << 30)
    full, stored = fitting_tokens(model, 16, 64, 4), fitting_tokens(model, 16, 64, 4, cache_dtype=FP8)
    assert 3.5 < stored / full < 4.5
    assert 1.8 < full / fitting_tokens(model, 16, 64, 4, share=2) < 2.2


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GiB, of which 60 are free after the largest step, whose peak was 5: 90 % leave 60 - 8 - 5."""
    gib = 1 << 30
    monkeypatch.setattr(memory, "run_largest", lambda runner, batch: None)
    for name, value in {
        "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "memory_allocated": 15 * gib,
        "max_memory_allocated": 20 * gib, "mem_get_info": (60 * gib, 80 * gib),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *words, value=value: value)
    model = make("llama")
    runner = Runner(model, PagedCache(model.config, 4, 16))
    batch = largest_step(16, 32, 4, torch.device("cpu"))
    assert memory._gpu_room(runner, batch, 0.9) == pytest.approx(47 * gib)


def test_an_engine_asks_for_no_more_than_it_can_use(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(cache_tokens=None, max_length=100, max_running=3)
    assert engine.pool.num_blocks == 3 * 101 // 16
