"""Checkpoints: resuming to the last bit, kill -9, torn files, a full disk."""

import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from soma.train.parallel.apply import parallelize
from soma.train.parallel.config import Layout
from soma.train.trainer import TrainResult
from soma.train.world import World
from tests.train.conftest import Killed, stop_after
from tests.train.pool import Pool

Run = Callable[..., TrainResult]


class Notes(progress.Reporter):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def stable(path: Path) -> list[dict]:
    """The log without what a clock has touched."""
    timed = {"tokens_per_second", "mfu", "seconds", "peak_memory_bytes"}
    records = map(json.loads, path.read_text().splitlines())
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "muon", "schedule": "wsd", "microbatch_size": 2},
        {"precision": "bf16", "log_every": 4, "evaluate_every": 3, "sample_prompts": ["a"], "sample_tokens": 4},
        {"evaluate_every": 2, "early_stop": 3},
        {"background_checkpoints": False},
    ],
    ids=["adamw", "muon", "bf16-evaluating", "early-stop", "waiting"],
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
    return (
        Checkpoints(folder, 2, World(), in_background=True),
        model,
        build_optimizers(model, TrainConfig(), torch.float32),
    )


def test_training_goes_on_while_a_checkpoint_is_written(
    run: Run, small: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two steps are taken while the files are not begun; what is written is what the weights were."""
    save, step, go_on = checkpoint.dcp.save, loop.Trainer.train_step, threading.Event()
    steps_taken: list[int] = []
    first: dict[str, torch.Tensor] = {}

    def waiting(tensors: dict[str, torch.Tensor], **more: Any) -> Any:
        assert threading.current_thread().name == "checkpoint"
        assert go_on.wait(60)
        return save(tensors, **more)

    def counted(trainer: loop.Trainer) -> None:
        if trainer.at.done == 4 and not first:
            first.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        step(trainer)
        steps_taken.append(trainer.at.done)
        if trainer.at.done == 6:
            assert trainer.checkpoints.steps() == []
            go_on.set()

    monkeypatch.setattr(checkpoint.dcp, "save", waiting)
    monkeypatch.setattr(loop.Trainer, "train_step", counted)
    config = TrainConfig(**small | {"checkpoint_every": 4, "keep_checkpoints": 9})
    run("a", config)
    assert steps_taken == list(range(12))
    store = Checkpoints(tmp_path / "a-work" / "checkpoints", 9, World())
    assert store.steps() == [4, 8, 12]
    shape = {name: torch.zeros_like(value) for name, value in first.items()}
    store._read(4, {f"model.{name}": value for name, value in shape.items()})
    assert first
    assert all(torch.equal(shape[name], value) for name, value in first.items())


SLOW = KILLED.replace(
    'print("ready", flush=True)',
    """
import time
from soma.train import checkpoint
whole = checkpoint.manifest
def late(directory, known):
    if "00000006" in directory.name:
        print("writing", flush=True)
        time.sleep(600)
    return whole(directory, known)
checkpoint.manifest = late
""",
)


def test_sigkill_while_a_checkpoint_is_written(
    run: Run, small: dict, tmp_path: Path, tokens: Path, tokenizer: Path, shape: ModelConfig
) -> None:
    """Its files are there, all but the last: the one before is taken."""
    settings = small | {"steps": 9, "checkpoint_every": 3}
    undisturbed = run("a", TrainConfig(**settings))
    out, work = tmp_path / "b", tmp_path / "b-work"
    out.mkdir()
    job = {
        "config": settings, "out": str(out), "work": str(work), "tokens": str(tokens), "tokenizer": str(tokenizer),
        "model": shape.model_dump(mode="json"),
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", SLOW, json.dumps(job)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert list((work / "checkpoints").glob(".step-00000006.*.tmp/state/*.distcp"))
    assert torn(work / "checkpoints" / "step-00000003") is None
    reporter = Notes()
    with progress.use(reporter):
        resumed = run("b", TrainConfig(**settings), work=work)
    assert "resumed at step 3 of 9" in reporter.notes
    assert content_hash(resumed.model) == content_hash(undisturbed.model)


def save_and_wait(store: Checkpoints, step: int, model: Transformer, optimizers: list[torch.optim.Optimizer]) -> None:
    store.save(step, model, optimizers, {})
    store.wait()


def fails_on_one_rank(rank: int, world_size: int, folder: str, model: dict[str, Any]) -> tuple[str, list[int]]:
    world = World.join(Layout(), "cpu")
    network = Transformer(ModelConfig(**model), dtype=torch.float32)
    store = Checkpoints(Path(folder), 2, world, in_background=True)
    optimizers = build_optimizers(network, TrainConfig(), torch.float32)
    store.save(1, network, optimizers, {})
    store.wait()
    write_json = checkpoint.write_json

    def full(path: Path, content: Any) -> None:
        if "random-00001" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        store.save(2, network, optimizers, {})
        try:
            store.wait()
        except UserError as error:
            return str(error), store.steps()
    return "", store.steps()


def test_a_rank_that_cannot_write_stops_all(pool: Pool, tmp_path: Path, shape: ModelConfig) -> None:
    answers = pool.run(fails_on_one_rank, 2, str(tmp_path), shape.model_dump(mode="json"))
    for said, steps in answers:
        assert "the disk is full: the checkpoint of step 2 needs" in said
        assert "step-00000001" in said
        assert steps == [1]


def test_every_rank_hashes_its_own_files(pool: Pool, tmp_path: Path, shape: ModelConfig) -> None:
    for read in pool.run(hashed, 2, str(tmp_path), shape.model_dump(mode="json")):
        assert read
    assert torn(tmp_path / "step-00000001") is None


def hashed(rank: int, world_size: int, folder: str, model: dict[str, Any]) -> bool:
    """Whether this rank has read its own files alone (rank 0 also what is nobody's)."""
    world = World.join(Layout(fsdp=2), "cpu")
    network = Transformer(ModelConfig(**model), dtype=torch.float32)
    parallelize(network, world.mesh)
    seen: list[str] = []
    file_hash = checkpoint.file_hash

    def spy(path: Path) -> str:
        seen.append(path.name)
        return file_hash(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "file_hash", spy)
        store = Checkpoints(Path(folder), 2, world, in_background=True)
        store.save(1, network, build_optimizers(network, TrainConfig(), torch.float32), {})
        store.wait()
    shards = [name for name in seen if name.endswith(".distcp")]
    return bool(shards) and all(name.startswith(f"__{rank}_") for name in shards)


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
        store.wait()
        checkpoint.allocate_state(optimizers)
        with pytest.raises(UserError, match=r"the disk is full: .* The last good checkpoint is .*step-00000001"):
            save_and_wait(store, 2, model, optimizers)
        assert store.steps() == [1]
        assert store.newest() == 1
        assert not list((folder / "checkpoints").glob(".step*"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
