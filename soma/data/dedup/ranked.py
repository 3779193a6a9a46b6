"""Rows of Parquet files in an order that does not depend on how they lie in them: what steps over all of them share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soma.base import progress
from soma.base.artefact import file_hash, json_hash
from soma.data.dedup.files import array_hash, map_array, save_array
from soma.data.workers import Runner, map_tasks


@dataclass(frozen=True)
class Ranked:
    """`parts`: Parquet files with a column `text`; `folder`: where the steps leave their files."""

    parts: tuple[Path, ...]
    starts: tuple[int, ...]  # of each part's rows among all rows, and one past the last
    folder: Path

    def file(self, kind: str, number: int) -> Path:
        return self.folder / kind / f"{number:05d}.npy"

    def ranks(self, part: int) -> np.ndarray:
        """Of a part's rows; -1: not looked at."""
        found: np.ndarray = map_array(self.folder / "ranks.npy")[self.starts[part] : self.starts[part + 1]]
        return found


def open_ranked(
    parts: Sequence[Path], rank_N: np.ndarray, work: Path, name: str, settings: Sequence[Any], kinds: Sequence[str]
) -> Ranked:
    """The parts with their ranks, in a folder of `work` that is named by all that the results depend on."""
    import pyarrow.parquet as pq

    sizes = [pq.read_metadata(part).num_rows for part in parts]
    starts = tuple(np.cumsum([0, *sizes]).tolist())
    assert starts[-1] == len(rank_N), "one rank for each row of the partitions"
    key = json_hash([list(settings), [file_hash(part) for part in parts], array_hash(rank_N)])[:20]
    ranked = Ranked(tuple(parts), starts, work / f"{name}-{key}")
    for kind in kinds:
        (ranked.folder / kind).mkdir(parents=True, exist_ok=True)
    if not (ranked.folder / "ranks.npy").exists():
        save_array(ranked.folder / "ranks.npy", rank_N)
    return ranked


def run_step(
    function: Callable[[Any], None], job: Any, outputs: Mapping[int, Path], workers: int, runner: Runner, title: str
) -> None:
    """`function((job, number))` for every output that is not there yet."""
    waiting = [(job, number) for number, path in outputs.items() if not path.exists()]
    with progress.current().task(title, total=len(outputs), unit="parts") as bar:
        bar.skip(len(outputs) - len(waiting))
        for _ in map_tasks(function, waiting, workers, runner):
            bar.advance(1)
