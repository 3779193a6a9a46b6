"""A version of a corpus, read once in parts: mergeable statistics of each part, and its attributes on disk.

A part is a few input files, or a run of row groups of a corpus's Parquet file. Each is read by one worker, which writes
`NNNNN.parquet` (id, split, source, text, `exact`, and the attributes) for what needs a second look, and its `Summary`.
Memory is that of one batch and of the sketches, whatever the size; nothing depends on the number of workers.
"""

import json
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from soma.base import progress
from soma.base.errors import UserError
from soma.data.dedup import exact_key
from soma.data.partitions import _groups as group_items
from soma.data.partitions import text_id
from soma.data.profile.bias import WORD, Bias
from soma.data.profile.counts import character_classes
from soma.data.profile.schema import Fields, fields_of
from soma.data.profile.sketch import Categories, Numbers, Sample
from soma.data.readers import Document, Dropped, read_item
from soma.data.signals.config import Signal
from soma.data.signals.measure import Measurer
from soma.data.sources import Item, Skipped, list_items
from soma.data.workers import Runner, map_tasks

ALL_SIGNALS: tuple[Signal, ...] = ("gopher_quality", "gopher_repetition", "language", "personal")
GROUPS = 16  # row groups of a corpus in a part
BATCH_ROWS = 256
BATCH_CHARS = 4 << 20
SAMPLE = 2000  # documents that drift and anomalies are judged on
WORDS = 50_000  # distinct words that are counted
SAMPLE_WORDS = 20_000  # words of a sampled document that are counted
EXCERPT = 600
LABELS = (
    "label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "emotion", "rating", "stars",
)  # fmt: skip
URLS = ("url", "metadata.url", "meta.url", "warc_headers.warc-target-uri", "uri", "link", "id")
SCRIPTS = {
    "letters": "latin", "latin": "latin", "greek": "greek", "cyrillic": "cyrillic", "hebrew": "hebrew",
    "arabic": "arabic", "indic": "indic", "southeast_asian": "southeast asian", "hangul": "hangul", "cjk": "cjk",
    "kana": "kana", "other": "other",
}  # fmt: skip


SHARES = ("digits", "punctuation", "spaces")  # classes of characters whose share is an attribute


@dataclass(frozen=True)
class Options:
    """How a version is read. `labels`: fields of `meta` that hold labels, beside the usual names."""

    text_field: str = "text"
    signals: tuple[Signal, ...] = ALL_SIGNALS
    labels: tuple[str, ...] = ()
    bias: bool = True
    workers: int = 1
    runner: Runner = "local"


@dataclass(frozen=True)
class Part:
    """One part to read: files, or row groups of a corpus's shard with its split."""

    path: Path
    options: Options
    items: tuple[Item, ...] = ()
    shard: Path | None = None
    split: str = ""
    first: int = 0
    last: int = 0

    @property
    def summary(self) -> Path:
        """Where its statistics wait to be merged."""
        return self.path.with_suffix(".summary")


