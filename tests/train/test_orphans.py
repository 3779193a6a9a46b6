"""torchrun killed with -9: its ranks end, and the same command goes on at once with what is whole."""

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from soma.train import checkpoint
from soma.train.checkpoint import Checkpoints, torn
from soma.train.world import World
from tests.train.test_topology import ENVIRONMENT, command, furthest_apart, trained, write_recipe

LIMIT = 240.0  # seconds on a busy machine


def left(call: list[str], mark: Path, place: str) -> str:
    """Start torchrun, which is killed; what was said until the last of its processes has ended."""
    program = [word.replace("soma.cli", "tests.train.left_ranks") for word in call]
    environment = ENVIRONMENT | {"SOMA_TEST_MARK": str(mark), "SOMA_TEST_AT": place}
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)
    said, _ = process.communicate(timeout=LIMIT)  # to the end of standard output, which the ranks have too
    assert process.returncode == -signal.SIGKILL, said
    assert "left alone" in said
    return said


def test_ranks_end_with_their_torchrun(tmp_path: Path) -> None:
    left(command(Path("none.yaml"), tmp_path, ranks=2), tmp_path / "mark", "start")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["step", "checkpoint"])
def test_the_same_command_goes_on(tmp_path: Path, place: str) -> None:
    """The bits are those of an undisturbed run."""
    recipe, options = write_recipe(tmp_path), ("--set", "train.layout.fsdp=2")
    whole = trained(command(recipe, tmp_path / "whole", *options, ranks=2), tmp_path / "whole")
    runs = tmp_path / "left"
    left(command(recipe, runs, *options, ranks=2), tmp_path / "mark", place)
    done = subprocess.run(
        command(recipe, runs, *options, ranks=2), capture_output=True, text=True, timeout=LIMIT, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    # The checkpoint of step 4 may still have been on its way to the disk when step 5 was cut off.
    assert any(f"resumed at step {step} of 6" in done.stdout + done.stderr for step in (2, 4 if place == "step" else 2))
    assert "waiting for" not in done.stdout + done.stderr
    assert furthest_apart(whole, (runs / "tiny" / "train").resolve()) == 0.0


def test_what_a_rank_of_another_start_writes_stays_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes its files of the same step just after ours, before they are hashed."""
    save, theirs, ours = checkpoint.dcp.save, nn.Linear(3, 3), nn.Linear(3, 3)
    late, store = (Checkpoints(tmp_path, 2, World()) for _ in range(2))
    late.save(1, theirs, [], {})

    def save_both(tensors: dict[str, torch.Tensor], **more: Any) -> None:
        save(tensors, **more)
        other = {name: value + 1 for name, value in tensors.items()}
        save(other, **more | {"checkpoint_id": late.temporary(2) / "state"})

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dcp, "save", save_both)
        store.save(2, ours, [], {})
    assert torn(store.path(2)) is None
    read = nn.Linear(3, 3)
    store.load_weights(2, read)
    assert torch.equal(read.weight, ours.weight)
    assert late.temporary(2).exists()
    assert store.newest() == 2
    assert not late.temporary(2).exists(), "what is left behind goes with the next start"
