"""ROUGE-L (Lin 2004) as the novelty filter of Self-Instruct: how alike a text is to all texts of before.

Tokens and F1 are those of Google's rouge-score without a stemmer: lower case, runs of a-z and 0-9. The longest common
subsequence is found with one machine word a token (Hyyrö 2004), and only for texts that share enough tokens.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OTHER = re.compile(r"[^a-z0-9]+")


def tokens(text: str) -> list[str]:
    """The words that count."""
    return OTHER.sub(" ", text.lower()).split()


def lcs(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence. Worked example: `a b c d`, `b x d` → 2."""
    places: defaultdict[str, int] = defaultdict(int)
    for index, token in enumerate(left):
        places[token] |= 1 << index
    return _lcs(places, len(left), right)


def _lcs(places: dict[str, int], size: int, right: Sequence[str]) -> int:
    """`places`: for each token the bits of where it stands in the left text. A zero bit of `rest` is a match used."""
    full = (1 << size) - 1
    rest = full
    for token in right:
        if hits := rest & places.get(token, 0):
            rest = ((rest + hits) | (rest - hits)) & full
    return size - rest.bit_count()


def rouge_l(left: str, right: str) -> float:
    """F1 of ROUGE-L, between 0 and 1. Worked example: `the cat sat`, `the cat ran off` → 2·2/(3+4) = 0.571."""
    a, b = tokens(left), tokens(right)
    return 2 * lcs(a, b) / (len(a) + len(b)) if a and b else 0.0


@dataclass(frozen=True)
class Nearest:
    """The text that is most alike, the first of equals."""

    index: int
    score: float


class Novelty:
    """All texts so far, and which of them a new one is like."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self.texts: list[list[str]] = []
        # The k-th occurrence of a token is an entry of its own, so that shared entries are shared tokens.
        self.postings: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        self.sizes: list[int] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        words = tokens(text)
        for entry in _entries(words):
            self.postings[entry].append(len(self.texts))
        self.texts.append(words)
        self.sizes.append(len(words))

    def nearest(self, text: str, threshold: float) -> Nearest | None:
        """The nearest text, if its ROUGE-L with `text` is above `threshold`."""
        words = tokens(text)
        if not words or not self.texts:
            return None
        shared = np.zeros(len(self.texts), np.int64)
        for entry in _entries(words):
            shared[self.postings.get(entry, [])] += 1
        bound = 2 * shared / (np.asarray(self.sizes) + len(words))
        likely = np.flatnonzero(bound > threshold)
        places: defaultdict[str, int] = defaultdict(int)
        for index, word in enumerate(words):
            places[word] |= 1 << index
        best: Nearest | None = None
        for index in likely[np.argsort(-bound[likely], kind="stable")].tolist():
            if best is not None and bound[index] < best.score:
                break
            score = 2 * _lcs(places, len(words), self.texts[index]) / (self.sizes[index] + len(words))
            if score > threshold and (best is None or (score, -index) > (best.score, -best.index)):
                best = Nearest(index, score)
        return best


def _entries(words: Sequence[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    found = []
    for word in words:
        found.append((word, seen[word]))
        seen[word] += 1
    return found
