"""Substrings that occur more than once (Lee et al. 2022, Deduplicating Training Data Makes Language Models Better).

A place of the corpus lies in a repeated span of at least N units exactly when one of the windows of N units around it
occurs elsewhere. So no suffix array is needed: the windows' hashes are sorted, in ranges, and the repeated ones mark
what they cover. Units are words (what white space cuts, case folded) or bytes; N is 50 words, which Lee et al. have in
tokens.

    windows      a partition → its windows' hashes, sorted, with their places      12 bytes a window on disk
    repeated     a range of hashes → places of windows that occurred before          8 bytes a place on disk
    spans        a partition → spans of units that its rows lose

The first occurrence stays: first by rank (see `soma.data.dedup.near`), so the input's order does not matter. In memory
a process holds one partition's windows (30 bytes each) or about `RANGE_WINDOWS` of a range (40 bytes each). Two
different windows share a hash with probability 2^-64: among a thousand million windows, one in forty corpora loses one
span wrongly.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from soma.data.dedup.files import map_array, save_array
from soma.data.dedup.ranked import Ranked, open_ranked, run_step
from soma.data.dedup.words import SPREAD, mix, parse, word_hashes
from soma.data.workers import Runner

FORMAT = 1  # raise it when the same partitions come to give other spans
BATCH_ROWS = 512
RANGE_WINDOWS = 4 << 20
FEW_WINDOWS = 1 << 20  # up to this many it is done sooner than processes have started
PLACE = np.dtype([("part", "<u4"), ("place", "<u4")])
SPAN = np.dtype([("row", "<u4"), ("start", "<u4"), ("end", "<u4")])
WORD = re.compile(r"\S+")

Unit = Literal["words", "bytes"]


@dataclass(frozen=True)
class Job(Ranked):
    """What all tasks of one run know."""

    unit: Unit = "words"
    length: int = 50
    ranges: int = 1


Task = tuple[Job, int]


def repeated_spans(
    parts: Sequence[Path],
    rank_N: np.ndarray,
    work: Path,
    length: int = 50,
    unit: Unit = "words",
    workers: int = 1,
    runner: Runner = "local",
) -> list[np.ndarray]:
    """For each part the spans, `SPAN` by row and start, that occurred before: rows of the part, units from the text's
    start. Spans of a row do not touch. `rank_N` as in `near_partitions`; rows of rank -1 are not looked at.
    """
    kinds = ("windows", "repeated", "spans")
    ranked = open_ranked(parts, rank_N, work, "substring", [FORMAT, length, unit], kinds)
    job = Job(**vars(ranked), unit=unit, length=length)
    numbers = range(len(parts))
    title = "repeated substrings: "
    run_step(write_windows, job, {n: job.file("windows", n) for n in numbers}, workers, runner, f"{title}windows")
    windows = sum(len(map_array(job.file("windows", n))) for n in numbers)
    job = replace(job, ranges=max(1, -(-windows // RANGE_WINDOWS)))
    workers = workers if windows > FEW_WINDOWS else 1
    repeated = {n: job.file("repeated", n) for n in range(job.ranges)}
    run_step(find_repeated, job, repeated, workers, runner, f"{title}ranges")
    run_step(write_spans, job, {n: job.file("spans", n) for n in numbers}, workers, runner, f"{title}spans")
    return [np.load(job.file("spans", n)) for n in numbers]


def cut_spans(text: str, spans: np.ndarray, unit: Unit = "words") -> str:
    """The text without these spans of it (rows of `SPAN`), each with the white space after it."""
    if unit == "bytes":
        data = text.encode()
        keep, last = [], 0
        for start, end in zip(spans["start"].tolist(), spans["end"].tolist(), strict=True):
            keep.append(data[last:start])
            last = end
        return b"".join([*keep, data[last:]]).decode(errors="ignore")  # a character that is cut in two goes whole
    places = [match.start() for match in WORD.finditer(text)] + [len(text)]
    pieces, last = [], 0
    for start, end in zip(spans["start"].tolist(), spans["end"].tolist(), strict=True):
        pieces.append(text[last : places[start]])
        last = places[end]
    return "".join([*pieces, text[last:]]).strip()


# --- Windows ---


def window_hashes(units: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of each run of `length` units (uint64 hashes of words or bytes): uint64 (units - length + 1,)."""
    if len(units) < length:
        return np.zeros(0, np.uint64)
    powers, inverses = _powers(len(units))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(units * powers[: len(units)])])
    return mix((sums[length:] - sums[:-length]) * inverses[: len(units) - length + 1])


