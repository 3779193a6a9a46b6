"""Lines that stand in many documents: menus, notices, licences (CCNet, Wenzek et al. 2019, arXiv:1911.00359, 3.1).

A line is compared by a hash of its text without case and surplus white space and with every digit as 0, so that dates
and counters make no difference (CCNet takes out punctuation too); short ones are left alone. A document counts once for
each of its lines, however often it has it.

    counts     a partition → its lines' hashes, sorted, in how many rows each is, the first of those    36 bytes a line
    repeated   a range of hashes → those in enough rows of all partitions, each with its first row     20 bytes a line
    rows       a partition → rows that lose lines

First is the row of least rank (see `soma.data.dedup.near`), so the input's order does not matter. In memory a process
holds the lines of a partition, or about `RANGE_LINES` of a range.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from soma.data.dedup.files import map_array, save_array
from soma.data.dedup.ranked import Ranked, open_ranked, run_step
from soma.data.workers import Runner

FORMAT = 1  # raise it when the same partitions come to give other lines
BATCH_ROWS = 512
RANGE_LINES = 4 << 20
FEW_LINES = 1 << 19  # up to this many it is done sooner than processes have started
DIGIT = re.compile(r"\d")
COUNT = np.dtype([("hash", "<u8"), ("rows", "<u4"), ("first", "<i8")])


@dataclass(frozen=True)
class Job(Ranked):
    """What all tasks of one run know."""

    documents: int = 10
    min_chars: int = 20
    keep_first: bool = False
    ranges: int = 1


Task = tuple[Job, int]


@dataclass(frozen=True)
class RepeatedLines:
    """`hashes` of repeated lines, sorted, and the rank of the `first` row that has each; `rows` that lose lines."""

    hashes: np.ndarray
    first: np.ndarray
    rows: np.ndarray
    min_chars: int
    keep_first: bool

    def cut(self, text: str, rank: int) -> tuple[str, list[str]]:
        """The text of the row of that rank without its repeated lines, and those lines."""
        lines = text.split("\n")
        keys = line_hashes(lines, self.min_chars)
        lost = is_repeated(self.hashes, self.first, keys, rank, self.keep_first)
        kept = [line for line, gone in zip(lines, lost.tolist(), strict=True) if not gone]
        return "\n".join(kept).strip(), [line for line, gone in zip(lines, lost.tolist(), strict=True) if gone]


def repeated_lines(
    parts: Sequence[Path], rank_N: np.ndarray, work: Path, *, documents: int, min_chars: int = 20,
    keep_first: bool = False, workers: int = 1, runner: Runner = "local",
) -> RepeatedLines:  # fmt: skip
    """Lines of at least `min_chars` characters that stand in `documents` rows or more.

    `rank_N` as in `near_partitions`; rows of rank -1 are not looked at. `keep_first`: the row of least rank keeps them.
    """
    settings = {"documents": documents, "min_chars": min_chars, "keep_first": keep_first}
    kinds = ("counts", "repeated", "rows")
    ranked = open_ranked(parts, rank_N, work, "lines", [FORMAT, *settings.values()], kinds)
    job = Job(**vars(ranked), **settings)  # type: ignore[arg-type]
    numbers, title = range(len(parts)), "repeated lines: "
    run_step(write_counts, job, {n: job.file("counts", n) for n in numbers}, workers, runner, f"{title}counts")
    lines = sum(len(map_array(job.file("counts", n))) for n in numbers)
    job = replace(job, ranges=max(1, -(-lines // RANGE_LINES)))
    workers = workers if lines > FEW_LINES else 1
    repeated = {n: job.file("repeated", n) for n in range(job.ranges)}
    run_step(find_repeated, job, repeated, workers, runner, f"{title}ranges")
    run_step(write_rows, job, {n: job.file("rows", n) for n in numbers}, workers, runner, f"{title}rows")
    found = _repeated(job)
    rows = [np.load(job.file("rows", n)) + job.starts[n] for n in numbers]
    return RepeatedLines(found["hash"], found["first"], np.concatenate([np.zeros(0, np.int64), *rows]),
                         min_chars, keep_first)  # fmt: skip


def normal_line(line: str) -> str:
    """What a line is compared by: `"  Posted on 3 May 2021"` → `"posted on 0 may 0000"`."""
    return DIGIT.sub("0", " ".join(line.split()).casefold())


def line_hashes(lines: Sequence[str], min_chars: int) -> np.ndarray:
    """A 64-bit hash of each line, uint64; 0 for lines whose normal form has fewer characters than that."""
    found = np.zeros(len(lines), np.uint64)
    for number, line in enumerate(lines):
        if len(line) >= min_chars and len(normal := normal_line(line)) >= min_chars:
            found[number] = int.from_bytes(blake2b(normal.encode(), digest_size=8).digest(), "little") or 1
    return found


def is_repeated(
    hashes: np.ndarray, first: np.ndarray, keys: np.ndarray, rank: int | np.ndarray, keep_first: bool
) -> np.ndarray:
    """Which lines of rows of these ranks go, by their hashes; bool."""
    if len(hashes) == 0:
        return np.zeros(len(keys), bool)
    place = np.minimum(np.searchsorted(hashes, keys), len(hashes) - 1)
    found = (hashes[place] == keys) & (keys != 0)
    return found & (first[place] != rank) if keep_first else found


def write_counts(task: Task) -> None:
    """A part's lines as `COUNT`, by hash; `….keys.npy`: (rank, hash) of each line of each row, once."""
    import pyarrow.parquet as pq

    job, part = task
    rank = job.ranks(part)
    keys, ranks, start = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
    with pq.ParquetFile(job.parts[part]) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=["text"]):
            for row in np.flatnonzero(rank[start : start + len(batch)] >= 0).tolist():
                own = np.sort(line_hashes(batch.column(0)[row].as_py().split("\n"), job.min_chars))
                own = own[np.diff(own, prepend=np.uint64(0)) != 0]  # each once, without 0
                keys.append(own)
                ranks.append(np.full(len(own), rank[start + row]))
            start += len(batch)
    key, owner = np.concatenate(keys), np.concatenate(ranks)
    save_array(job.file("counts", part).with_suffix(".keys.npy"), np.stack([owner.astype(np.uint64), key]))
    order = np.lexsort((owner, key))
    save_array(job.file("counts", part), _grouped(key[order], np.ones(len(key), np.int64), owner[order]))


