"""Runs of a tensor's elements as rectangles, and checkpoints of them."""

from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from soma.train.parallel.flat import FlatPiece, rectangles
from soma.train.snapshot import Snapshot
from tests.train.pool import Pool


def test_worked_example() -> None:
    expected = [(2, 1, (0, 2), (1, 1)), (3, 6, (1, 0), (2, 3)), (9, 1, (3, 0), (1, 1))]
    assert list(rectangles(2, 10, (4, 3))) == expected
    assert list(rectangles(4, 5, (4, 3))) == [(4, 1, (1, 1), (1, 1))]  # all within a row
    assert list(rectangles(3, 3, (4, 3))) == []


def test_rectangles_are_the_run() -> None:
    """They hold its elements, each once and in order."""
    random = np.random.default_rng(1)
    for _ in range(300):
        shape = tuple(int(size) for size in random.integers(1, 6, random.integers(1, 5)))
        start, stop = sorted(int(edge) for edge in random.integers(0, prod(shape) + 1, 2))
        whole, place = np.arange(prod(shape)).reshape(shape), start
        for first, count, offsets, sizes in rectangles(start, stop, shape):
            block = whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))]
            assert first == place
            assert block.flatten().tolist() == list(range(first, first + count))
            place += count
        assert place == max(start, stop)


@pytest.mark.parametrize(("start", "stop"), [(0, 60), (7, 44), (21, 23), (30, 30)])
def test_checkpoint(tmp_path: Path, start: int, stop: int) -> None:
    """A run is read out of a checkpoint of the whole tensor, whatever its ends."""
    whole = torch.randn(3, 4, 5)
    dcp.save({"x": whole}, checkpoint_id=tmp_path / "whole", no_dist=True)
    local = torch.zeros(stop - start)
    dcp.load({"x": FlatPiece(local, start, (3, 4, 5))}, checkpoint_id=tmp_path / "whole", no_dist=True)
    assert torch.equal(local, whole.flatten()[start:stop])


def save_and_load(rank: int, world_size: int, folder: str) -> None:
    """Runs of 23 and 37 elements are saved, whole tensors and runs of 44 and 16 are read."""
    whole = torch.arange(60.0).view(3, 4, 5)
    mine = whole.flatten()[23 * rank : 23 + 37 * rank]
    dcp.save(Snapshot().take({"x": FlatPiece(mine, 23 * rank, (3, 4, 5))}), checkpoint_id=folder)
    again, other = torch.zeros(3, 4, 5), torch.zeros((44, 16)[rank])
    dcp.load({"x": again}, checkpoint_id=folder)
    dcp.load({"x": FlatPiece(other, 44 * rank, (3, 4, 5))}, checkpoint_id=folder)
    assert torch.equal(again, whole)
    assert torch.equal(other, whole.flatten()[44 * rank :][: len(other)])


def test_ranks_cut_elsewhere(pool: Pool, tmp_path: Path) -> None:
    pool.run(save_and_load, 2, str(tmp_path))