class Summary:
    """The mergeable statistics of documents."""

    def __init__(self) -> None:
        self.splits: dict[str, Counter[str]] = {}  # documents, bytes, chars
        self.numbers: dict[str, Numbers] = {}
        self.categories = {name: Categories() for name in ("language", "domain", "script", "kind", "file")}
        self.words = Categories(WORDS)
        self.characters: Counter[str] = Counter()
        self.labels: dict[str, dict[str, Categories]] = {}  # field → split → labels
        self.fields: list[tuple[str, Fields]] = []  # of each JSON or Parquet file
        self.continues = False  # the first of these are the fields of later lines of a file that another part began
        self.bad_rows: list[dict[str, Any]] = []
        self.dropped: Counter[str] = Counter()
        self.dropped_examples = Sample(20)
        self.bias: Bias | None = None
        self.sample = Sample(SAMPLE)

    def merge(self, other: "Summary") -> None:
        """Take in another part."""
        for split, counts in other.splits.items():
            self.splits.setdefault(split, Counter()).update(counts)
        for name, numbers in other.numbers.items():
            self.numbers.setdefault(name, Numbers()).merge(numbers)
        for name, categories in other.categories.items():
            self.categories[name].merge(categories)
        self.words.merge(other.words)
        self.characters.update(other.characters)
        for field, splits in other.labels.items():
            for split, labels in splits.items():
                self.labels.setdefault(field, {}).setdefault(split, Categories()).merge(labels)
        fields = other.fields
        if other.continues and self.fields and fields and self.fields[-1][0] == fields[0][0]:
            self.fields[-1][1].merge(fields[0][1])
            fields = fields[1:]
        self.fields += fields
        self.bad_rows = (self.bad_rows + other.bad_rows)[:100]
        self.dropped.update(other.dropped)
        self.dropped_examples.merge(other.dropped_examples)
        if other.bias is not None:
            self.bias = self.bias or Bias()
            self.bias.merge(other.bias)
        self.sample.merge(other.sample)

    @property
    def documents(self) -> int:
        """All documents."""
        return sum(counts["documents"] for counts in self.splits.values())


def is_corpus(path: Path) -> bool:
    """Whether a folder is an artefact of the corpus or instruct stage."""
    return path.is_dir() and any(path.glob("train-[0-9]*.parquet"))


def scan(source: Sequence[str], work: Path, options: Options) -> tuple[Summary, list[Path]]:
    """Read a version: the corpus folder that `source` names alone, or files, folders, globs, addresses.

    Returns its statistics and the parts' files in `work`, in order. Raises UserError where no document is found.
    """
    work.mkdir(parents=True, exist_ok=True)
    total = Summary()
    parts = _parts(source, work, options, total)
    with progress.current().task("profile", total=len(parts), unit="parts") as bar:
        for _ in map_tasks(scan_part, parts, options.workers, options.runner):
            bar.advance(1)
    for part in parts:
        total.merge(pickle.loads(part.summary.read_bytes()))
        part.summary.unlink()
    if not total.documents:
        reasons = ", ".join(f"{count} {reason}" for reason, count in total.dropped.most_common()) or "no files"
        raise UserError(f"{', '.join(source)}: no document there ({reasons})")
    return total, [part.path for part in parts]


def _parts(source: Sequence[str], work: Path, options: Options, total: Summary) -> list[Part]:
    if len(source) == 1 and is_corpus(Path(source[0])):
        return list(_corpus_parts(Path(source[0]), work, options))
    items = []
    for item in list_items(list(source)):
        if isinstance(item, Skipped):
            total.dropped[item.reason] += 1
            total.dropped_examples.add(item.name, (item.name, item.reason, item.detail))
        else:
            items.append(item)
    groups = list(group_items(items))
    return [Part(work / f"{n:05d}.parquet", options, items=tuple(group)) for n, group in enumerate(groups)]


def _corpus_parts(folder: Path, work: Path, options: Options) -> Iterator[Part]:
    import pyarrow.parquet as pq

    number = 0
    for shard in sorted(folder.glob("*-[0-9]*.parquet")):
        split = shard.stem.rpartition("-")[0]
        if split.startswith("attributes-"):
            continue
        groups = pq.ParquetFile(shard).num_row_groups
        for first in range(0, groups, GROUPS):
            path = work / f"{number:05d}.parquet"
            yield Part(path, options, shard=shard, split=split, first=first, last=min(first + GROUPS, groups))
            number += 1


# --- One part ---


def scan_part(part: Part) -> None:
    """Read a part, write its file and beside it its `Summary`.

    On disk, so that whoever merges holds one at a time; as base-85 text of a result one of 10 MB took 0.6 GB more.
    """
    with open(part.summary, "wb") as file:
        pickle.dump(_Reader(part).read(), file)


@dataclass(frozen=True)
class Row:
    """A document with where it belongs."""

    text: str
    source: str
    kind: str
    meta: dict[str, Any]
    split: str