def units_of(texts: Sequence[str], unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """(hashes of all units, first unit of each text and one past the last)."""
    if unit == "words":
        words = parse(texts)
        return word_hashes(words), words.first
    data = [text.encode() for text in texts]
    values = mix(np.frombuffer(b"".join(data), np.uint8).astype(np.uint64) + np.uint64(1))
    return values, np.cumsum([0, *map(len, data)])


def write_windows(task: Task) -> None:
    """A part's windows: hashes, sorted; `….places.npy`: each one's number among the windows of the part, by row;
    `….rows.npy`: the first window of each row.
    """
    import pyarrow.parquet as pq

    job, part = task
    rank = job.ranks(part)
    hashes, counts, start = [np.zeros(0, np.uint64)], [np.zeros(1, np.int64)], 0
    with pq.ParquetFile(job.parts[part]) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=["text"]):
            used = np.flatnonzero(rank[start : start + len(batch)] >= 0)
            start += len(batch)
            units, first = units_of(batch.column(0).take(used).to_pylist(), job.unit)
            count = np.zeros(len(batch), np.int64)
            count[used] = np.maximum(np.diff(first) - job.length + 1, 0)
            counts.append(count)
            inside = np.repeat(first[1:], np.diff(first)) - np.arange(len(units)) >= job.length
            hashes.append(window_hashes(units, job.length)[inside[: max(0, len(units) - job.length + 1)]])
    every = np.concatenate(hashes)
    order = np.argsort(every)
    path = job.file("windows", part)
    save_array(path.with_suffix(".places.npy"), order.astype(np.uint32))
    save_array(path.with_suffix(".rows.npy"), np.cumsum(np.concatenate(counts)))
    save_array(path, every[order])


@cache
def _power_tables(size: int) -> tuple[np.ndarray, np.ndarray]:
    tables = []
    for base in (SPREAD, pow(SPREAD, -1, 1 << 64)):
        steps = np.full(size, base, np.uint64)
        steps[0] = 1
        tables.append(np.cumprod(steps))
    return tables[0], tables[1]


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """SPREAD^i and SPREAD^-i modulo 2^64, at least `size` of them."""
    return _power_tables(1 << max(16, (size - 1).bit_length()))


# --- What occurred before ---


def find_repeated(task: Task) -> None:
    """Of the windows in a range of hashes those that occurred before, as `PLACE`, sorted.

    A window that overlaps its own first occurrence (a run of one word) stays: else the first would lose its tail.
    """
    job, number = task
    keys, owners, places = _range(job, number)
    again = np.zeros(len(keys), bool)
    same = keys[1:] == keys[:-1]
    again[1:] |= same
    again[:-1] |= same
    keys, owners, places = keys[again], owners[again], places[again]
    ranks, offsets = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
    for part in np.unique(owners).tolist():
        here = owners == part
        rows = map_array(job.file("windows", part).with_suffix(".rows.npy"))
        row = np.searchsorted(rows, places[here], side="right") - 1
        ranks[here], offsets[here] = job.ranks(part)[row], places[here] - rows[row]
    order = np.lexsort((offsets, ranks, keys))
    first = np.ones(len(order), bool)
    first[1:] = keys[order[1:]] != keys[order[:-1]]
    leader = order[first][np.cumsum(first) - 1] if len(order) else order
    overlaps = (ranks[leader] == ranks[order]) & (offsets[order] - offsets[leader] < job.length)
    gone = order[~overlaps]
    found = np.zeros(len(gone), PLACE)
    found["part"], found["place"] = owners[gone], places[gone]
    save_array(job.file("repeated", number), np.sort(found, order=["part", "place"]))


def _range(job: Job, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hashes, parts, places) of the windows in a range of hashes, sorted by hash."""
    low, high = ((number * (1 << 64)) // job.ranges, ((number + 1) * (1 << 64)) // job.ranges - 1)
    keys, owners, places = [], [], []
    for part in range(len(job.parts)):
        hashes = map_array(job.file("windows", part))
        begin = int(np.searchsorted(hashes, np.uint64(low)))
        end = int(np.searchsorted(hashes, np.uint64(high), side="right"))
        keys.append(np.asarray(hashes[begin:end]))
        owners.append(np.full(end - begin, part, np.uint32))
        places.append(np.asarray(map_array(job.file("windows", part).with_suffix(".places.npy"))[begin:end]))
    key = np.concatenate([np.zeros(0, np.uint64), *keys])
    order = np.argsort(key, kind="stable")
    owner, place = (np.concatenate([np.zeros(0, np.uint32), *arrays])[order] for arrays in (owners, places))
    return key[order], owner, place.astype(np.int64)


def write_spans(task: Task) -> None:
    """A part's spans: what its windows that occurred before cover, neighbours joined."""
    job, part = task
    found = []
    for number in range(job.ranges):
        every = map_array(job.file("repeated", number))
        low, high = np.searchsorted(every["part"], [part, part + 1])
        found.append(np.asarray(every["place"][low:high]))
    places = np.sort(np.concatenate([np.zeros(0, np.uint32), *found])).astype(np.int64)
    rows = map_array(job.file("windows", part).with_suffix(".rows.npy"))
    row = np.searchsorted(rows, places, side="right") - 1
    start = places - rows[row]
    opens = np.ones(len(places), bool)
    opens[1:] = (row[1:] != row[:-1]) | (start[1:] > start[:-1] + job.length)
    last = np.flatnonzero(np.concatenate([opens[1:], [True]])) if len(places) else np.zeros(0, np.int64)
    spans = np.zeros(int(opens.sum()), SPAN)
    spans["row"], spans["start"], spans["end"] = row[opens], start[opens], start[last] + job.length
    save_array(job.file("spans", part), spans)
