"""Documents on disk in partitions: a few input files or lines of a large one, read, cleaned, cut and measured once.

`partitions/NNNNN-KEY.parquet` holds the columns of `schema()`, rows in the order of reading; beside it lie
`….dropped.parquet` (what was set aside), `….attributes.parquet` (where signals are measured) and, written last,
`….json` (counts): where that is, the partition is whole. KEY is a hash over names and contents of the input files and
over the settings that count, so a killed run goes on with what is there, and no number of workers changes a byte.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from soma.base import progress
from soma.base.artefact import json_hash, read_json, write_json
from soma.base.disk import full
from soma.base.errors import UserError
from soma.data.clean import clean_text, cut_text
from soma.data.config import DataConfig
from soma.data.dedup import exact_key
from soma.data.dedup.minhash import minhash_words
from soma.data.dedup.words import parse
from soma.data.profile import excerpt
from soma.data.ranges import split_item
from soma.data.readers import Document, Dropped, read_item
from soma.data.shards import DropLog
from soma.data.signals.measure import Measurer, Scorer
from soma.data.signals.personal import mask
from soma.data.signals.scorers import open_scorer
from soma.data.sources import Item
from soma.data.workers import map_tasks

FORMAT = 2  # raise it when the same input comes to give other partitions
PARTITION_BYTES = 32 << 20  # of input files, as they lie there
PARTITION_FILES = 2000
GUESSED_BYTES = 8 << 20  # of a file whose size is not known
BATCH_ROWS = 512  # a row group: what is held in memory …
BATCH_BYTES = 4 << 20  # … or as soon as its text has this many characters
ID_LENGTH = 32


@dataclass(frozen=True)
class Cut:
    """Documents longer than `limit` characters are cut; `few`: their parts need not stay on one side of the split."""

    limit: int
    few: bool = False


@dataclass(frozen=True)
class Task:
    """One partition to make."""

    path: Path
    items: tuple[Item, ...]
    config: DataConfig
    cut: Cut
    scorer: Scorer | None = None


@dataclass(frozen=True)
class Partition:
    """A partition that is there; `facts`: rows, and documents and bytes after each step of reading."""

    path: Path
    facts: dict[str, Any]

    @property
    def dropped(self) -> Path:
        """What was set aside on the way."""
        return self.path.with_suffix(".dropped.parquet")

    @property
    def attributes(self) -> Path:
        """A row of attributes for each row, where signals are measured."""
        return self.path.with_suffix(".attributes.parquet")

    def batches(self, columns: Sequence[str], rows: int = BATCH_ROWS) -> Iterator[Any]:
        """Arrow record batches of these columns, in order."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            yield from file.iter_batches(batch_size=rows, columns=list(columns))


def schema(hashes: int | None) -> Any:
    """id, text, source, meta (JSON), kind; `whole`: id of the document that this is a part of, or empty; `exact`:
    `dedup.exact_key`; n_bytes, n_chars; `signatures` (uint32, `hashes` of them) where near-duplicates are looked for.
    """
    import pyarrow as pa

    fields = [(name, pa.string()) for name in ("id", "text", "source", "meta", "kind", "whole")]
    fields += [("exact", pa.binary()), ("n_bytes", pa.int64()), ("n_chars", pa.int64())]
    if hashes is not None:
        fields.append(("signatures", pa.list_(pa.uint32(), hashes)))
    return pa.schema(fields)


def text_id(text: str) -> str:
    """A document's id: the first 32 hex digits of the sha256 of its text."""
    return sha256(text.encode()).hexdigest()[:ID_LENGTH]


