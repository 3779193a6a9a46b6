"""The `layout:` block: sizes settled, and impossible ones answered with the arithmetic and what works. No torch."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.train.parallel.config import Layout


def model(**changes: int) -> ModelConfig:
    shape = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6}
    return ModelConfig(**shape | {"num_key_value_heads": 2, "intermediate_size": 64} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "ranks", "expected"),
    [
        ({}, 8, {"dp": 8}),
        ({"tp": 2}, 8, {"dp": 4, "tp": 2}),
        ({"fsdp": -1, "tp": 2}, 8, {"dp": 1, "fsdp": 4, "tp": 2}),
        ({"dp": 2, "fsdp": -1, "pp": 2}, 8, {"dp": 2, "fsdp": 2, "pp": 2}),
        ({"tp": -1, "sp": True}, 1, {"dp": 1, "tp": 1, "sp": False}),
        ({"cp": 2, "ep": 4}, 8, {"dp": 4, "cp": 2, "ep": 4}),
    ],
)
def test_rest(given: dict[str, int], ranks: int, expected: dict[str, int]) -> None:
    layout = Layout(**given).resolve(ranks)  # type: ignore[arg-type]
    assert {name: getattr(layout, name) for name in expected} == expected
    assert layout.world == ranks


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        ({"dp": 2, "tp": 3}, 8, "dp 2 × tp 3 = 6 ranks, and there are 8: take tp 4"),
        ({"fsdp": -1, "tp": 3}, 8, r"8 ranks / \(tp 3 = 3\) = 2.67: take tp 2"),
        ({"tp": 2}, 1, r"1 ranks / \(tp 2 = 2\) = 0.5: take tp 1, or start 2 ranks with torchrun"),
        ({"dp": 3, "tp": 3}, 8, "dp 3 × tp 3 = 9 ranks, and there are 8: start 9 ranks"),
        ({"ep": 3}, 4, r"ep 3 does not divide dp × fsdp × cp = 4 × 1 × 1 = 4 \(1.33\): take ep 2"),
    ],
)
def test_impossible(given: dict[str, int], ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Layout(**given).resolve(ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dp": -1, "tp": -1}, "dp and tp are all -1"),
        ({"tp": 0}, "tp 0: a size is 1 or more"),
        ({"ep": -1}, "ep -1: experts divide"),
        ({"sp": True}, "sp cuts the sequence over the tp ranks and tp is 1"),
        ({"zero": 4}, "1, 2 or 3"),
        ({"schedule": "zbv"}, "schedule 'zbv': take zb-v"),
        ({"pp": 2, "stage_layers": [2, 0]}, "greater than 0"),
        ({"microbatches": 4}, "microbatches is of a pipeline, and pp is 1: set pp, or microbatch_size in place"),
        ({"stage_layers": [2, 2]}, "stage_layers is of a pipeline, and pp is 1: set pp, or leave stage_layers out"),
    ],
)
def test_nonsense(given: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Layout(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "shape", "message"),
    [
        (
            {"tp": 4},
            {},
            r"tp 4 does not divide num_attention_heads 6 \(1.5 each\): take tp 3 on .* 3 ranks, or tp 2$",
        ),
        ({"ep": 2}, {}, "the model has no experts"),
        ({"dp": 4, "ep": 4}, {"num_experts": 6}, r"ep 4 does not divide num_experts 6 \(1.5 each\): take ep 2"),
        (
            {"pp": 3, "virtual_stages": 2},
            {},
            "pp 3 × virtual_stages 2 = 6 stages for 4 layers, .* take pp 2 on a .*, or pp 1",
        ),
        ({"pp": 8}, {}, "pp 8 for 4 layers, and every stage needs one: take pp 4"),
    ],
)
def test_model(given: dict[str, int], shape: dict[str, int], message: str) -> None:
    layout = Layout(**{"dp": 1 if "ep" not in given else 2} | given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        layout.check_model(model(**shape))


@pytest.mark.parametrize(
    ("given", "batch", "message"),
    [
        ({"dp": 2, "fsdp": 2}, (6, None), "microbatch_size × dp × fsdp = 1 × 2 × 2 = 4: take 8"),
        ({"dp": 2}, (12, 4), "microbatch_size × dp × fsdp = 4 × 2 × 1 = 8: take 16"),
    ],
)
def test_batch(given: dict[str, int], batch: tuple[int, int | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Layout(**given).check_batch(*batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "length"), [({}, 30), ({"cp": 2}, 32), ({"tp": 4, "sp": True}, 32), ({"cp": 3, "tp": 2, "sp": True}, 36)]
)
def test_padding(given: dict[str, int], length: int) -> None:
    assert Layout(**{"dp": 1} | given).padded_length(30) == length  # type: ignore[arg-type]


def test_loads_no_torch() -> None:
    code = "import sys, soma.train.parallel.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
