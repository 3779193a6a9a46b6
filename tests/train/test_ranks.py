"""Two processes train as one does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.model.hub import load_model
from soma.train.config import TrainConfig
from soma.train.parallel.ranks import Calls, store_prefix
from soma.train.trainer import TrainResult

Run = Callable[..., TrainResult]

RANK = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from soma.model.config import ModelConfig
from soma.train.config import TrainConfig
from soma.train.trainer import train
from soma.train.world import World
from soma.train.parallel.config import Layout
torch.set_num_threads(1)
job, rank = json.loads(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{job['store']}", rank=rank, world_size=2)
train(TrainConfig(**job["config"]), Path(job["out"]), Path(job["work"]), tokens=Path(job["tokens"]),
      tokenizer=Path(job["tokenizer"]), model=ModelConfig(**job["model"]), world=World.join(Layout(dp=2), "cpu"))
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def test_two_ranks_are_one(
    run: Run, small: dict, tmp_path: Path, chats: Path, tokenizer: Path, shape: ModelConfig
) -> None:
    """Unequal answer lengths: the ranks have unequal numbers of targets. The second half resumes on two ranks."""
    settings = small | {"sequence_length": 64, "checkpoint_every": 3, "microbatch_size": 1}
    alone = run("a", TrainConfig(**settings), tokens=chats)
    out = tmp_path / "b"
    job = {
        "config": settings, "out": str(out), "work": str(tmp_path / "b-work"), "tokens": str(chats),
        "tokenizer": str(tokenizer), "model": shape.model_dump(mode="json"),
    }  # fmt: skip
    for attempt in ("whole", "resumed"):
        out.mkdir(exist_ok=True)
        text = json.dumps(job | {"store": str(tmp_path / attempt)})
        ranks = [subprocess.Popen([sys.executable, "-c", RANK, text, str(rank)]) for rank in range(2)]
        assert [process.wait(120) for process in ranks] == [0, 0]
        records = [json.loads(line) for line in (out / "logs" / "metrics.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records if record["event"] == "train"]
        lines = (alone.model.parent / "logs" / "metrics.jsonl").read_text().splitlines()
        expected = [record["loss"] for record in map(json.loads, lines) if record["event"] == "train"]
        assert losses == pytest.approx(expected, abs=1e-5)
        one, other = load_model(alone.model), load_model(out / "model")
        for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            assert (a - b).abs().max() < 2e-4, name
        newest = sorted((tmp_path / "b-work" / "checkpoints").iterdir())[-1]
        (newest / "manifest.json").unlink()


def test_the_others_say_that_rank_0_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has failed in a stage of its own, with a message; theirs must not bury it under tracebacks."""

    def closed(*_: object, **__: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:12345")

    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "broadcast_object_list", closed)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    with pytest.raises(UserError, match="rank 3 ends too: rank 0 is gone"):
        Calls().follow(print)


def test_each_start_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under one agent; agents of several nodes do not count their starts alike."""
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4"), ("TORCHELASTIC_RESTART_COUNT", "2")):
        monkeypatch.setenv(name, value)
    assert store_prefix() == "attempt-2"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert store_prefix() == "attempt-any"
