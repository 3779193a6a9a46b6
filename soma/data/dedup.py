"""Exact and near-duplicates, and the groups that must not straddle train and validation.

MinHash (Broder 1997): two signatures agree at a position with probability J, the Jaccard similarity of the shingle
sets. Banding (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4): with b bands of r rows a pair becomes a
candidate with probability 1 − (1 − J^r)^b, which is one half near J = (1/b)^(1/r). `banding` takes the largest r
(fewest false candidates) for which a pair at the threshold is still found with probability at least `RECALL`. Worked
example: 128 hashes, threshold 0.5 → r = 4, b = 32: found with probability 1 − (1 − 0.0625)^32 = 0.873 is too low, so r
= 3, b = 42: 1 − 0.875^42 = 0.996.

Candidates are verified by their true Jaccard similarity, so there are no false merges; what banding misses is bounded
by 1 − RECALL at the threshold and falls fast above it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np

from soma.data.config import DedupConfig

RECALL = 0.99
MINHASH_SEED = 1
# In a bucket a document is compared with this many that follow it by id: boilerplate shared by thousands of documents
# would otherwise cost the square of their number. True duplicates in a large bucket still join, neighbour by neighbour.
BUCKET_WINDOW = 100


def normalized(text: str) -> str:
    """What duplicates are compared by: white space runs as one space, case folded."""
    return " ".join(text.casefold().split())


def exact_key(text: str) -> bytes:
    """Documents with the same key are exact duplicates: sha256 of the text with white space runs as one space."""
    return sha256(" ".join(text.split()).encode()).digest()


def banding(num_hashes: int, threshold: float) -> tuple[int, int]:
    """(bands, rows): see the module's docstring. banding(128, 0.5) == (42, 3)."""
    rows = max(
        (r for r in range(1, num_hashes + 1) if candidate_probability(threshold, num_hashes // r, r) >= RECALL),
        default=1,
    )
    return num_hashes // rows, rows


def candidate_probability(jaccard: float, bands: int, rows: int) -> float:
    """1 − (1 − J^r)^b. candidate_probability(0.5, 42, 3) = 0.996."""
    return float(1 - (1 - jaccard**rows) ** bands)


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


def near_duplicates(
    texts: Sequence[str], config: DedupConfig, signatures_NH: np.ndarray | None = None
) -> NearDuplicates:
    """Near-duplicates among `texts` by word `config.ngram`-grams. Give the texts in a fixed order (by id).

    `signatures_NH`: their `minhash` signatures, where they are known already; then `texts` may be a sequence that reads
    a text when it is asked for it.
    """
    bands, rows = banding(config.num_hashes, config.straddle_threshold)
    result = NearDuplicates(UnionFind(len(texts)), UnionFind(len(texts)), [], 0, bands, rows)
    if signatures_NH is None:
        signatures_NH = minhash([normalized(text) for text in texts], config)

    @lru_cache(maxsize=1024)
    def shingles(index: int) -> frozenset[str]:
        return shingle_set(normalized(texts[index]), config.ngram)

    checked: set[tuple[int, int]] = set()
    for bucket in _buckets(signatures_NH, bands, rows):
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


def minhash(plain: Sequence[str], config: DedupConfig) -> np.ndarray:
    """MinHash signatures, uint32 (documents, num_hashes), of texts that went through `normalized`. Computed by Daft."""
    import daft

    if not plain:
        return np.zeros((0, config.num_hashes), np.uint32)
    frame = daft.from_pydict({"text": list(plain)})
    signature = daft.col("text").minhash(
        num_hashes=config.num_hashes, ngram_size=config.ngram, seed=MINHASH_SEED, hash_function="xxhash3_64"
    )
    column = frame.select(signature.alias("signature")).to_arrow()["signature"].combine_chunks()
    return np.asarray(column.flatten()).astype(np.uint32).reshape(len(plain), config.num_hashes)


def shingle_set(plain: str, ngram: int) -> frozenset[str]:
    """The word n-grams of a normalised text; a shorter text is one shingle."""
    words = plain.split(" ")
    if len(words) <= ngram:
        return frozenset([plain])
    return frozenset(" ".join(words[i : i + ngram]) for i in range(len(words) - ngram + 1))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """|A ∩ B| / |A ∪ B|."""
    common = len(left & right)
    return common / (len(left) + len(right) - common)


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
