"""The corpus' duplicates: its index loses exact and near copies, and learns which rows belong on one side."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from soma.data import profile
from soma.data.config import DataConfig
from soma.data.dedup.against import Old, old_fingerprint
from soma.data.dedup.connect import components
from soma.data.dedup.near import Near, members, near_partitions, survivors
from soma.data.dedup.semantic import semantic_clusters
from soma.data.index import Index, Texts
from soma.data.sources import source_fingerprint

EXAMPLE_CLUSTERS = 5
EXAMPLE_MEMBERS = 10


def drop_known(index: Index, old: Old) -> None:
    """Drop the rows that stand, up to white space, in a document of before."""
    keys, owners = old.keys()
    mine = np.flatnonzero(index.kept_N)
    if not len(keys) or not len(mine):
        return
    exact = index.table["exact"].take(mine).to_pylist()
    wanted = np.frombuffer(b"".join(exact), keys.dtype)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    known = keys[place] == wanted
    _drop_for(index, mine[known], "exact_duplicate", "same as", old, owners[place[known]])


def _drop_for(index: Index, rows: np.ndarray, reason: str, words: str, old: Old, twins: np.ndarray) -> None:
    """Drop rows for documents of before."""
    names = old.sources(twins)
    index.drop(rows, reason)
    pairs = zip(rows.tolist(), twins.tolist(), strict=True)
    index.details |= {row: f"{words} {names[twin]}, of an earlier corpus" for row, twin in pairs}


def drop_exact(index: Index) -> None:
    """One row for each text up to white space: the longest, then the smallest id, then the first source by name."""
    import pyarrow.compute as pc

    order = index.order(("exact", "ascending"), ("n_chars", "descending"), ("id", "ascending"), ("source", "ascending"))
    if not len(order):
        return
    keys = index.table["exact"].take(order)
    first = np.ones(len(order), bool)
    first[1:] = pc.not_equal(keys.slice(1), keys.slice(0, len(order) - 1)).to_numpy()
    best = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
    index.drop(order[~first], "exact_duplicate", best[~first])


def drop_near(config: DataConfig, index: Index, work: Path, old: Old) -> tuple[np.ndarray, dict[str, Any]]:
    """Drop all but one of each cluster of near-duplicates, and all of a cluster with a document of before.

    Returns for every row of the index the row that stands for its split group (documents that are alike, and parts of
    one document), and the report's section.
    """
    order = index.order(("id", "ascending"), ("source", "ascending"))
    groups, section = np.arange(len(order)), {}
    if config.dedup.near and len(order):
        before = old.documents
        rank_N = np.full(before + len(index), -1, np.int64)
        rank_N[:before] = np.arange(before)
        rank_N[before + order] = before + np.arange(len(order))
        parts = [*old.parts, *(partition.path for partition in index.partitions)]
        near = near_partitions(parts, rank_N, work, config.dedup, config.workers, config.runner, before)
        chars = np.concatenate([np.zeros(before, np.int64), index.column("n_chars")[order]])
        stays = survivors(near.duplicates, chars, config.dedup.keep, before)[before:]
        known = np.flatnonzero(stays < before)
        _drop_for(index, order[known], "near_duplicate", "like", old, stays[known])
        near, stays = _without_old(near, before), stays - before
        gone = np.flatnonzero((stays != np.arange(len(order))) & (stays >= 0))
        index.drop(order[gone], "near_duplicate", order[stays[gone]])
        groups, section = near.groups, _section(config, index, order, near, stays)
    clusters_N = np.arange(len(index))
    clusters_N[order] = order[_with_parts(index, order, groups)]
    return clusters_N, section


def drop_semantic(config: DataConfig, index: Index, work: Path) -> None:
    """Drop all but one of each cluster of documents that say the same."""
    settings = config.dedup.semantic
    if settings is None:
        return
    order = index.order(("id", "ascending"), ("source", "ascending"))
    rank_N = np.full(len(index), -1, np.int64)
    rank_N[order] = np.arange(len(order))
    labels = semantic_clusters([partition.path for partition in index.partitions], rank_N, work, settings)
    stays = survivors(labels, index.column("n_chars")[order], config.dedup.keep)
    gone = np.flatnonzero(stays != np.arange(len(order)))
    index.drop(order[gone], "semantic_duplicate", order[stays[gone]])


def _without_old(near: Near, before: int) -> Near:
    """The clusters of the new documents alone, ranks counted from the first of them."""
    similar = near.similar[near.similar["left"] >= before]
    for side in ("left", "right"):
        similar[side] -= before
    labels = []
    for old_labels in (near.duplicates[before:], near.groups[before:]):
        _, first, place = np.unique(old_labels, return_index=True, return_inverse=True)
        labels.append(first[place])
    return replace(near, duplicates=labels[0], groups=labels[1], similar=similar)


def _with_parts(index: Index, order: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The groups, joined where they hold parts of one document."""
    wholes = index.table["whole"].take(order).to_pylist() if len(order) else []
    first_part: dict[str, int] = {}
    pairs = [(first_part.setdefault(whole, number), number) for number, whole in enumerate(wholes) if whole]
    left, right = np.array(pairs, np.int64).reshape(-1, 2).T
    return components(len(order), np.concatenate([groups, left]), np.concatenate([np.arange(len(order)), right]))


def _section(config: DataConfig, index: Index, order: np.ndarray, near: Near, stays: np.ndarray) -> dict[str, Any]:
    """What the report says of near-duplicates (see `soma.data.corpus`)."""
    clusters = sorted(members(near.duplicates), key=lambda cluster: (-len(cluster), cluster[0]))
    inner = [cluster for cluster in clusters if stays[cluster[0]] >= 0]
    alike = near.similar[near.similar["jaccard"] >= config.dedup.threshold]
    cluster_of_pair = near.duplicates[alike["left"]]
    examples = []
    for cluster in inner[:EXAMPLE_CLUSTERS]:
        keep = int(stays[cluster[0]])
        others = [order[rank] for rank in cluster.tolist() if rank != keep][:EXAMPLE_MEMBERS]
        lowest = float(alike["jaccard"][cluster_of_pair == cluster[0]].min())
        examples.append(
            {
                "kept": index.string("source", order[keep]), "jaccard": round(lowest, 4),
                "dropped": [index.string("source", row) for row in others],
                "excerpt": profile.excerpt(Texts(index, order)[keep]),
            }
        )  # fmt: skip
    return {
        "threshold": config.dedup.threshold, "straddle_threshold": config.dedup.straddle_threshold, "bands": near.bands,
        "rows": near.rows, "candidates": near.candidates, "sizes": _sizes(len(cluster) for cluster in clusters),
        "group_sizes": _sizes(map(len, members(near.groups))), "examples": examples,
    }  # fmt: skip


def _sizes(sizes: Any) -> dict[str, int]:
    """How many clusters have how many members."""
    counts = Counter(sizes)
    return {str(size): counts[size] for size in sorted(counts)}


def outside_fingerprint(config: DataConfig) -> str:
    """Hash over what the corpus is held against: documents of before and evaluation sets; empty if there are none."""
    parts = []
    if config.dedup.against:
        parts.append(old_fingerprint(config.dedup.against))
    if config.decontaminate is not None:
        parts.append(source_fingerprint(config.decontaminate.sets))
    return " ".join(parts)
