"""Sources to corpus: read, clean, deduplicate, split, write `corpus/` with its report.

Partitions (`partitions.py`) → index of all documents (`index.py`) → duplicates → split → rows sorted by id. No step
holds all of the text: the index takes some 150 bytes of memory a document, its MinHash signature 4 bytes a hash, and
the sort goes through buckets on disk.

`report.json`, made to be drawn:

* `python`, `corpus_hash` (over the sorted ids of all rows): print both beside every figure taken on this corpus.
* `steps`: [{step, documents, bytes}] after `read`, `clean`, `filters` (where there are some), `exact`, `near`,
  and where they are asked for `semantic`, `decontaminate`, `substring` (`lines` where repeated lines go too).
* `splits`: {train, validation: {documents, bytes, chars, lines}}.
* `document_chars`, `line_bytes`: {edges, counts, median, p90, max}; counts[i] values lie in [edges[i], edges[i+1]).
* `characters`: {class: count}. `kinds`: {kind: {documents, bytes}}. `sources`: the 20 largest, [{source, documents,
  bytes}].
* `dropped`: [{reason, count, examples: [{source, detail, excerpt}]}]; all of them are in `dropped.parquet`.
* `near_duplicates`: {threshold, straddle_threshold, bands, rows, candidates, sizes: {cluster size: clusters},
  group_sizes: {group size: groups}, examples: [{kept, dropped, jaccard, excerpt}]}.
* `contamination`, where evaluation sets are kept out: {action, documents, sets: [{set, fields, found}], examples}; all
  matches are in `contamination.parquet` (see `soma.data.decontaminate.corpus`).
* `repeated_text`, where substrings are looked for: {unit, length, action, documents, spans, units, bytes, examples:
  [{source, left, characters}]}.
* `repeated_lines`, where they are looked for: {in_documents, action, distinct, documents, lines, bytes, examples:
  [{line, documents}]}, the most frequent first.
"""

import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from soma.base import progress
from soma.base.artefact import hash_lines, read_json, write_json, write_text
from soma.base.errors import UserError
from soma.data import profile
from soma.data.attributes import AttributeFiles, drop_filtered, read_attributes
from soma.data.config import DataConfig
from soma.data.decontaminate.corpus import drop_contaminated
from soma.data.dedup.against import open_old
from soma.data.duplicates import drop_exact, drop_known, drop_near, drop_semantic
from soma.data.index import Index
from soma.data.partitions import Partition, disk_may_be_full, make_partitions
from soma.data.partitions import text_id as text_id
from soma.data.profile.card import data_card
from soma.data.readers import Dropped
from soma.data.repeats import Repeats
from soma.data.shards import DropLog, ShardWriter
from soma.data.shards import read_corpus as read_corpus
from soma.data.shards import write_dropped as write_dropped
from soma.data.shards import write_parquet as write_parquet
from soma.data.shards import write_shards as write_shards
from soma.data.signals.measure import Scorer
from soma.data.signals.scorers import open_scorer
from soma.data.sources import Item, Skipped, list_items
from soma.data.sources import source_fingerprint as _fingerprint
from soma.data.split import held_out

SPLITS = ("train", "validation")
ATTRIBUTE = "attribute:"  # before the names of attributes while they travel with their row
BUCKET_BYTES = 48 << 20  # of text, sorted at once
ROWS = ("id", "text", "source", "meta", "kind", "n_bytes", "n_chars", "cluster")


def source_fingerprint(config: DataConfig) -> str:
    """Hash over name and content of every input file (and the Python version where `stdlib:` is read), and over the
    file of a scorer that has one."""
    found = _fingerprint(config.sources)
    if config.scorer is not None and config.scorer.startswith(("words:", "linear:")):
        found = hash_lines([found, open_scorer(config.scorer).name])
    return found


def build_documents(config: DataConfig, out: Path, state: Path | None = None, scorer: Scorer | None = None) -> None:
    """Fill the directory `out` with what does not depend on any threshold, for `build_corpus` to decide on.

    `partitions/` with texts, MinHash signatures and attributes, `skipped.parquet`: files that were not read.
    """
    with disk_may_be_full(out), _workplace(state, out) as work:
        skipped = DropLog()
        partitions = make_partitions(config, _items(config, skipped), work / "partitions", scorer)
        (out / "partitions").mkdir()
        for partition in partitions:
            for path in work.glob(f"partitions/{partition.path.stem}.*"):
                shutil.copyfile(path, out / "partitions" / path.name)
        skipped.write(out / "skipped.parquet")


def _documents(
    config: DataConfig, made: Path | None, work: Path, dropped: DropLog, scorer: Scorer | None
) -> list[Partition]:
    """The partitions of a `build_documents` folder, or made here."""
    import pyarrow.parquet as pq

    if made is None:
        return make_partitions(config, _items(config, dropped), work / "partitions", scorer)
    dropped.extend(pq.read_table(made / "skipped.parquet"))
    return [Partition(path.with_suffix(".parquet"), read_json(path)) for path in sorted(made.glob("partitions/*.json"))]


