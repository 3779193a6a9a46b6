"""What stands twice: exact and near-duplicates in a version, and across its splits; and how labels are balanced."""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soma.data.config import DedupConfig
from soma.data.dedup.near import near_partitions
from soma.data.profile.counts import excerpt
from soma.data.profile.significance import chi_square
from soma.data.profile.sketch import Categories
from soma.data.workers import Runner

EXAMPLES = 5
LISTED = 20
ENOUGH = 5.0  # expected in a cell of a chi-square table, else cells are joined (Cochran 1954)


def columns(parts: Sequence[Path], names: Sequence[str]) -> dict[str, Any]:
    """Columns of all parts, one after the other; parts without documents are passed over."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, columns=list(names)) for path in parts if pq.ParquetFile(path).metadata.num_rows]
    table = pa.concat_tables(tables)
    return {name: table[name] for name in names}


def exact_duplicates(parts: Sequence[Path]) -> dict[str, Any]:
    """`{"documents", "duplicates", "share", "across": [{from, to, documents, share}], "examples"}`.

    `duplicates`: documents that stand before, up to white space; `across`: documents of split `to` that stand in
    `from`. Takes some 20 bytes of memory a document.
    """
    found = columns(parts, ["exact", "split"])
    keys = np.frombuffer(b"".join(found["exact"].to_pylist()), np.uint64)
    split_names, split_N = np.unique(found["split"].to_numpy(), return_inverse=True)
    first = np.unique(keys, return_index=True)[1]
    twice = np.ones(len(keys), bool)
    twice[first] = False
    across = []
    for source, target in _pairs(split_names):
        mine, theirs = split_N == source, split_N == target
        hits = np.flatnonzero(theirs)[np.isin(keys[theirs], keys[mine])]
        across.append(_across(split_names, source, target, hits, int(theirs.sum())))
    return {
        "documents": len(keys), "duplicates": int(twice.sum()), "share": float(twice.mean()), "across": across,
        "examples": _examples(parts, np.flatnonzero(twice)[:EXAMPLES]),
    }  # fmt: skip


def near_duplicates(parts: Sequence[Path], work: Path, workers: int = 1, runner: Runner = "local") -> dict[str, Any]:
    """The same with near-duplicates (MinHash, verified; `DedupConfig`'s thresholds), `pairs` instead of `examples`."""
    config = DedupConfig()
    found = columns(parts, ["split"])
    split_names, split_N = np.unique(found["split"].to_numpy(), return_inverse=True)
    near = near_partitions(parts, np.arange(len(split_N)), work, config, workers, runner)
    labels = near.duplicates
    twice = labels != np.arange(len(labels))
    across = []
    for source, target in _pairs(split_names):
        theirs = split_N == target
        hits = np.flatnonzero(theirs)[np.isin(labels[theirs], labels[split_N == source])]
        across.append(_across(split_names, source, target, hits, int(theirs.sum())))
    alike = near.similar[near.similar["jaccard"] >= config.threshold]
    crossing = split_N[alike["left"]] != split_N[alike["right"]]
    order = np.lexsort((alike["right"], alike["left"], -alike["jaccard"], ~crossing))[:EXAMPLES]
    pairs = [
        {"jaccard": round(float(pair["jaccard"]), 4),
         "documents": _examples(parts, np.array([pair["left"], pair["right"]]))}
        for pair in alike[order]
    ]  # fmt: skip
    return {
        "documents": len(labels), "duplicates": int(twice.sum()), "share": float(twice.mean()), "across": across,
        "threshold": config.threshold, "pairs": pairs,
    }  # fmt: skip


def _pairs(splits: np.ndarray) -> list[tuple[int, int]]:
    """(split, other split): what is in the first counts as known; train comes before what is held out."""
    order = sorted(range(len(splits)), key=lambda index: (splits[index] != "train", str(splits[index])))
    return [(order[i], order[j]) for i in range(len(order)) for j in range(i + 1, len(order))]


def _across(names: np.ndarray, source: int, target: int, hits: np.ndarray, count: int) -> dict[str, Any]:
    return {
        "from": str(names[source]), "to": str(names[target]), "documents": len(hits),
        "share": len(hits) / count if count else 0.0,
    }  # fmt: skip


def _examples(parts: Sequence[Path], rows: np.ndarray) -> list[dict[str, str]]:
    return [
        {"source": str(row["source"]), "split": str(row["split"]), "excerpt": excerpt(str(row["text"]))}
        for row in take_rows(parts, rows, ["source", "split", "text"])
    ]


def take_rows(parts: Sequence[Path], rows: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows by their number over all parts, in the order asked for; one row group in memory at a time."""
    import pyarrow.parquet as pq

    wanted = sorted({int(row) for row in rows})
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for path in parts:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                mine = wanted[bisect_left(wanted, start) : bisect_left(wanted, end)]
                if mine:
                    table = file.read_row_group(group, columns=list(names)).take([row - start for row in mine])
                    found |= dict(zip(mine, table.to_pylist(), strict=True))
                start = end
    return [found[int(row)] for row in rows]


# --- Labels ---


def label_balance(labels: dict[str, dict[str, Categories]]) -> list[dict[str, Any]]:
    """[{field, labels: [{label, counts: {split: count}, share}], distinct, ratio, evenness, splits: {v, p}}].

    `ratio`: the most frequent label's count over the least frequent's; `evenness`: entropy over its largest value, 1
    where all are equally frequent (Pielou 1966); `splits`: Cramér's V and p of labels between train and the others.
    """
    found = []
    for field, by_split in sorted(labels.items()):
        together = Categories()
        for counts in by_split.values():
            together.merge(counts)
        if together.distinct > max(50, together.count // 10):
            continue  # an id or free text, no label
        values = np.array([count for _, count in together.ranked()], np.float64)
        shares = values / values.sum()
        entropy = float(-(shares * np.log(shares)).sum())
        rows = [
            {"label": name, "share": count / together.count,
             "counts": {split: counts.counts[name] for split, counts in sorted(by_split.items())}}
            for name, count in together.ranked(LISTED)
        ]  # fmt: skip
        found.append(
            {"field": field, "labels": rows, "distinct": together.distinct, "count": together.count,
             "ratio": float(values.max() / values.min()),
             "evenness": entropy / float(np.log(len(values))) if len(values) > 1 else 1.0,
             "splits": _between_splits(by_split)}
        )  # fmt: skip
    return found


def _between_splits(by_split: dict[str, Categories]) -> dict[str, float] | None:
    if len(by_split) < 2:
        return None
    first = "train" if "train" in by_split else min(by_split)
    rest = Categories()
    for split, counts in by_split.items():
        if split != first:
            rest.merge(counts)
    left, right, _ = pooled(by_split[first], rest)
    v, p = chi_square(left, right)
    return {"v": v, "p": p}


def pooled(left: Categories, right: Categories) -> tuple[list[int], list[int], list[str]]:
    """Counts of both over the same categories, those too rare for a chi-square test joined as the last one."""
    sizes = left.count, right.count
    total = max(1, sum(sizes))
    names = sorted({*left.counts, *right.counts}, key=lambda name: (-(left.counts[name] + right.counts[name]), name))
    kept = [name for name in names if (left.counts[name] + right.counts[name]) * min(sizes) / total >= ENOUGH]
    table = [[side.counts[name] for name in kept] for side in (left, right)]
    others = [side.count - sum(counts) for side, counts in zip((left, right), table, strict=True)]
    if sum(others):
        return [*table[0], others[0]], [*table[1], others[1]], [*kept, "others"]
    return table[0], table[1], kept
