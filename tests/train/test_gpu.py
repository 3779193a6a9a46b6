"""The same loop on a GPU. Skipped where there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soma.train import loop
from soma.train.config import PreferenceConfig, TrainConfig
from soma.train.trainer import TrainResult

Run = Callable[..., TrainResult]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture
def gpu(small: dict) -> dict:
    """Settings of a small run on the GPU."""
    return small | {"device": "auto"}


def test_fp32_is_near_the_cpu(run: Run, small: dict, gpu: dict) -> None:
    assert run("a", TrainConfig(**gpu)).loss == pytest.approx(run("b", TrainConfig(**small)).loss, abs=1e-3)


@pytest.mark.parametrize("precision", ["auto", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_low_precision_learns(run: Run, gpu: dict, precision: str, optimizer: str) -> None:
    result = run("a", TrainConfig(**gpu | {"precision": precision, "optimizer": optimizer, "steps": 60}))
    assert result.loss < 3.5
    assert 0 < result.mfu < 1


def test_compiled_is_near_eager(run: Run, gpu: dict) -> None:
    eager, compiled = (run(str(on), TrainConfig(**gpu | {"compile": on})) for on in (False, True))
    assert compiled.loss == pytest.approx(eager.loss, abs=1e-3)


def test_resuming(run: Run, gpu: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(**gpu | {"checkpoint_every": 2, "precision": "bf16", "sample_prompts": ["a"]})
    undisturbed = run("a", config)
    true_step = loop.Trainer.train_step

    def step(trainer: loop.Trainer) -> None:
        assert trainer.at.done < 5
        true_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", step)
        with pytest.raises(AssertionError):
            run("b", config)
    assert run("b", config).loss == pytest.approx(undisturbed.loss, abs=1e-3)


def test_preferences(run: Run, gpu: dict, pairs: Path) -> None:
    base = run("base", TrainConfig(**gpu))
    config = PreferenceConfig(**gpu | {"steps": 50, "sequence_length": 64, "learning_rate": 1e-3})
    assert run("dpo", config, tokens=pairs, model=base.model).loss < 0.3
