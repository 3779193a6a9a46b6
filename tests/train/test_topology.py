"""What one layout has saved, another goes on with; a model folder comes out of any of them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from soma.base.artefact import file_hash
from soma.model.hub import load_model
from soma.model.lora import merge_lora, remove_lora
from soma.train.checkpoint import torn
from soma.train.world import World
from tests.train.bounds import differences
from tests.train.parity import (  # fmt: skip
    STEPS,
    Case,
    Outcome,
    alone,
    gathered,
    make_model,
    make_trainer,
    resume_on_rank,
    save_on_rank,
)
from tests.train.pool import Pool

RANKS = 4
# (layout that saves, layout that goes on, its ranks)
MOVES: list[tuple[dict[str, Any], dict[str, Any], int, Case]] = [
    ({"dp": 4}, {"fsdp": 2, "tp": 2, "sp": True}, 4, Case(optimizer="muon")),
    ({"fsdp": 2, "tp": 2, "ep": 2}, {"dp": 2}, 2, Case(model="latent")),
    ({"dp": 2, "fsdp": 2}, {"cp": 2, "tp": 2}, 4, Case()),
    ({"fsdp": 4, "ep": 4}, {"dp": 2, "tp": 2, "ep": 2}, 4, Case(model="moe", optimizer="muon")),
    ({"fsdp": 2, "tp": 2}, {"pp": 2}, 2, Case(model="gpt2", lora="full", microbatch=4, dropout=0.4)),
]


def last_step(outcome: Outcome) -> Outcome:
    """What a run that begins with the last step has to compare with."""
    return replace(
        outcome, losses=outcome.losses[-1:], norms=outcome.norms[-1:], gradients=outcome.gradients[-1:]
    )  # fmt: skip


@pytest.mark.parametrize(("before", "after", "ranks", "case"), MOVES)
def test_another_layout_goes_on(
    pool: Pool, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], ranks: int, case: Case
) -> None:
    pool.run(save_on_rank, RANKS, before, case, str(tmp_path))
    ours = pool.run(resume_on_rank, ranks, after, case, str(tmp_path), str(tmp_path / "model"))[0]
    expected = last_step(alone(case))
    assert differences(ours, expected, "fp32") == []
    model = load_model(tmp_path / "model").state_dict()
    expected_model = merged(case, ours.weights) if case.lora else ours.weights
    assert model.keys() <= expected_model.keys()
    assert all(torch.equal(value, expected_model[name]) for name, value in model.items())


def merged(case: Case, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The plain model of weights and updates."""
    model = make_model(case, "cpu")
    model.load_state_dict(weights)
    merge_lora(model)
    remove_lora(model)
    return model.state_dict()


def test_one_process_goes_on_and_a_missing_shard_is_named(pool: Pool, tmp_path: Path) -> None:
    case = Case()
    pool.run(save_on_rank, RANKS, {"fsdp": 4}, case, str(tmp_path))
    checkpoint = tmp_path / "checkpoints" / f"step-{STEPS - 1:08d}"
    trainer = make_trainer(case, World(), tmp_path)
    trainer.resume()
    trainer.train_step()
    trainer.outcome.validation = trainer.validation_loss()
    trainer.outcome.weights = gathered(trainer.parallel, case)
    assert differences(trainer.outcome, last_step(alone(case)), "fp32") == []
    shards = sorted((checkpoint / "state").glob("*.distcp"))
    assert len(shards) == RANKS
    shards[2].unlink()
    assert torn(checkpoint) == f"state/{shards[2].name} is missing"
    assert trainer.checkpoints.newest() is None


RECIPE = """
name: tiny
data: {sources: [TEXTS], validation_fraction: 0.2}
tokenizer: {vocab_size: 320}
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
train: {steps: 6, sequence_length: 64, batch_size: 8, checkpoint_every: 2, precision: fp32, compile: false}
tracking: {enabled: false}
"""


def write_recipe(folder: Path, steps: int = 6) -> Path:
    """A recipe on generated files."""
    (folder / "texts").mkdir()
    for index in range(12):
        text = "\n".join(f"def function_{number}(x):\n    return x + {number * index}" for number in range(40))
        (folder / "texts" / f"module_{index}.py").write_text(text)
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.replace("TEXTS", str(folder / "texts")).replace("steps: 6", f"steps: {steps}"))
    return recipe


def command(recipe: Path, runs: Path, *options: str, ranks: int = 1) -> list[str]:
    """`soma train`, under torchrun for several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1"]
    soma = ["-m", "soma.cli", "train", str(recipe), "--runs", str(runs), *options]
    return [sys.executable, *(torchrun if ranks > 1 else []), *soma]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def trained(call: list[str], runs: Path) -> Path:
    """Run a command to its end; the artefact of the training stage."""
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return (runs / "tiny" / "train").resolve()


def furthest_apart(one: Path, other: Path) -> float:
    """Largest difference of a weight."""
    a, b = (load_model(path / "model").state_dict() for path in (one, other))
    return max(float((value - b[name]).abs().max()) for name, value in a.items())


@pytest.mark.parametrize("layout", ["fsdp=2", pytest.param("tp=2", marks=pytest.mark.slow)])
def test_torchrun(tmp_path: Path, layout: str) -> None:
    """`soma train` under torchrun gives the model of one process, under the same key."""
    recipe = write_recipe(tmp_path)
    one = trained(command(recipe, tmp_path / "one"), tmp_path / "one")
    options = ("--set", f"train.layout.{layout}")
    two = trained(command(recipe, tmp_path / "two", *options, ranks=2), tmp_path / "two")
    assert one.name == two.name
    assert file_hash(one / "model" / "config.json") == file_hash(two / "model" / "config.json")
    assert furthest_apart(one, two) < 1e-4
