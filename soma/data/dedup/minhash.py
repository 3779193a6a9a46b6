"""MinHash signatures and their banding: which pairs of documents are worth comparing.

MinHash (Broder 1997): two signatures agree at a position with probability J, the Jaccard similarity of the shingle
sets. Banding (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4): with b bands of r rows a pair becomes a
candidate with probability 1 − (1 − J^r)^b, which is one half near J = (1/b)^(1/r). `banding` takes the largest r
(fewest false candidates) for which a pair at the threshold is still found with probability at least `RECALL`. Worked
example: 128 hashes, threshold 0.5 → r = 4, b = 32: found with probability 1 − (1 − 0.0625)^32 = 0.873 is too low, so r
= 3, b = 42: 1 − 0.875^42 = 0.996.

Candidates are verified by their true Jaccard similarity, so there are no false merges; what banding misses is bounded
by 1 − RECALL at the threshold and falls fast above it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from soma.data.config import DedupConfig
from soma.data.dedup.words import Words

RECALL = 0.99
MINHASH_SEED = 1


def normalized(text: str) -> str:
    """What duplicates are compared by: white space runs as one space, case folded."""
    return " ".join(text.casefold().split())


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


def minhash(plain: Sequence[str], config: DedupConfig) -> np.ndarray:
    """MinHash signatures, uint32 (documents, num_hashes), of texts that went through `normalized`. Computed by Daft."""
    import pyarrow

    return _minhash(pyarrow.array(list(plain), pyarrow.large_string()), config)


def minhash_words(words: Words, config: DedupConfig) -> np.ndarray:
    """As `minhash`, of texts that were parsed into words; their bytes are handed to Daft as they are."""
    return _minhash(words.arrow(), config)


def _minhash(plain: Any, config: DedupConfig) -> np.ndarray:
    import daft

    if not len(plain):
        return np.zeros((0, config.num_hashes), np.uint32)
    # By the column itself, not by a query: on Ray this runs within a task, where a query would wait for itself.
    signatures = daft.Series.from_arrow(plain).minhash(
        num_hashes=config.num_hashes, ngram_size=config.ngram, seed=MINHASH_SEED, hash_function="xxhash3_64"
    )
    return np.asarray(signatures.to_arrow().flatten()).astype(np.uint32).reshape(len(plain), config.num_hashes)


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
