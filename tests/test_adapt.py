"""`soma adapt`: what data is, its rows tell; the recipe follows."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import make_model

from soma.adapt import adapt_recipe, data_kind
from soma.base.errors import UserError
from soma.evaluate.config import EvaluateConfig
from soma.evaluate.tuned import pair_figures
from soma.run import run

ROWS = {
    "instruct": [{"instruction": f"say {n}", "output": "yes"} for n in range(4)],
    "preference": [{"prompt": f"say {n}", "chosen": "a", "rejected": "b"} for n in range(4)],
    "text": [{"text": f"some text number {n} that is long enough"} for n in range(4)],
}
BLOCKS = {
    "instruct": ("instruct", "tune", "evaluate"), "preference": ("preferences", "prefer", "evaluate"),
    "text": ("data", "train", "evaluate")
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_rows_tell_what_is_done(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    assert data_kind(str(path)) == kind
    recipe = adapt_recipe("mine", "some/model", str(path), ["seed=3"])
    there = {name for name in ("data", "instruct", "preferences", "train", "tune", "prefer", "evaluate")
             if getattr(recipe, name) is not None}  # fmt: skip
    assert there == set(BLOCKS[kind])
    assert (recipe.base, recipe.seed, recipe.name) == ("some/model", 3, "mine")


def test_a_folder_of_text_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A note\n")
    assert data_kind(str(tmp_path)) == "text"


def test_overrides_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A note\n")
    with pytest.raises(UserError, match="did you mean `steps`"):
        adapt_recipe("mine", "some/model", str(tmp_path), ["train.stepz=3"])


@pytest.mark.parametrize("kind", ["instruct", "preference"])
def test_adapting_ends_with_scores(kind: str, tmp_path: Path) -> None:
    """From rows to scores of held-out answers: what the rows ask for has become likelier."""
    model = make_model(tmp_path / "start", initializer_range=0.02)
    rows = {
        "instruct": [{"instruction": f"say {n}", "output": "hello world"} for n in range(60)],
        "preference": [{"prompt": f"say {n}", "chosen": "hello", "rejected": "dog"} for n in range(60)],
    }[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    block, data, stage = {
        "instruct": ("tune", "instruct", "tune_scores"), "preference": ("prefer", "preferences", "prefer_scores")
    }[kind]  # fmt: skip
    short = {"steps": 20, "sequence_length": 32, "batch_size": 4, "learning_rate": 1e-3, "warmup": 0,
             "precision": "fp32", "compile": "false", "threads": 1, "device": "cpu"}  # fmt: skip
    overrides = [f"{block}.{key}={value}" for key, value in short.items()]
    recipe = adapt_recipe("mine", str(model), str(path), [*overrides, f"{data}.validation_fraction=0.3"])
    result = run(recipe, tmp_path / "runs")
    facts = json.loads((result.artefacts[stage] / "answers.json").read_text())
    if kind == "instruct":
        assert facts["after"]["nats_per_token"] < facts["before"]["nats_per_token"] - 0.5
        assert facts["after"]["conversations"] > 5
    else:
        assert facts["accuracy"] > 0.9
        assert facts["margin"] > 0
        assert facts["loss"] < facts["start_loss"]
    assert any(line.startswith(f"{stage}: ") for line in result.headline())


def test_pair_figures_worked_number() -> None:
    one = lambda value: (np.array([value]), np.array([2.0]))  # noqa: E731
    facts = pair_figures([one(10.0), one(20.0)], [one(12.0), one(15.0)], 0.1, EvaluateConfig(resamples=0))
    assert (facts["margin"], facts["accuracy"], facts["plain_accuracy"]) == (7, 1, 1)
    assert facts["loss"] == pytest.approx(0.40319, abs=1e-5)