def build_corpus(
    config: DataConfig,
    out: Path,
    state: Path | None = None,
    documents: Path | None = None,
    scorer: Scorer | None = None,
) -> None:
    """Fill the directory `out` with `<split>-00000.parquet`…, `dropped.parquet`, `report.json` and the data card.

    The bytes depend on the input files' names and contents and on `config` alone. `state`: a folder that survives a
    kill; partitions that lie there are not made again. `documents`: a folder of `build_documents` with these
    settings; then no source is read and no signal computed. `scorer`: the model of the `quality` filter. Raises
    UserError for a source that does not exist and where nothing is left, saying what was dropped and why.
    """
    with disk_may_be_full(out), _workplace(state, out) as work:
        dropped = DropLog()
        partitions = _documents(config, documents, work, dropped, scorer)
        steps: list[dict[str, Any]] = []
        for step in ("read", "clean"):
            counts = np.array([partition.facts["steps"][step] for partition in partitions]).reshape(-1, 2).sum(0)
            _step(steps, step, *counts.tolist())
        index = Index(partitions)
        if config.filters is not None:
            drop_filtered(config, index)
            _kept_step(steps, "filters", index)
        old = open_old(config.dedup.against, config.dedup)
        if config.dedup.exact:
            drop_known(index, old)
            drop_exact(index)
            _kept_step(steps, "exact", index)
        clusters_N, near = drop_near(config, index, work / "near", old)
        _kept_step(steps, "near", index)
        sections = {"near_duplicates": near}
        if config.dedup.semantic is not None:
            drop_semantic(config, index, work / "near")
            _kept_step(steps, "semantic", index)
        if config.decontaminate is not None:
            sections["contamination"] = drop_contaminated(config, index, work / "near", out)
            _kept_step(steps, "decontaminate", index)
        repeats = Repeats(config, index, work / "near")
        if repeats.sections:
            sections |= repeats.sections
            _kept_step(steps, "substring" if config.dedup.lines is None else "lines", index)
        split_N = _split(config, index, clusters_N)
        counted = _write(out, work, index, repeats, clusters_N, split_N, dropped)
        report = _report(index, steps, sections, counted, dropped)
        write_json(out / "report.json", report)
        write_text(out / "README.md", data_card(config, report))


@contextmanager
def _workplace(state: Path | None, out: Path) -> Iterator[Path]:
    """`state`, or a temporary folder beside `out`."""
    if state is not None:
        state.mkdir(parents=True, exist_ok=True)
        yield state
        return
    with tempfile.TemporaryDirectory(prefix=".corpus-", dir=out.parent) as work:
        yield Path(work)


def _step(steps: list[dict[str, Any]], step: str, documents: int, size: int) -> None:
    steps.append({"step": step, "documents": documents, "bytes": size})
    progress.current().event("corpus_step", **steps[-1])


def _kept_step(steps: list[dict[str, Any]], step: str, index: Index) -> None:
    _step(steps, step, int(index.kept_N.sum()), int(index.column("n_bytes")[index.kept_N].sum()))


def _items(config: DataConfig, dropped: DropLog) -> list[Item]:
    found = []
    for item in list_items(config.sources):
        if isinstance(item, Skipped):
            dropped.add(Dropped(item.name, item.reason, item.detail))
        else:
            found.append(item)
    return found


# --- The split ---


def _split(config: DataConfig, index: Index, clusters_N: np.ndarray) -> np.ndarray:
    """For every row of the index the number of its split in `SPLITS`."""
    split_N = np.zeros(len(index), np.int8)
    if not index.kept_N.any():
        return split_N
    sizes_N = np.bincount(clusters_N, np.where(index.kept_N, index.column("n_bytes"), 0), len(index)).astype(np.int64)
    used = np.unique(clusters_N[index.kept_N])
    names = index.table["id"].take(used).to_pylist()
    group_bytes: Counter[str] = Counter()
    for name, size in zip(names, sizes_N[used].tolist(), strict=True):
        group_bytes[name] += size
    out = held_out(group_bytes, config.validation_fraction, config.seed)
    held = np.zeros(len(index), bool)
    held[used] = [name in out for name in names]
    return held[clusters_N].astype(np.int8)


# --- Writing ---


