"""Checkpoints: resuming to the last bit, kill -9, torn files, a full disk."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from soma.base import progress
from soma.base.artefact import content_hash
from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.transformer import Transformer
from soma.train import checkpoint, loop
from soma.train.checkpoint import Checkpoints, random_state, set_random_state, torn
from soma.train.config import TrainConfig
from soma.train.optim import build_optimizers
from soma.train.trainer import TrainResult
from soma.train.world import World

Run = Callable[..., TrainResult]


class Notes(progress.Reporter):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Killed(Exception):  # noqa: N818
    """Stands for a kill in the same process."""


def stable(path: Path) -> list[dict]:
    """The log without what a clock has touched."""
    timed = {"tokens_per_second", "mfu", "seconds", "peak_memory_bytes"}
    records = map(json.loads, path.read_text().splitlines())
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    true_step = loop.Trainer.train_step

    def step(trainer: loop.Trainer) -> None:
        if trainer.at.done == steps:
            raise Killed
        true_step(trainer)

    monkeypatch.setattr(loop.Trainer, "train_step", step)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon", "schedule": "wsd", "microbatch_size": 2},
        {"precision": "bf16", "log_every": 4, "evaluate_every": 3, "sample_prompts": ["a"], "sample_tokens": 4},
        {"evaluate_every": 2, "early_stop": 3},
    ],
    ids=["adamw", "muon", "bf16-evaluating", "early-stop"],
)
def test_resuming_gives_the_same_bytes(run: Run, small: dict, monkeypatch: pytest.MonkeyPatch, changes: dict) -> None:
    config = TrainConfig(**small | {"checkpoint_every": 2} | changes)
    undisturbed = run("a", config)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Killed):
            run("b", config)
    reporter = Notes()
    with progress.use(reporter):
        resumed = run("b", config)
    assert "resumed at step 4 of 12" in reporter.notes
    assert content_hash(resumed.model.parent) == content_hash(undisturbed.model.parent)
    one, other = (stable(result.model.parent / "logs" / "metrics.jsonl") for result in (undisturbed, resumed))
    assert one == other


def test_the_check_can_fail(run: Run, small: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a resumption that forgets the data position gives other losses."""
    config = TrainConfig(**small, checkpoint_every=2)
    undisturbed = run("a", config)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Killed):
            run("b", config)
    monkeypatch.setattr("soma.data.loader.TokenLoader.load_state_dict", lambda *_: None)
    assert content_hash(run("b", config).model) != content_hash(undisturbed.model)


KILLED = """
import json, sys
from pathlib import Path
import torch
from soma.model.config import ModelConfig
from soma.train.config import TrainConfig
from soma.train.trainer import train
torch.set_num_threads(1)
job = json.loads(sys.argv[1])
print("ready", flush=True)
train(TrainConfig(**job["config"]), Path(job["out"]), Path(job["work"]), tokens=Path(job["tokens"]),
      tokenizer=Path(job["tokenizer"]), model=ModelConfig(**job["model"]))
"""


def test_sigkill_at_random_moments(
    run: Run, small: dict, tmp_path: Path, tokens: Path, tokenizer: Path, shape: ModelConfig
) -> None:
    settings = small | {"steps": 60, "checkpoint_every": 3, "evaluate_every": 10}
    undisturbed = run("a", TrainConfig(**settings))
    out, work = tmp_path / "b", tmp_path / "b-work"
    job = {
        "config": settings, "out": str(out), "work": str(work), "tokens": str(tokens), "tokenizer": str(tokenizer),
        "model": shape.model_dump(mode="json"),
    }  # fmt: skip
    chance, kills = random.Random(0), 0
    for attempt in range(20):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        process = subprocess.Popen([sys.executable, "-c", KILLED, json.dumps(job)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        if attempt < 4:
            time.sleep(chance.uniform(0.1, 1.2))
            process.send_signal(signal.SIGKILL)
        status = process.wait()
        process.stdout.close()
        kills += status == -signal.SIGKILL
        if status == 0:
            break
    assert kills >= 1
    assert content_hash(out) == content_hash(undisturbed.model.parent)
    one, other = (stable(folder / "logs" / "metrics.jsonl") for folder in (undisturbed.model.parent, out))
    assert one == other


def spoil(path: Path, how: str) -> None:
    (data,) = (path / "state").glob("*.distcp")
    if how == "shortened":
        data.write_bytes(data.read_bytes()[:-100])
    elif how == "changed":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "file gone":
        data.unlink()
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text("{")


@pytest.mark.parametrize("how", ["shortened", "changed", "file gone", "no manifest", "broken manifest"])
def test_a_torn_checkpoint_is_passed_over(
    run: Run, small: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    config = TrainConfig(**small, checkpoint_every=2)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Killed):
            run("a", config)
    folder = tmp_path / "a-work" / "checkpoints"
    assert torn(folder / "step-00000006") is None
    spoil(folder / "step-00000006", how)
    (folder / ".step-00000008.tmp").mkdir()
    reporter = Notes()
    with progress.use(reporter):
        resumed = run("a", config)
    assert any("step-00000006 is torn" in note for note in reporter.notes)
    assert "resumed at step 4 of 12" in reporter.notes
    assert not (folder / ".step-00000008.tmp").exists()
    assert content_hash(resumed.model) == content_hash(run("b", config).model)


def test_only_the_newest_are_kept(run: Run, small: dict, tmp_path: Path) -> None:
    run("a", TrainConfig(**small, checkpoint_every=1, keep_checkpoints=3))
    names = sorted(path.name for path in (tmp_path / "a-work" / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000011", "step-00000012"]


def test_checkpoints_of_another_run_are_refused(run: Run, small: dict, tmp_path: Path, shape: ModelConfig) -> None:
    run("a", TrainConfig(**small, checkpoint_every=4))
    work = tmp_path / "a-work"
    with pytest.raises(UserError, match="its checkpoints are of another run"):
        run("b", TrainConfig(**small | {"learning_rate": 1e-2}), work=work)
    with pytest.raises(UserError, match="does not fit this model"):
        run("c", TrainConfig(**small), work=work, model=shape.model_copy(update={"num_hidden_layers": 3}))
    run("d", TrainConfig(**small | {"log_every": 5}), work=work)


def test_random_state_returns() -> None:
    torch.manual_seed(3)
    saved = json.loads(json.dumps(random_state()))
    first = (random.random(), np.random.rand(), torch.rand(3).tolist())
    set_random_state(saved)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == first


def checkpoints_of(folder: Path, shape: ModelConfig) -> tuple[Checkpoints, Transformer, list[torch.optim.Optimizer]]:
    model = Transformer(shape, dtype=torch.float32)
    return Checkpoints(folder, 2, World()), model, build_optimizers(model, TrainConfig(), torch.float32)


def test_a_real_full_disk(tmp_path: Path, shape: ModelConfig) -> None:
    """A file system of 450 KB: the first checkpoint fits, the second does not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=450k", "soma-test", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        store, model, optimizers = checkpoints_of(folder / "checkpoints", shape)
        store.save(1, model, optimizers, {})
        checkpoint.allocate_state(optimizers)
        with pytest.raises(UserError, match=r"the disk is full: .* The last good checkpoint is .*step-00000001"):
            store.save(2, model, optimizers, {})
        assert store.steps() == [1]
        assert store.newest() == 1
        assert not list((folder / "checkpoints").glob(".step*"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
