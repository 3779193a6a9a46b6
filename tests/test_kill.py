"""`kill -9` at any moment, then the same command: the same artefact bytes as an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """
name: tiny
data: {sources: [TEXTS], validation_fraction: 0.2}
tokenizer: {vocab_size: 320}
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
train: {steps: 60, sequence_length: 64, batch_size: 8, checkpoint_every: 4, precision: fp32, compile: false}
instruct: {}
tune: {steps: 12, sequence_length: 256, batch_size: 4, checkpoint_every: 4, precision: fp32, compile: false}
evaluate: {sequence_length: 64}
tracking: {enabled: false}
"""


def write_inputs(folder: Path) -> Path:
    """A recipe on forty generated Python files with docstrings."""
    texts = folder / "texts"
    texts.mkdir()
    chance = random.Random(1)
    words = [f"{first}{last}" for first in ("al", "be", "co", "du", "ex") for last in ("pha", "ta", "rus", "ne", "it")]
    for index in range(40):
        functions = []
        for number in range(6):
            name = "_".join(chance.sample(words, 2)) + str(number)
            text = " ".join(chance.choices(words, k=12))
            functions.append(f'def {name}(x):\n    """{text.capitalize()}."""\n    return x + {number}\n')
        (texts / f"module_{index}.py").write_text("\n\n".join(functions))
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.replace("TEXTS", str(texts)))
    return recipe


def command(recipe: Path, runs: Path) -> list[str]:
    return [sys.executable, "-m", "soma.cli", "run", str(recipe), "--runs", str(runs)]


def run_whole(recipe: Path, runs: Path) -> float:
    """Seconds of an undisturbed run."""
    started = time.monotonic()
    done = subprocess.run(command(recipe, runs), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - started


def kill_once(recipe: Path, runs: Path, after: float) -> bool:
    """Start a run and kill -9 its whole process group after so many seconds; False if it had ended by then."""
    process = subprocess.Popen(
        command(recipe, runs), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    assert process.returncode == 0, errors
    return False


def hashes(runs: Path) -> dict[str, str]:
    """Content hash of each stage of the finished run."""
    record = json.loads((runs / "tiny" / "run.json").read_text())
    assert record["status"] == "finished"
    return {entry["stage"]: entry["content_hash"] for entry in record["stages"]}


def check_kills(tmp_path: Path, kills: int, seed: int) -> None:
    recipe = write_inputs(tmp_path)
    seconds = run_whole(recipe, tmp_path / "whole")
    chance = random.Random(seed)
    killed = 0
    while killed < kills:
        if kill_once(recipe, tmp_path / "broken", chance.uniform(0.1, 0.8) * seconds):
            killed += 1
        elif killed:
            break
        else:  # the machine got quicker: that run was over before its moment came
            shutil.rmtree(tmp_path / "broken")
            seconds /= 2
    run_whole(recipe, tmp_path / "broken")
    assert hashes(tmp_path / "broken") == hashes(tmp_path / "whole")
    leftovers = {path.name for path in (tmp_path / "broken" / "store").iterdir() if path.name.startswith(".")}
    assert leftovers <= {".work", ".locks"}
    assert not list((tmp_path / "broken" / "store" / ".work").iterdir())


def test_killed_runs_give_the_same_bytes(tmp_path: Path) -> None:
    check_kills(tmp_path, kills=2, seed=random.SystemRandom().randrange(10**6))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_many_moments(tmp_path: Path) -> None:
    check_kills(tmp_path, kills=40, seed=random.SystemRandom().randrange(10**6))
