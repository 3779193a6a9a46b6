"""Sweeps: the space, the verdict, and real searches that are stopped, resumed, shared and judged."""

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from soma.base.errors import UserError
from soma.sweep.page import write_page
from soma.sweep.search import Outcome, Sweep, open_study, sweep
from soma.sweep.space import Choice, Range, parse_space
from soma.sweep.verdict import judge

ROOT = Path(__file__).resolve().parent.parent.parent


def test_space() -> None:
    space = parse_space(
        ["train.learning_rate=1e-4..1e-2:log", "train.batch_size=8,16", "model.num_hidden_layers=2..6", "a.b=x,true"]
    )
    assert space == {
        "train.learning_rate": Range(1e-4, 1e-2, True), "train.batch_size": Choice((8, 16)),
        "model.num_hidden_layers": Range(2, 6, False), "a.b": Choice(("x", True)),
    }  # fmt: skip
    assert space["model.num_hidden_layers"].holds(3)
    assert not space["train.batch_size"].holds(9)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ([], "nothing to search"), (["x"], "expected KEY=LOW..HIGH"), (["x=2..1"], "is not below"),
        (["x=0..1:log"], "above 0"), (["x=1..2:square"], "unknown scale 'square'"), (["x=a..b"], "'a' is no number"),
        (["x=3"], "one value"), (["x=1...inf"], "is no number"), (["x=[1],2"], "no single value"),
        (["x=1,2", "x=3,4"], "given twice"),
    ],
)  # fmt: skip
def test_mistakes_in_a_space(options: list[str], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        parse_space(options)


def test_verdict() -> None:
    found = judge([2.0, 2.2], [1.0, 1.4])
    assert (found.gain, found.noise) == (pytest.approx(0.9), pytest.approx(0.4472, abs=1e-4))
    assert found.is_better
    assert not judge([2.0, 2.4], [1.9, 2.2]).is_better, "within the spread of the seeds"


def test_equal_settings_seldom_look_better() -> None:
    """A winner that is the recipe itself: a rule without the noise would cry victory every second time."""
    draw = random.Random(0)
    wins = [judge(*([draw.gauss(1, 0.1) for _ in range(5)] for _ in range(2))).is_better for _ in range(2000)]
    assert statistics.mean(wins) < 0.06


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few thousand parameters on text that is quickly learned."""
    folder = tmp_path_factory.mktemp("sweep")
    docs = folder / "docs"
    docs.mkdir()
    draw = random.Random(1)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    for number in range(40):
        (docs / f"{number}.md").write_text(" ".join(draw.choice(words) for _ in range(300)) + f" {number}.")
    values = {
        "name": "small", "data": {"sources": str(docs), "min_documents": 1, "validation_fraction": 0.2},
        "tokenizer": {"vocab_size": 300},
        "model": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        "train": {"steps": 16, "sequence_length": 32, "batch_size": 4, "evaluate_every": 2, "evaluate_batches": 2,
                  "compile": False, "learning_rate": 1e-5, "checkpoint_every": 4, "threads": 1},
        "tracking": {"enabled": False},
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(values))
    return folder / "small.yaml"


OVER = ("train.learning_rate=1e-6..3e-2:log",)


def test_a_search_finds_what_is_plain_to_see(recipe: Path, tmp_path: Path) -> None:
    search = Sweep(recipe, OVER, runs=tmp_path)
    found = sweep(search, trials=7, seeds=2)
    assert [trial["state"] for trial in found.trials].count("failed") == 0
    assert found.trials[0]["values"] == {"train.learning_rate": 1e-5}, "the recipe as written comes first"
    assert found.best["train.learning_rate"] > 1e-3
    assert any(trial["state"] == "pruned" for trial in found.trials), "a rate that learns nothing is stopped early"
    pruned = next(trial for trial in found.trials if trial["state"] == "pruned")
    assert 0 < len(pruned["curve"]) < 8
    assert found.verdict is not None
    assert found.verdict["is_better"]
    assert not list((tmp_path / "store" / ".work").glob("train-*")), "what was stopped leaves nothing"
    corpora = list((tmp_path / "store").glob("corpus-*"))
    assert len(corpora) == 1, "trials share what they do not change"
    record = json.loads((search.folder / "sweep.json").read_text())
    assert record["best"] == found.best
    page = (search.folder / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert "better than" in page

    again = sweep(search, trials=7, seeds=0)
    assert len(again.trials) == len(found.trials), "all were there already"
    with pytest.raises(UserError, match="of another recipe, space or objective"):
        sweep(Sweep(recipe, ("train.learning_rate=1e-5..1e-2:log",), runs=tmp_path), trials=7)


def test_mistakes_of_a_search(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean `learning_rate`"):
        sweep(Sweep(recipe, ("train.learning_rat=1..2",), runs=tmp_path), trials=1)
    with pytest.raises(UserError, match="greater than 0"):
        sweep(Sweep(recipe, ("train.learning_rate=-1..2",), runs=tmp_path), trials=1)
    with pytest.raises(UserError, match="no stage gives 'train_loss2'; there are"):
        sweep(Sweep(recipe, OVER, ("train.steps=2",), objective="train_loss2", runs=tmp_path), trials=1, seeds=0)


def test_a_study_that_is_no_database(recipe: Path, tmp_path: Path) -> None:
    search = Sweep(recipe, OVER, runs=tmp_path)
    search.folder.mkdir()
    (search.folder / "study.db").write_text("This is a text. " * 100)
    with pytest.raises(UserError, match=r"study\.db: the study cannot be used .*not a database.*move it away"):
        sweep(search, trials=1)


def command(recipe: Path, runs: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "soma.cli", "sweep", str(recipe), f"--over={OVER[0]}", "--runs", str(runs), *more]


@pytest.mark.slow
def test_workers_share_a_study_and_survive_a_kill(recipe: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        command(recipe, tmp_path, "--trials", "40", "--seeds", "0", "--set", "train.steps=40"), env=environment
    )
    search = Sweep(recipe, OVER, ("train.steps=40",), runs=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (search.folder / "study.db").exists() and len(open_study(search).get_trials()) >= 3:
            break
        time.sleep(0.3)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run(
        command(recipe, tmp_path, "--trials", "8", "--seeds", "0", "--workers", "2", "--set", "train.steps=40"),
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trials = open_study(search).get_trials()
    ended = [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
    assert len(ended) >= 8
    assert math.isfinite(min(trial.value for trial in ended if trial.state.name == "COMPLETE"))


def test_page_of_a_hostile_recipe(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    trials = [
        {
            "number": 0,
            "state": "complete",
            "value": 1.5,
            "values": {"a": evil},
            "curve": [(1, 2.0), (2, 1.5)],
            "error": None,
        },
        {"number": 1, "state": "failed", "value": None, "values": {"a": "y"}, "curve": [], "error": evil},
    ]
    outcome = Outcome(tmp_path, trials, {"a": evil}, 1.5, {"recipe": [], "winner": []}, None)
    write_page(tmp_path / "p.html", evil, "loss", {"a": Choice((evil, "y"))}, outcome)
    assert evil not in (tmp_path / "p.html").read_text()
