"""Evaluation items in documents: which document, which item, how much of it.

By n-gram: a field is found where one of its windows of `ngram` words stands in a document (GPT-3, Brown et al. 2020,
appendix C: 13), or all of it, if it is shorter. By near match: where at least `near` of its windows of `near_ngram`
words do, in any order (containment, Broder 1997): a copy with words changed here and there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soma.base import progress
from soma.base.artefact import file_hash, json_hash
from soma.data.config import DecontaminateConfig
from soma.data.decontaminate.items import LEAST_GRAMS, Field, Targets, make_targets, plain
from soma.data.dedup.files import array_hash, map_array, save_array
from soma.data.dedup.substring import window_hashes
from soma.data.dedup.words import Words, parse, word_hashes
from soma.data.workers import Runner, map_tasks

FORMAT = 1  # raise it when the same partitions come to give other matches
BATCH_ROWS = 512
SIEVE_BITS = 22
# `windows`: how many windows of the field stand in the document; `word`: where the first of them does.
MATCH = np.dtype(
    [("row", "<u4"), ("field", "<u4"), ("near", "?"), ("windows", "<u4"), ("overlap", "<f8"), ("word", "<u4")]
)


@dataclass(frozen=True)
class Job:
    """What all tasks of one run know. `parts`: Parquet files with a column `text`."""

    parts: tuple[Path, ...]
    starts: tuple[int, ...]
    folder: Path
    config: DecontaminateConfig

    def file(self, part: int) -> Path:
        return self.folder / "matches" / f"{part:05d}.npy"


Task = tuple[Job, int]
Hits = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Sieve:
    """Membership in a sorted array: a table of bits tells most hashes apart before the search."""

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes = hashes
        self.table = np.zeros(1 << SIEVE_BITS, bool)
        self.table[hashes >> np.uint64(64 - SIEVE_BITS)] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(places of those that are in it, first and last + 1 of their like in the array)."""
        places = np.flatnonzero(self.table[hashes >> np.uint64(64 - SIEVE_BITS)])
        low = np.searchsorted(self.hashes, hashes[places])
        high = np.searchsorted(self.hashes, hashes[places], side="right")
        there = high > low
        return places[there], low[there], high[there]


def find_contamination(
    parts: Sequence[Path],
    used_N: np.ndarray,
    fields: Sequence[Field],
    work: Path,
    config: DecontaminateConfig,
    workers: int = 1,
    runner: Runner = "local",
) -> np.ndarray:
    """All matches, `MATCH` by row and field, rows numbered through the parts; only rows where `used_N` (bool) count."""
    import pyarrow.parquet as pq

    starts = tuple(np.cumsum([0, *(pq.read_metadata(part).num_rows for part in parts)]).tolist())
    assert starts[-1] == len(used_N), "one flag for each row of the partitions"
    settings = config.model_dump(mode="json", exclude={"action"})
    named = [FORMAT, [file_hash(part) for part in parts], settings, array_hash(used_N), [vars(f) for f in fields]]
    job = Job(tuple(parts), starts, work / f"decontaminate-{json_hash(named)[:20]}", config)
    (job.folder / "matches").mkdir(parents=True, exist_ok=True)
    make_targets(fields, config).save(job.folder)
    save_array(job.folder / "used.npy", used_N)
    waiting = [(job, part) for part in range(len(parts)) if not job.file(part).exists()]
    with progress.current().task("decontamination", total=len(parts), unit="parts") as bar:
        bar.skip(len(parts) - len(waiting))
        for _ in map_tasks(find_in_part, waiting, workers, runner):
            bar.advance(1)
    found = [np.zeros(0, MATCH)]
    for part in range(len(parts)):
        matches = np.load(job.file(part))
        matches["row"] += starts[part]
        found.append(matches)
    return np.concatenate(found)


def find_in_part(task: Task) -> None:
    """The matches of one part, rows numbered within it."""
    import pyarrow.parquet as pq

    job, part = task
    finder = Finder(Targets.load(job.folder), job.config)
    used = map_array(job.folder / "used.npy")[job.starts[part] : job.starts[part + 1]]
    found, start = [np.zeros(0, MATCH)], 0
    with pq.ParquetFile(job.parts[part]) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=["text"]):
            rows = np.flatnonzero(used[start : start + len(batch)])
            matches = finder.find(batch.column(0).take(rows).to_pylist())
            matches["row"] = rows[matches["row"]] + start
            start += len(batch)
            found.append(matches)
    save_array(job.file(part), np.concatenate(found))


