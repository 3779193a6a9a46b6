"""Device, precision, compilation; the matmul peak; several ranks."""

from collections.abc import Callable

import pytest
import torch

from soma.base import machine, progress
from soma.train import peak
from soma.train.compute import Compute, native_bf16, peak_memory, resolve, seed_everything
from soma.train.config import TrainConfig
from soma.train.trainer import TrainResult
from soma.train.world import World

Run = Callable[..., TrainResult]
CPU = torch.device("cpu")


class Notes(progress.Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(machine, "native_bf16", lambda: native)
    compute = resolve(TrainConfig(device="cpu"), 1.0)
    assert compute.precision == ("bf16" if native else "fp32")
    assert compute.muon_dtype == (torch.bfloat16 if native else torch.float32)
    assert native_bf16(CPU) is native


def test_autocast_is_off_in_fp32() -> None:
    x = torch.randn(4, 4)
    with Compute(CPU, "fp32", False).autocast():
        assert (x @ x).dtype == torch.float32
    with Compute(CPU, "bf16", False).autocast():
        assert (x @ x).dtype == torch.bfloat16


def test_auto_compiles_long_runs_only() -> None:
    config = TrainConfig(device="cpu", precision="fp32")
    assert not resolve(config, 1e9).compile
    assert resolve(config, 1e15).compile is (machine.compiler("c++") is not None)
    assert not resolve(config.model_copy(update={"max_seconds": 60.0}), 1e15).compile
    assert not resolve(config.model_copy(update={"compile": False}), 1e15).compile


def test_without_a_compiler_it_is_off_with_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compiler", lambda language: None)
    reporter = Notes()
    with progress.use(reporter):
        assert not resolve(TrainConfig(device="cpu", compile=True), 1.0).compile
    assert "no C++ compiler" in reporter.notes[0]
    with progress.use(reporter):
        assert not resolve(TrainConfig(device="cpu", compile="auto"), 1.0).compile
    assert len(reporter.notes) == 1  # a short run would not have been compiled: nothing to say


@pytest.mark.slow
def test_compiled_is_near_eager_and_repeatable(run: Run, small: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    small["evaluate_every"] = 4
    eager = run("a", TrainConfig(**small))
    # Switching to evaluation and back compiles nothing anew.
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    compiled, again = (run(name, TrainConfig(**small | {"compile": True})) for name in ("b", "c"))
    assert compiled.loss == pytest.approx(eager.loss, abs=1e-3)
    assert compiled.loss == again.loss


def test_peak_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "_measured", {})
    state = torch.get_rng_state()
    first = peak.matmul_peak(CPU, torch.float32)
    assert 1e9 < first < 1e14
    monkeypatch.setattr(peak, "_measure", lambda *_: pytest.fail("measured again"))
    assert peak.matmul_peak(CPU, torch.float32) == first
    assert torch.equal(state, torch.get_rng_state())


def test_seeds() -> None:
    import random

    import numpy as np

    draws = []
    for _ in range(2):
        seed_everything(5)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert draws[0] == draws[1]


def test_peak_memory_is_in_bytes() -> None:
    assert 50e6 < peak_memory() < 1e12


def test_one_process_is_the_identity() -> None:
    world, value = World(), torch.tensor(3.0)
    assert world.sum(value) is value
    assert world.agree("x") == "x"
    world.barrier()
