"""Sources to corpus: read, clean, deduplicate, split, write `corpus/` with its report.

`report.json`, made to be drawn:

* `python`, `corpus_hash` (over the sorted ids of all rows): print both beside every figure taken on this corpus.
* `steps`: [{step, documents, bytes}] after `read`, `clean`, `exact`, `near`.
* `splits`: {train, validation: {documents, bytes, chars, lines}}.
* `document_chars`, `line_bytes`: {edges, counts, median, p90, max}; counts[i] values lie in [edges[i], edges[i+1]).
* `characters`: {class: count}. `kinds`: {kind: {documents, bytes}}. `sources`: the 20 largest, [{source, documents,
  bytes}].
* `dropped`: [{reason, count, examples: [{source, detail, excerpt}]}]; all of them are in `dropped.parquet`.
* `near_duplicates`: {threshold, straddle_threshold, bands, rows, candidates, sizes: {cluster size: clusters},
  group_sizes: {group size: groups}, examples: [{kept, dropped, jaccard, excerpt}]}.
"""

import json
import platform
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from soma.base import progress
from soma.base.artefact import hash_lines, write_json
from soma.base.errors import UserError
from soma.data import profile
from soma.data.clean import clean_text, cut_text
from soma.data.config import DataConfig
from soma.data.dedup import NearDuplicates, UnionFind, exact_key, near_duplicates
from soma.data.readers import Document, Dropped, read_item
from soma.data.sources import Skipped, list_items
from soma.data.sources import source_fingerprint as _fingerprint
from soma.data.split import held_out

SPLITS = ("train", "validation")
SHARD_BYTES = 256 << 20  # of text, in one Parquet file
ROW_GROUP = 1024
ID_LENGTH = 32
EXAMPLE_CLUSTERS = 5


@dataclass(slots=True)
class Row:
    """A document on its way through the steps. `whole` names the document that it was cut from, if it was."""

    id: str
    document: Document
    whole: str
    cluster: str = ""


def source_fingerprint(config: DataConfig) -> str:
    """Hash over name and content of every input file (and the Python version where `stdlib:` is read)."""
    return _fingerprint(config.sources)


def text_id(text: str) -> str:
    """A document's id: the first 32 hex digits of the sha256 of its text."""
    return sha256(text.encode()).hexdigest()[:ID_LENGTH]


def build_corpus(config: DataConfig, out: Path) -> None:
    """Fill the directory `out` with `<split>-00000.parquet`…, `dropped.parquet` and `report.json`.

    The bytes depend on the input files' names and contents and on `config` alone. The text of the corpus is held in
    memory (about three times its size). Raises UserError for a source that does not exist and where nothing is left,
    saying what was dropped and why.
    """
    dropped: list[Dropped] = []
    steps: list[dict[str, Any]] = []
    documents = _read(config, dropped)
    _step(steps, "read", documents)
    rows = _clean(config, documents, dropped)
    _step(steps, "clean", [row.document for row in rows])
    if config.dedup.exact:
        rows = _exact(rows, dropped)
        _step(steps, "exact", [row.document for row in rows])
    _require_some(rows, dropped)
    rows.sort(key=lambda row: (row.id, row.document.source))
    rows, near = _near(config, rows, dropped)
    _step(steps, "near", [row.document for row in rows])
    splits = _split(config, rows)
    for split, members in splits.items():
        _write_split(out, split, members)
    write_dropped(out, dropped)
    write_json(out / "report.json", _report(steps, splits, dropped, near))


def _step(steps: list[dict[str, Any]], step: str, documents: Sequence[Document]) -> None:
    size = sum(len(document.text.encode()) for document in documents)
    steps.append({"step": step, "documents": len(documents), "bytes": size})
    progress.current().event("corpus_step", **steps[-1])


def _read(config: DataConfig, dropped: list[Dropped]) -> list[Document]:
    documents = []
    with progress.current().task("read", unit="files") as task:
        for item in list_items(config.sources):
            if isinstance(item, Skipped):
                dropped.append(Dropped(item.name, item.reason, item.detail))
            else:
                for found in read_item(item, config.text_field):
                    if isinstance(found, Document):
                        documents.append(found)
                    else:
                        dropped.append(found)
            task.advance(1, documents=len(documents))
    if not documents:
        _require_some([], dropped)
    return documents


