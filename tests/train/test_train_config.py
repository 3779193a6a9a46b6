"""Settings of the training stages, and learning-rate schedules."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from soma.train.config import PreferenceConfig, TrainConfig, TuneConfig, part_steps
from soma.train.schedule import cosine, learning_rate, wsd


def test_no_torch() -> None:
    rooms = "soma.train.config, soma.train.schedule, soma.train.guard, soma.train.tracking"
    code = f"import sys, {rooms}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_field_is_described() -> None:
    for config in (TrainConfig, TuneConfig, PreferenceConfig):
        for name, field in config.model_fields.items():
            assert field.description, f"{config.__name__}.{name}"


def test_unknown_key() -> None:
    with pytest.raises(ValidationError, match="learning_rat"):
        TrainConfig(learning_rat=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 10, "microbatch_size": 4}, r"10 / 4 = 2\.5 microbatches\): take 8 or 12"),
        ({"batch_size": 3, "microbatch_size": 4}, r"take 4"),
        ({"steps": 10, "tokens": 1000}, "steps and tokens all say how long"),
        ({"parameters": "bf16", "optimizer": "muon"}, "parameters bf16 and optimizer muon exclude each other"),
        ({"parameters": "bf16", "precision": "fp16"}, "parameters bf16 and precision fp16 exclude each other"),
        ({"early_stop": 2}, "evaluate_every is 0"),
        ({"early_stop": 2, "evaluate_every": 5, "evaluate_batches": 0}, "evaluate_batches is 0"),
        ({"steps": 10, "warmup": 11}, "warmup 11 steps is more than the 10 steps"),
        ({"steps": 10, "warmup": 6, "decay": 5, "schedule": "wsd"}, r"warmup 6 \+ decay 5 = 11 steps is more than"),
        ({"device": "gpu"}, "device"),
    ],
)
def test_mistakes_are_answered_with_the_arithmetic(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**fields)


def test_total_steps() -> None:
    assert TrainConfig(steps=7).total_steps(100) == 7
    assert TrainConfig(tokens=100_000, batch_size=16, sequence_length=512).total_steps(1) == 13
    assert TrainConfig(epochs=2.5).total_steps(10) == 25
    assert TrainConfig().total_steps(10.2) == 10


def test_shares_and_steps() -> None:
    assert part_steps(0.02, 500) == 10
    assert part_steps(30, 500) == 30
    assert part_steps(1, 500) == 1


def test_cosine_worked_numbers() -> None:
    assert cosine(0, 100, 10) == pytest.approx(0.1)
    assert cosine(9, 100, 10) == pytest.approx(1.0)
    assert cosine(55, 100, 10) == pytest.approx(0.5)
    assert cosine(55, 100, 10, minimum=0.1) == pytest.approx(0.55)
    assert cosine(99, 100, 0) > 0


def test_wsd_worked_numbers() -> None:
    assert wsd(4, 100, 10, 20) == pytest.approx(0.5)
    assert wsd(50, 100, 10, 20) == 1.0
    assert wsd(80, 100, 10, 20) == 1.0
    assert wsd(85, 100, 10, 20) == pytest.approx(0.5)
    assert 0 < wsd(99, 100, 10, 20) < 0.03
    assert wsd(85, 100, 10, 20, minimum=0.2) == pytest.approx(0.6)


def test_schedules_never_rise_after_warmup() -> None:
    for kind in ("cosine", "wsd"):
        config = TrainConfig(steps=50, schedule=kind, warmup=5, decay=0.3)
        rates = [learning_rate(config, step, 50) for step in range(50)]
        assert rates[4] == pytest.approx(config.learning_rate)
        assert rates[:5] == sorted(rates[:5])
        assert rates[5:] == sorted(rates[5:], reverse=True)