class _Reader:
    """Reads one part batch by batch."""

    def __init__(self, part: Part) -> None:
        self.part, self.options = part, part.options
        self.summary = Summary()
        if self.options.bias:
            self.summary.bias = Bias()
        self.measurer = Measurer(self.options.signals)
        self.file: Any = None

    def read(self) -> Summary:
        import pyarrow as pa
        import pyarrow.parquet as pq

        hidden = self.part.path.with_suffix(".tmp")
        batch: list[Row] = []
        chars = 0
        for row in self._rows():
            batch.append(row)
            chars += len(row.text)
            if len(batch) == BATCH_ROWS or chars >= BATCH_CHARS:
                self._take(batch, hidden)
                batch, chars = [], 0
        if batch:
            self._take(batch, hidden)
        if self.file is None:
            pq.write_table(pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), hidden)
        else:
            self.file.close()
        hidden.replace(self.part.path)
        self.summary.continues = bool(self.part.items) and self.part.items[0].first_line > 1
        for item in self.part.items:
            if item.kind in ("jsonl", "parquet"):
                fields, bad = fields_of(item)
                if fields.rows:
                    self.summary.fields.append((item.name, fields))
                self.summary.bad_rows += bad
        return self.summary

    def _rows(self) -> Iterator[Row]:
        if self.part.shard is not None:
            yield from _corpus_rows(self.part)
        for item in self.part.items:
            for found in read_item(item, self.options.text_field):
                if isinstance(found, Dropped):
                    self.summary.dropped[found.reason] += 1
                    self.summary.dropped_examples.add(found.source, (found.source, found.reason, found.detail))
                else:
                    yield Row(found.text, found.source, found.kind, found.meta, split_of(found))

    def _take(self, rows: Sequence[Row], path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts = [row.text for row in rows]
        ids = [text_id(text) for text in texts]
        words = [Counter(WORD.findall(text.lower())) for text in texts]
        measured = self.measurer.measure(texts)
        values = {name: np.asarray(v, np.float64) for name, v in measured.items() if np.asarray(v).dtype != object}
        sizes = [len(text.encode()) for text in texts]
        values |= {
            "chars": np.array([len(text) for text in texts], np.float64), "bytes": np.array(sizes, np.float64),
            "lines": np.array([text.count("\n") + 1 for text in texts], np.float64),
            "distinct_words": np.array([len(own) for own in words], np.float64),
        }  # fmt: skip
        classes = [character_classes([text]) for text in texts]
        for own in classes:
            self.summary.characters.update(own)
        for name in SHARES:
            values[f"{name}_share"] = np.array([own.get(name, 0) / max(1, sum(own.values())) for own in classes])
        groups = self._groups(rows, classes, measured.get("language"))
        self._count(rows, ids, sizes, words, values, groups)
        table = pa.table(
            {
                "id": pa.array(ids, pa.string()), "split": pa.array([row.split for row in rows], pa.string()),
                "source": pa.array([row.source for row in rows], pa.string()), "text": pa.array(texts, pa.string()),
                "exact": pa.array([exact_key(text)[:8] for text in texts], pa.binary()),
                **{name: pa.array(column, pa.string()) for name, column in groups.items()},
                **{name: pa.array(column) for name, column in sorted(values.items())},
            }
        )  # fmt: skip
        if self.file is None:
            self.file = pq.ParquetWriter(path, table.schema, compression="zstd", store_schema=False)
        self.file.write_table(table)

    def _groups(
        self, rows: Sequence[Row], classes: Sequence[dict[str, int]], languages: Any
    ) -> dict[str, list[str | None]]:
        """The categories of each document; `classes`: its characters by class."""
        scripts = [next((SCRIPTS[name] for name in own if name in SCRIPTS), None) for own in classes]
        found: dict[str, list[str | None]] = {
            "domain": [domain_of(row.meta) for row in rows], "script": scripts, "kind": [row.kind for row in rows],
            "file": [row.source.split("#")[0] for row in rows],
        }  # fmt: skip
        return found | ({"language": [str(code) for code in languages]} if languages is not None else {})

    def _count(
        self,
        rows: Sequence[Row],
        ids: Sequence[str],
        sizes: Sequence[int],
        words: Sequence[Counter[str]],
        values: dict[str, np.ndarray],
        groups: dict[str, list[str | None]],
    ) -> None:
        """Everything that is counted, of one batch."""
        summary = self.summary
        together: Counter[str] = Counter()
        names = sorted(values)
        for place, row in enumerate(rows):
            counts = summary.splits.setdefault(row.split, Counter())
            counts.update({"documents": 1, "bytes": sizes[place], "chars": len(row.text)})
            together.update(words[place])
            if summary.bias is not None:
                summary.bias.add(ids[place], row.source, row.text)
            for field, label in labels_of(row.meta, self.options.labels):
                summary.labels.setdefault(field, {}).setdefault(row.split, Categories()).add([label])
            # Equal texts from two places are two documents, as everywhere else in the figures.
            key = f"{ids[place]} {row.source}"
            if summary.sample.wants(key):
                of_row = {name: column[place] for name, column in groups.items()}
                figures = [float(values[name][place]) for name in names]
                bag = words[place].most_common(SAMPLE_WORDS)
                summary.sample.add(
                    key,
                    {"source": row.source, "split": row.split, "excerpt": row.text[:EXCERPT], "groups": of_row,
                     "values": dict(zip(names, figures, strict=True)), "words": word_bag(bag)},
                )  # fmt: skip
        summary.words.add_counts(together)
        for name, column in values.items():
            summary.numbers.setdefault(name, Numbers()).add(column)
        for name, categories in groups.items():
            summary.categories[name].add(categories)


def word_bag(counts: Sequence[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint64, counts int32): the words of a document in little memory."""
    hashes = np.array([word_key(word) for word, _ in counts], np.uint64)
    return hashes, np.array([count for _, count in counts], np.int32)


def word_key(word: str) -> int:
    """A word as a number, the same in every process (FNV-1a over its bytes, 64 bits)."""
    key = 0xCBF29CE484222325
    for byte in word.encode("utf-8", "replace"):
        key = (key ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return key


def _corpus_rows(part: Part) -> Iterator[Row]:
    """Rows of a corpus's shard, or the messages of instruction data as one text."""
    import pyarrow.parquet as pq

    assert part.shard is not None
    file = pq.ParquetFile(part.shard)
    names = [name for name in ("text", "messages", "source", "kind", "meta") if name in file.schema_arrow.names]
    if "text" not in names and "messages" not in names:
        raise UserError(f"{part.shard}: has neither `text` nor `messages`, so there is no text to profile")
    for batch in file.iter_batches(BATCH_ROWS, row_groups=list(range(part.first, part.last)), columns=names):
        for row in batch.to_pylist():
            text = row.get("text")
            if text is None:
                text = "\n".join(str(message["content"]) for message in json.loads(row["messages"]))
            meta = json.loads(row.get("meta") or "{}")
            yield Row(text, row.get("source") or part.shard.name, row.get("kind") or "text", meta, part.split)


def split_of(document: Document) -> str:
    """The split that a file's name says (`train`, `validation`, `test`), or `all`."""
    name = document.source.split("#")[0].lower()
    for split, words in (("train", ("train",)), ("validation", ("valid", "dev.", "eval")), ("test", ("test",))):
        if any(word in name for word in words):
            return split
    return "all"


def domain_of(meta: dict[str, Any]) -> str | None:
    """The host of a document's address without `www.`, where its metadata has one."""
    for name in URLS:
        value = meta.get(name)
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            try:
                host = urlsplit(value).hostname
            except ValueError:
                return None
            return host.removeprefix("www.") if host else None
    return None


def labels_of(meta: dict[str, Any], asked: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(field, label) of a document's metadata."""
    for field in (*asked, *(name for name in LABELS if name not in asked)):
        value = meta.get(field)
        if isinstance(value, str | int | float | bool):
            yield field, str(value)