class Finder:
    """Looks for the targets in batches of texts."""

    def __init__(self, targets: Targets, config: DecontaminateConfig) -> None:
        self.targets, self.config = targets, config
        self.grams, self.heads, self.near = Sieve(targets.grams), Sieve(targets.heads), Sieve(targets.near)

    def find(self, texts: Sequence[str]) -> np.ndarray:
        """Matches by text and field, as `MATCH`: by n-gram where there is one, else near."""
        words = parse([plain(text) for text in texts])
        hashes = word_hashes(words)
        owner = np.repeat(np.arange(len(texts)), np.diff(words.first))
        found = [np.zeros(0, MATCH)]
        config, targets = self.config, self.targets
        sure = self._windows(self.grams, targets.gram_field, words, hashes, owner, config.ngram)
        found.append(self._matches([sure, self._short(words, hashes, owner)], 0))
        if config.near is not None:
            alike = self._windows(self.near, targets.near_field, words, hashes, owner, config.near_ngram)
            likely = self._matches([alike], 1)
            enough = (likely["overlap"] >= config.near) & (targets.sizes[likely["field"], 1] >= LEAST_GRAMS)
            found.append(likely[enough])
        every = np.concatenate(found)
        every = every[np.lexsort((every["near"], every["field"], every["row"]))]
        first = np.ones(len(every), bool)
        first[1:] = (every["row"][1:] != every["row"][:-1]) | (every["field"][1:] != every["field"][:-1])
        return every[first]

    def _windows(
        self, sieve: Sieve, owners: np.ndarray, words: Words, hashes: np.ndarray, owner: np.ndarray, length: int
    ) -> Hits:
        """(text, field, hash, word) of each window of the texts that a field has too."""
        windows = window_hashes(hashes, length)
        places, low, high = sieve.find(windows)
        inside = owner[places] == owner[places + length - 1]
        places, low, high = places[inside], low[inside], high[inside]
        many = high - low
        each = np.repeat(np.arange(len(places)), many)
        member = np.arange(len(each)) - np.repeat(np.cumsum(many) - many, many) + low[each]
        place = places[each]
        return owner[place], owners[member], windows[place], place - words.first[owner[place]]

    def _short(self, words: Words, hashes: np.ndarray, owner: np.ndarray) -> Hits:
        """The fields with fewer than `ngram` words that stand whole in a text."""
        targets, length = self.targets, self.config.min_words
        text, field, _, word = self._windows(self.heads, targets.head_field, words, hashes, owner, length)
        begin = words.first[text] + word
        whole = begin + targets.words[field] <= words.first[text + 1]
        for number in np.flatnonzero(whole).tolist():
            size = int(targets.words[field[number]])
            here = window_hashes(hashes[begin[number] : begin[number] + size], size)[0]
            whole[number] = here == targets.whole[field[number]]
        return text[whole], field[whole], targets.whole[field[whole]], word[whole]

    def _matches(self, parts: Sequence[Hits], kind: int) -> np.ndarray:
        """One `MATCH` for each text and field, with how many of the field's windows were found."""
        text, field, hashes, word = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.lexsort((word, hashes, field, text))
        text, field, hashes, word = text[order], field[order], hashes[order], word[order]
        new = np.ones(len(text), bool)
        new[1:] = (text[1:] != text[:-1]) | (field[1:] != field[:-1])
        distinct = new.copy()
        distinct[1:] |= hashes[1:] != hashes[:-1]
        starts = np.flatnonzero(new)
        found = np.zeros(len(starts), MATCH)
        if len(starts):
            found["row"], found["field"], found["near"] = text[starts], field[starts], bool(kind)
            found["windows"] = np.add.reduceat(distinct.astype(np.int64), starts)
            found["word"] = np.minimum.reduceat(word, starts)
            found["overlap"] = found["windows"] / self.targets.sizes[found["field"], kind]
        return found