def _write(
    out: Path,
    work: Path,
    index: Index,
    repeats: Repeats,
    clusters_N: np.ndarray,
    split_N: np.ndarray,
    dropped: DropLog,
) -> profile.Profile:
    """The shards and `dropped.parquet`; what was counted on the way. Raises UserError where no row is left."""
    import pyarrow.parquet as pq

    buckets = work / "buckets"
    shutil.rmtree(buckets, ignore_errors=True)
    buckets.mkdir()
    files = _scatter(buckets, index, repeats, clusters_N, split_N, dropped)
    for partition in index.partitions:
        dropped.extend(pq.read_table(partition.dropped))
    if not index.kept_N.any():
        summary = profile.drop_summary(dropped.items()) or "; the sources hold no files"
        raise UserError(f"data.sources: no document is left{summary}")
    dropped.write(out / "dropped.parquet")
    counted = profile.Profile(SPLITS)
    writers = [ShardWriter(out, split, ROWS) for split in SPLITS]
    attributes = AttributeFiles(out, SPLITS)
    for path in files:
        _sorted_rows(path, writers, attributes, counted)
        path.unlink()
    for writer in writers:
        writer.close()
    attributes.close()
    return counted


def _scatter(
    buckets: Path, index: Index, repeats: Repeats, clusters_N: np.ndarray, split_N: np.ndarray, dropped: DropLog
) -> list[Path]:
    """Rows to buckets by the first digits of their id, in which they are sorted afterwards; the others are logged."""
    import pyarrow as pa

    total = int(index.column("n_bytes")[index.kept_N].sum())
    count = max(1, -(-total // BUCKET_BYTES))
    paths = [buckets / f"{number:05d}.arrow" for number in range(count)]
    files: list[Any] = [None] * count
    row = 0
    for partition in index.partitions:
        measured = read_attributes(partition) if partition.attributes.exists() else None
        first = row
        for batch in partition.batches(ROWS[:-1]):
            rows = np.arange(row, row + len(batch))
            row += len(batch)
            _log(index, rows[~index.kept_N[rows]], rows[0], batch, dropped)
            rows, batch = rows[index.kept_N[rows]], batch.filter(pa.array(index.kept_N[rows]))
            batch = repeats.apply(rows, batch)
            clusters = index.table["id"].take(clusters_N[rows]).combine_chunks()
            batch = batch.append_column("cluster", clusters).append_column("split", pa.array(split_N[rows]))
            if measured is not None:
                beside = measured.take(rows - first).drop_columns("id").combine_chunks()
                for name in beside.column_names:
                    column = beside[name].combine_chunks()
                    batch = batch.append_column(ATTRIBUTE + name, column)
            owner = np.array([int(name[:8], 16) * count >> 32 for name in batch["id"].to_pylist()], np.int64)
            for number in np.unique(owner).tolist():
                if files[number] is None:
                    options = pa.ipc.IpcWriteOptions(compression="zstd")
                    files[number] = pa.ipc.new_stream(paths[number], batch.schema, options=options)
                files[number].write_batch(batch.filter(pa.array(owner == number)))
    for file in files:
        if file is not None:
            file.close()
    return [path for path, file in zip(paths, files, strict=True) if file is not None]


def _log(index: Index, rows: np.ndarray, first: int, batch: Any, dropped: DropLog) -> None:
    words = {"exact_duplicate": "same as", "near_duplicate": "like", "semantic_duplicate": "says what is in"}
    for row in rows.tolist():
        reason = index.reasons[index.reason_N[row]]
        detail = index.details.get(row) or f"{words[reason]} {index.string('source', index.twin_N[row])}"
        text = batch["text"][row - first].as_py()
        dropped.add(Dropped(index.string("source", row), reason, detail, profile.excerpt(text)))


def _sorted_rows(
    path: Path, writers: Sequence[ShardWriter], attributes: AttributeFiles, counted: profile.Profile
) -> None:
    """One bucket, sorted, to the writers of the splits."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with pa.ipc.open_stream(path) as stream:
        table = stream.read_all()
    table = table.sort_by([("id", "ascending"), ("source", "ascending")])
    names = [name for name in table.column_names if name.startswith(ATTRIBUTE)]
    for number, writer in enumerate(writers):
        rows = table.filter(pc.equal(table["split"], number))
        if names and len(rows):
            beside = rows.select(["id", *names])
            attributes.add(
                number, beside.rename_columns([name.removeprefix(ATTRIBUTE) for name in beside.column_names])
            )
        for batch in rows.select(ROWS).to_batches(max_chunksize=1024):
            columns = batch.to_pydict()
            counted.add(number, columns)
            writer.add(columns, columns["n_bytes"])


def _report(
    index: Index, steps: list[dict[str, Any]], sections: dict[str, Any], counted: profile.Profile, dropped: DropLog
) -> dict[str, Any]:
    ids = index.table["id"].take(index.order(("id", "ascending")))
    return {
        "format": "soma-corpus-report", "version": 1, "python": platform.python_version(),
        "corpus_hash": hash_lines(value.as_py() for value in ids), "steps": steps, **counted.figures(),
        "dropped": profile.drop_reasons(dropped.items()), **sections,
    }  # fmt: skip