def _clean(config: DataConfig, documents: Sequence[Document], dropped: list[Dropped]) -> list[Row]:
    kept = []
    for document in documents:
        text, reason = clean_text(document.text, config.clean)
        if reason:
            detail = f"{len(text)} characters" if reason == "too_short" else ""
            dropped.append(Dropped(document.source, reason, detail, profile.excerpt(text)))
        else:
            kept.append(replace(document, text=text))
    few = len(kept) < config.min_documents
    limit = config.clean.max_chars
    if few:
        limit = min(limit, max(1000, sum(len(document.text) for document in kept) // config.min_documents))
    rows = []
    for document in kept:
        if len(document.text) <= limit:
            rows.append(Row(text_id(document.text), document, ""))
            continue
        whole = (
            "" if few else text_id(document.text)
        )  # parts of one document stay on one side, unless there are few documents
        for number, part in enumerate(cut_text(document.text, limit)):
            rows.append(Row(text_id(part), replace(document, text=part, meta={**document.meta, "part": number}), whole))
    return rows


def _exact(rows: Sequence[Row], dropped: list[Dropped]) -> list[Row]:
    """One row for each text up to white space: the longest, then the smallest id, then the first source by name."""
    best: dict[bytes, Row] = {}
    for row in sorted(rows, key=lambda row: (-len(row.document.text), row.id, row.document.source)):
        key = exact_key(row.document.text)
        if key in best:
            detail = f"same as {best[key].document.source}"
            dropped.append(Dropped(row.document.source, "exact_duplicate", detail, profile.excerpt(row.document.text)))
        else:
            best[key] = row
    return list(best.values())


def _near(config: DataConfig, rows: Sequence[Row], dropped: list[Dropped]) -> tuple[list[Row], dict[str, Any]]:
    """The survivors, each with the id of its split group as `cluster`, and the report's section. `rows` sorted by
    id.
    """
    groups = UnionFind(len(rows))
    removed: set[int] = set()
    section: dict[str, Any] = {}
    if config.dedup.near:
        with progress.current().task("near-duplicates", total=len(rows), unit="documents") as task:
            near = near_duplicates([row.document.text for row in rows], config.dedup)
            task.advance(len(rows), candidates=near.candidates)
        groups = near.groups
        removed = _drop_near(config, rows, near, dropped)
        section = _near_section(config, rows, near, removed)
    first_part: dict[str, int] = {}
    for index, row in enumerate(rows):
        if row.whole:
            groups.union(first_part.setdefault(row.whole, index), index)
    kept = []
    for index, row in enumerate(rows):
        if index not in removed:
            kept.append(replace(row, cluster=rows[groups.find(index)].id))
    return kept, section


def _drop_near(config: DataConfig, rows: Sequence[Row], near: NearDuplicates, dropped: list[Dropped]) -> set[int]:
    removed = set()
    for members in near.duplicates.groups().values():
        keep = _survivor(config, rows, members)
        for index in members:
            if index != keep:
                removed.add(index)
                document = rows[index].document
                detail = f"like {rows[keep].document.source}"
                dropped.append(Dropped(document.source, "near_duplicate", detail, profile.excerpt(document.text)))
    return removed


def _survivor(config: DataConfig, rows: Sequence[Row], members: Sequence[int]) -> int:
    if config.dedup.keep == "longest":
        return min(members, key=lambda index: (-len(rows[index].document.text), index))
    return min(members)  # rows are sorted by id


def _near_section(config: DataConfig, rows: Sequence[Row], near: NearDuplicates, removed: set[int]) -> dict[str, Any]:
    clusters = near.duplicates.groups()
    examples = []
    for members in sorted((m for m in clusters.values() if len(m) > 1), key=lambda m: (-len(m), m))[:EXAMPLE_CLUSTERS]:
        keep = next(index for index in members if index not in removed)
        inside = [
            j for left, right, j in near.similar if left in members and right in members and j >= config.dedup.threshold
        ]
        examples.append(
            {
                "kept": rows[keep].document.source, "jaccard": round(min(inside), 4),
                "dropped": [rows[index].document.source for index in members if index != keep][:10],
                "excerpt": profile.excerpt(rows[keep].document.text),
            }
        )  # fmt: skip
    return {
        "threshold": config.dedup.threshold, "straddle_threshold": config.dedup.straddle_threshold, "bands": near.bands,
        "rows": near.rows, "candidates": near.candidates, "sizes": profile.size_counts(clusters),
        "group_sizes": profile.size_counts(near.groups.groups()), "examples": examples,
    }  # fmt: skip


def _split(config: DataConfig, rows: Sequence[Row]) -> dict[str, list[Row]]:
    group_bytes: Counter[str] = Counter()
    for row in rows:
        group_bytes[row.cluster] += len(row.document.text.encode())
    out = held_out(group_bytes, config.validation_fraction, config.seed)
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in rows:
        splits["validation" if row.cluster in out else "train"].append(row)
    return splits


def _require_some(rows: Sequence[Row], dropped: Sequence[Dropped]) -> None:
    if rows:
        return
    nothing = "" if dropped else "; the sources hold no files"
    raise UserError(f"data.sources: no document is left{nothing}{profile.drop_summary(dropped)}")


def _report(
    steps: list[dict[str, Any]], splits: dict[str, list[Row]], dropped: list[Dropped], near: dict[str, Any]
) -> dict[str, Any]:
    import numpy as np

    rows = [row for members in splits.values() for row in members]
    documents = [row.document for row in rows]
    texts = [document.text for document in documents]
    return {
        "format": "soma-corpus-report", "version": 1, "python": platform.python_version(),
        "corpus_hash": hash_lines(sorted(row.id for row in rows)), "steps": steps,
        "splits": {split: profile.sizes([row.document for row in members]) for split, members in splits.items()},
        "document_chars": profile.histogram(np.array([len(text) for text in texts])),
        "line_bytes": profile.histogram(profile.line_lengths(texts)),
        "characters": profile.character_classes(texts), "kinds": profile.by_kind(documents),
        "sources": profile.top_sources(documents), "dropped": profile.drop_reasons(dropped),
        "near_duplicates": near,
    }  # fmt: skip


# --- Files ---


def _write_split(out: Path, split: str, rows: Sequence[Row]) -> None:
    columns: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        document = row.document
        columns["id"].append(row.id)
        columns["text"].append(document.text)
        columns["source"].append(document.source)
        columns["meta"].append(json.dumps(document.meta, sort_keys=True, ensure_ascii=False))
        columns["kind"].append(document.kind)
        columns["n_bytes"].append(len(document.text.encode()))
        columns["n_chars"].append(len(document.text))
        columns["cluster"].append(row.cluster)
    names = ["id", "text", "source", "meta", "kind", "n_bytes", "n_chars", "cluster"]
    write_shards(out, split, {name: columns[name] for name in names}, columns["n_bytes"])


def write_shards(out: Path, split: str, columns: dict[str, list[Any]], row_bytes: Sequence[int]) -> None:
    """`<split>-00000.parquet`… with at most `SHARD_BYTES` of text each (one file at least, also for no rows)."""
    start, size, shard = 0, 0, 0
    for end, row_size in enumerate([*row_bytes, SHARD_BYTES], start=0):
        if end == len(row_bytes) or (end > start and size + row_size > SHARD_BYTES):
            write_parquet(
                out / f"{split}-{shard:05d}.parquet", {name: values[start:end] for name, values in columns.items()}
            )
            start, size, shard = end, 0, shard + 1
        size += row_size


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    """One Parquet file whose bytes depend on the values alone. Lists of int become int64, all others strings."""
    import pyarrow
    import pyarrow.parquet as pq

    kinds = {name: pyarrow.int64() if name.startswith("n_") else pyarrow.string() for name in columns}
    table = pyarrow.table({name: pyarrow.array(values, kinds[name]) for name, values in columns.items()})
    pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP, store_schema=False)


def write_dropped(out: Path, dropped: list[Dropped]) -> None:
    """`dropped.parquet`, in an order that does not depend on the order of reading."""
    items = profile.ordered(dropped)
    names = ("source", "reason", "detail", "excerpt")
    write_parquet(out / "dropped.parquet", {name: [getattr(item, name) for item in items] for name in names})


def read_corpus(corpus: Path, split: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a split as dictionaries, in order of their id. Raises UserError where a file is missing or broken."""
    import pyarrow
    import pyarrow.parquet as pq

    files = sorted(corpus.glob(f"{split}-[0-9]*.parquet"))
    if not files:
        raise UserError(f"{corpus}: no {split}-00000.parquet; this is not a corpus folder (`soma run` makes one)")
    for path in files:
        try:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=list(columns) if columns else None):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
