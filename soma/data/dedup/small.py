"""Near-duplicates among texts that fit in memory, such as instruction pairs; the plain reference of `near.py`."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from soma.data.config import DedupConfig
from soma.data.dedup.minhash import banding, jaccard, minhash, normalized, shingle_set

# In a bucket a document is compared with this many that follow it by id: boilerplate shared by thousands of documents
# would otherwise cost the square of their number. True duplicates in a large bucket still join, neighbour by neighbour.
BUCKET_WINDOW = 100


class UnionFind:
    """Disjoint sets over 0..n-1; the smallest member stands for its set, so the result does not depend on the order."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, node: int) -> int:
        while self.parent[node] != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def union(self, left: int, right: int) -> None:
        left, right = self.find(left), self.find(right)
        self.parent[max(left, right)] = min(left, right)

    def groups(self) -> dict[int, list[int]]:
        """Members by representative, both ascending."""
        found = defaultdict(list)
        for node in range(len(self.parent)):
            found[self.find(node)].append(node)
        return found


@dataclass
class NearDuplicates:
    """`duplicates` joins documents at or above the threshold, `groups` those at or above the straddle threshold.

    `similar` holds the verified pairs (left, right, jaccard) that were looked at, `candidates` their number before
    verification.
    """

    duplicates: UnionFind
    groups: UnionFind
    similar: list[tuple[int, int, float]]
    candidates: int
    bands: int
    rows: int


def near_duplicates(texts: Sequence[str], config: DedupConfig) -> NearDuplicates:
    """Near-duplicates among `texts` by word `config.ngram`-grams. Give the texts in a fixed order (by id)."""
    bands, rows = banding(config.num_hashes, config.straddle_threshold)
    result = NearDuplicates(UnionFind(len(texts)), UnionFind(len(texts)), [], 0, bands, rows)
    plain = [normalized(text) for text in texts]

    @lru_cache(maxsize=1024)
    def shingles(index: int) -> frozenset[str]:
        return shingle_set(plain[index], config.ngram)

    checked: set[tuple[int, int]] = set()
    for bucket in _buckets(minhash(plain, config), bands, rows):
        for position, left in enumerate(bucket):
            for right in bucket[position + 1 : position + 1 + BUCKET_WINDOW]:
                if (left, right) in checked or result.duplicates.find(left) == result.duplicates.find(right):
                    continue
                checked.add((left, right))
                similarity = jaccard(shingles(left), shingles(right))
                if similarity >= config.straddle_threshold:
                    result.groups.union(left, right)
                    result.similar.append((left, right, similarity))
                if similarity >= config.threshold:
                    result.duplicates.union(left, right)
    result.candidates = len(checked)
    return result


def _buckets(signatures_NH: np.ndarray, bands: int, rows: int) -> Iterator[list[int]]:
    """Documents that agree in all rows of a band, ascending; buckets of one are left out."""
    for band in range(bands):
        keys = np.ascontiguousarray(signatures_NH[:, band * rows : (band + 1) * rows])
        keys = keys.view(np.dtype((np.void, keys.dtype.itemsize * rows))).ravel()
        order = np.argsort(keys, kind="stable")
        ends = np.flatnonzero(keys[order[1:]] != keys[order[:-1]]) + 1
        for bucket in np.split(order, ends):
            if len(bucket) > 1:
                yield bucket.tolist()
