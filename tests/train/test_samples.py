"""Samples during training: under every layout the text of one process."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from soma.train.parallel.config import Layout
from soma.train.samples import continue_texts
from soma.train.world import World
from tests.train.parity import Case, Recording, make_trainer
from tests.train.pool import Pool, device

PROMPTS = ["a", "some longer text", "and one of the longest that there are, so that little is left"]
LAYOUTS: list[Any] = [
    ({"fsdp": 4}, "dense"),
    ({"fsdp": 2, "ep": 4, "dp": 2}, "moe"),
    ({"tp": 4}, "gpt2"),
    pytest.param({"fsdp": 2, "tp": 2, "sp": True}, "latent", marks=pytest.mark.parallel),
    ({"cp": 2, "tp": 2, "sp": True}, "moe"),
    pytest.param({"fsdp": 2, "cp": 2}, "gpt2", marks=pytest.mark.parallel),
    ({"pp": 2, "tp": 2, "sp": True}, "moe"),
    pytest.param({"pp": 2, "cp": 2, "schedule": "zb-h1"}, "latent", marks=pytest.mark.parallel),
    ({"pp": 2, "fsdp": 2, "schedule": "zb-v"}, "dense4"),
    ({"pp": 2, "fsdp": 2, "zero": 1, "schedule": "dualpipe"}, "moe4"),
]


class Letters:
    """A tokenizer of 96 letters, of which one ends a text."""

    eos_ids = (7,)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 96 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return ",".join(map(str, ids))


def sample(trainer: Recording, temperature: float = 0.0) -> list[str]:
    tokenizer: Any = Letters()
    trainer.model.eval()
    return continue_texts(trainer.parallel, tokenizer, PROMPTS, 9, temperature, 3, device())


def draw(world: World, model: str, steps: int) -> dict[str, list[str]]:
    """Samples of a model, before and after it has trained."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Case(model, microbatch=2), world, Path(folder))
        found = {"greedy": sample(trainer), "warm": sample(trainer, 0.7)}
        trainer.model.train()
        for _ in range(steps):
            trainer.train_step()
        return found | {"trained": sample(trainer)}


def draw_on_rank(rank: int, world_size: int, layout: dict[str, Any], model: str) -> dict[str, list[str]]:
    return draw(World.join(Layout(**layout), device().type), model, 1)


@pytest.mark.parametrize(("layout", "model"), LAYOUTS, ids=lambda value: str(value))
def test_samples_do_not_depend_on_the_layout(pool: Pool, layout: dict[str, Any], model: str) -> None:
    expected = draw(World(), model, 1)
    assert len(set(expected["greedy"])) == 3
    assert len(expected["greedy"][2].split(",")) <= 64 - len(PROMPTS[2])  # the positions end
    for found in pool.run(draw_on_rank, 4, layout, model):
        assert found == expected, json.dumps({"found": found, "expected": expected}, indent=1)
