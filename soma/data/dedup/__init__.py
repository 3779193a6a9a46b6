"""Duplicates: exact, near (MinHash), by substring, by meaning; against an index of what was there before.

* `near.py`: near-duplicates over partitions, any number of documents, on disk and over processes.
* `exact.py`: exact duplicates over partitions.
* `small.py`: both the reference for `near.py` and what instruction pairs use: a list of texts in memory.
* `minhash.py` (signatures, banding), `words.py` (normalised words and shingle hashes of a batch, vectorised),
  `connect.py` (connected components, the same for any order of edges), `tasks.py` (processes, whole files).
"""

from soma.data.dedup.exact import exact_key
from soma.data.dedup.minhash import (
    MINHASH_SEED,
    RECALL,
    banding,
    candidate_probability,
    jaccard,
    minhash,
    normalized,
    shingle_set,
)
from soma.data.dedup.small import BUCKET_WINDOW, NearDuplicates, UnionFind, near_duplicates

__all__ = [
    "BUCKET_WINDOW",
    "MINHASH_SEED",
    "RECALL",
    "NearDuplicates",
    "UnionFind",
    "banding",
    "candidate_probability",
    "exact_key",
    "jaccard",
    "minhash",
    "near_duplicates",
    "normalized",
    "shingle_set",
]