def _grouped(key: np.ndarray, rows: np.ndarray, first: np.ndarray) -> np.ndarray:
    """One `COUNT` for each hash: rows summed, the least first; `key` is sorted."""
    opens = np.flatnonzero(np.concatenate([np.ones(min(1, len(key)), bool), key[1:] != key[:-1]]))
    found = np.zeros(len(opens), COUNT)
    if len(opens):
        found["hash"] = key[opens]
        found["rows"] = np.add.reduceat(rows, opens)
        found["first"] = np.minimum.reduceat(first, opens)
    return found


def find_repeated(task: Task) -> None:
    """The lines in a range of hashes that are in enough rows, as `COUNT`."""
    job, number = task
    low, high = (number * (1 << 64)) // job.ranges, ((number + 1) * (1 << 64)) // job.ranges - 1
    every = [np.zeros(0, COUNT)]
    for part in range(len(job.parts)):
        counts = map_array(job.file("counts", part))
        begin = int(np.searchsorted(counts["hash"], np.uint64(low)))
        end = int(np.searchsorted(counts["hash"], np.uint64(high), side="right"))
        every.append(np.asarray(counts[begin:end]))
    counts = np.concatenate(every)
    counts = counts[np.argsort(counts["hash"], kind="stable")]
    found = _grouped(counts["hash"], counts["rows"].astype(np.int64), counts["first"])
    save_array(job.file("repeated", number), found[found["rows"] >= job.documents])


def _repeated(job: Job) -> np.ndarray:
    """The lines of all ranges, by hash."""
    return np.concatenate([np.load(job.file("repeated", number)) for number in range(job.ranges)])


def write_rows(task: Task) -> None:
    """The rows of a part that lose lines, as numbers within the part, int64."""
    job, part = task
    found = _repeated(job)
    owner, key = map_array(job.file("counts", part).with_suffix(".keys.npy"))
    lost = is_repeated(found["hash"], found["first"], key, owner.astype(np.int64), job.keep_first)
    save_array(job.file("rows", part), np.flatnonzero(np.isin(job.ranks(part), owner[lost].astype(np.int64))))