def make_partitions(
    config: DataConfig, items: Sequence[Item], folder: Path, scorer: Scorer | None = None
) -> list[Partition]:
    """All partitions of these files, in order; those that are there already are not made again.

    `scorer`: for the `quality` filter, instead of the one that it names; with several workers it must be picklable.
    With fewer documents than `config.min_documents` long ones are cut shorter, so that some text can be held out.
    """
    if "quality" in config.signals and scorer is None:
        if config.scorer is None:
            raise UserError("data.filters.quality: no scorer was given; name one (`words:PATH` or an http address)")
        scorer = open_scorer(config.scorer)
    made = _make(config, items, folder, Cut(config.clean.max_chars), scorer)
    documents = sum(partition.facts["documents"] for partition in made)
    chars = sum(partition.facts["chars"] for partition in made)
    if documents < config.min_documents:
        limit = min(config.clean.max_chars, max(1000, chars // config.min_documents))
        made = _make(config, items, folder, Cut(limit, few=True), scorer)
    return made


def _make(config: DataConfig, items: Sequence[Item], folder: Path, cut: Cut, scorer: Scorer | None) -> list[Partition]:
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [
        Task(folder / f"{number:05d}-{_key(config, group, cut, scorer)}.parquet", tuple(group), config, cut, scorer)
        for number, group in enumerate(_groups(items))
    ]
    waiting = [task for task in tasks if not _facts_path(task.path).exists()]
    with progress.current().task("read", total=len(tasks), unit="partitions") as bar:
        bar.skip(len(tasks) - len(waiting))
        documents = 0
        for _, facts in map_tasks(make_partition, waiting, config.workers, config.runner):
            documents += facts["documents"]
            bar.advance(1, documents=documents)
    return [Partition(task.path, read_json(_facts_path(task.path))) for task in tasks]


def _groups(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Runs of files, each of about `PARTITION_BYTES`; a larger file in ranges of its own where it can be split."""
    group: list[Item] = []
    size = 0
    for item in chain.from_iterable(split_item(item, PARTITION_BYTES) for item in items):
        more = GUESSED_BYTES if item.size is None else PARTITION_BYTES if item.ranged else item.size
        if group and (size + more > PARTITION_BYTES or len(group) == PARTITION_FILES):
            yield group
            group, size = [], 0
        group.append(item)
        size += more
    if group:
        yield group


def _key(config: DataConfig, items: Sequence[Item], cut: Cut, scorer: Scorer | None) -> str:
    settings = {**config.of_documents(), "sources": None, "cut": [cut.limit, cut.few]}
    files = [[item.name, item.kind, item.compression, item.first_line, item.content_hash()] for item in items]
    return json_hash([FORMAT, settings, scorer.name if scorer is not None else None, files])[:20]


def _facts_path(path: Path) -> Path:
    return path.with_suffix(".json")


# --- One partition ---


@contextmanager
def disk_may_be_full(folder: Path) -> Iterator[None]:
    """A full disk as an error that says what to do."""
    try:
        yield
    except OSError as error:
        if full(error) is None:
            raise
        raise UserError(
            f"{folder}: the disk is full. What is done is kept: make room and run the same command again"
        ) from None


def make_partition(task: Task) -> dict[str, Any]:
    """Write a partition's files, each under another name first. Returns its facts. Raises UserError on a full disk."""
    with disk_may_be_full(task.path.parent):
        return _Maker(task).make()


class _Maker:
    """Reads the files of one task and writes rows batch by batch."""

    def __init__(self, task: Task) -> None:
        self.task, self.config = task, task.config
        self.drops = DropLog()
        self.waiting: list[tuple[Document, str]] = []  # (document, whole)
        self.waiting_chars = 0
        steps = {"read": [0, 0], "clean": [0, 0]}  # documents, bytes
        self.facts: dict[str, Any] = {"documents": 0, "chars": 0, "rows": 0, "steps": steps}
        self.measurer = Measurer(self.config.signals, task.scorer) if self.config.signals else None
        self.attributes: Any = None

    def make(self) -> dict[str, Any]:
        import pyarrow.parquet as pq

        task = self.task
        self.schema = schema(self.config.dedup.num_hashes if self.config.dedup.near else None)
        names = ("rows", "dropped", "attributes")
        self.hidden = hidden = {name: task.path.with_name(f".{task.path.name}.{os.getpid()}.{name}") for name in names}
        try:
            with pq.ParquetWriter(hidden["rows"], self.schema, compression="zstd", store_schema=False) as self.file:
                for item in task.items:
                    for found in read_item(item, self.config.text_field, self.config.html == "main"):
                        self._take(found)
                self._flush()
            self.drops.write(hidden["dropped"])
            hidden["dropped"].replace(task.path.with_suffix(".dropped.parquet"))
            if self.attributes is not None:
                self.attributes.close()
                hidden["attributes"].replace(task.path.with_suffix(".attributes.parquet"))
            hidden["rows"].replace(task.path)
        finally:
            for path in hidden.values():
                path.unlink(missing_ok=True)
        write_json(_facts_path(task.path), self.facts)
        return self.facts

    def _take(self, found: Document | Dropped) -> None:
        if isinstance(found, Dropped):
            self.drops.add(found)
            return
        self._count("read", found.text)
        text, reason = clean_text(found.text, self.config.clean)
        if reason:
            detail = f"{len(text)} characters" if reason == "too_short" else ""
            self.drops.add(Dropped(found.source, reason, detail, excerpt(text)))
            return
        if self.config.clean.mask_personal:
            text, masked = mask(text)
            if masked:
                found.meta["masked"] = dict(sorted(masked.items()))
        self.facts["documents"] += 1
        self.facts["chars"] += len(text)
        limit = self.task.cut.limit
        if len(text) <= limit:
            self._wait(replace(found, text=text), "")
            return
        # Parts of one document stay on one side of the split, unless there are few documents.
        whole = "" if self.task.cut.few else text_id(text)
        for number, part in enumerate(cut_text(text, limit)):
            self._wait(replace(found, text=part, meta={**found.meta, "part": number}), whole)

    def _count(self, step: str, text: str) -> None:
        counts = self.facts["steps"][step]
        counts[0] += 1
        counts[1] += len(text) if text.isascii() else len(text.encode())

    def _wait(self, document: Document, whole: str) -> None:
        self.waiting.append((document, whole))
        self.waiting_chars += len(document.text)
        self._count("clean", document.text)
        if len(self.waiting) == BATCH_ROWS or self.waiting_chars >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Write the rows that wait as one row group."""
        import pyarrow as pa

        documents = [document for document, _ in self.waiting]
        texts = [document.text for document in documents]
        columns: dict[str, Any] = {
            "id": [text_id(text) for text in texts], "text": texts,
            "source": [document.source for document in documents],
            "meta": [json.dumps(document.meta, sort_keys=True, ensure_ascii=False) for document in documents],
            "kind": [document.kind for document in documents], "whole": [whole for _, whole in self.waiting],
            "exact": [exact_key(text) for text in texts], "n_bytes": [len(text.encode()) for text in texts],
            "n_chars": [len(text) for text in texts],
        }  # fmt: skip
        if self.config.dedup.near:
            signatures_NH = minhash_words(parse(texts), self.config.dedup)
            flat = pa.array(signatures_NH.ravel())
            columns["signatures"] = pa.FixedSizeListArray.from_arrays(flat, signatures_NH.shape[1])
        if self.measurer is not None:
            self._measure(columns["id"], texts)
        if texts:
            self.file.write_table(pa.table(columns, self.schema))
        self.facts["rows"] += len(texts)
        self.waiting, self.waiting_chars = [], 0

    def _measure(self, ids: list[str], texts: list[str]) -> None:
        """Write the attributes of these rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert self.measurer is not None
        found = self.measurer.measure(texts)
        kinds = {name: pa.string() if values.dtype == object else None for name, values in found.items()}
        arrays = {name: pa.array(values, kinds[name]) for name, values in found.items()}
        table = pa.table({"id": pa.array(ids, pa.string()), **arrays})
        if self.attributes is None:
            path = self.hidden["attributes"]
            self.attributes = pq.ParquetWriter(path, table.schema, compression="zstd", store_schema=False)
        self.attributes.write_table(table)
