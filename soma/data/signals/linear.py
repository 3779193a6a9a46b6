"""A classifier of text quality: logistic regression on hashed word n-grams, in the manner of fastText's classifier.

fastText (Joulin et al. 2016, arXiv:1607.01759) averages vectors of words and bigrams in hashed buckets; with two
classes that is a linear model of as many weights as there are buckets, which is what is fitted here, by AdaGrad on one
document at a time. Good text (an encyclopedia) against the crawl is how GPT-3, CCNet and DCLM chose pages: the
probability of being good is the score. Features are the distinct words and bigrams of a document, each 1/√n.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from soma.base import progress
from soma.base.artefact import file_hash
from soma.base.errors import UserError
from soma.data.dedup.words import SPREAD, distinct, mix, parse, word_hashes
from soma.data.readers import Document, read_item
from soma.data.sources import Skipped, list_items

FORMAT = 1
BUCKETS = 1 << 20
EPOCHS = 5
RATE = 0.5
HELD_OUT = 10  # every so manieth document, by the hash of its text, is held out
BATCH = 512


class LinearScorer:
    """A fitted classifier. `name` holds the hash of its file."""

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                self.weights, self.bias, version = file["weights"], float(file["bias"]), int(file["format"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"filters.quality.scorer: {path} is no classifier of `soma data quality` ({error})"
            ) from None
        if version != FORMAT:
            raise UserError(f"filters.quality.scorer: {path} has format {version}, expected {FORMAT}; fit it again")
        self.name = f"linear:{file_hash(path)}"

    def score(self, texts: Sequence[str]) -> list[float]:
        """The probability of being good for each text; that of a text without words is the bias's."""
        return [probability(self.weights, self.bias, places) for places in features(texts, len(self.weights))]


def features(texts: Sequence[str], buckets: int) -> Iterator[np.ndarray]:
    """The distinct buckets of each text's words and bigrams, ascending."""
    for start in range(0, len(texts), BATCH):
        words = parse(texts[start : start + BATCH])
        ones = word_hashes(words)
        twos = mix(ones[:-1] * np.uint64(SPREAD) + ones[1:]) if len(ones) else ones
        for low, high in zip(words.first[:-1].tolist(), words.first[1:].tolist(), strict=True):
            both = np.concatenate([ones[low:high], twos[low : max(low, high - 1)]])
            yield distinct(both % np.uint64(buckets)).astype(np.int64)


def probability(weights: np.ndarray, bias: float, places: np.ndarray) -> float:
    """Of being good. Worked number: bias 0, four features of weight ln 3 / 2 each: 4 · ln 3 / 2 / √4 = ln 3, so 3/4."""
    z = bias + float(weights[places].sum(dtype=np.float64)) / max(1.0, len(places)) ** 0.5
    return float(1 / (1 + np.exp(-np.clip(z, -60, 60))))


@dataclass(frozen=True)
class Fit:
    """What fitting found: documents used, and of the held-out ones their number, the area under the ROC curve, and the
    share of the others that scores above the median of the good."""

    good: int
    other: int
    held_out: int
    auc: float
    above_median: float


def fit(
    good: list[str], other: list[str], out: Path, *, text_field: str = "text", buckets: int = BUCKETS,
    epochs: int = EPOCHS, seed: int = 0,
) -> Fit:  # fmt: skip
    """Fit a classifier of the documents of `good` against those of `other` (sources as in a recipe), into `out`.

    Both classes weigh the same. The same texts give the same bytes, in whatever order they come. Raises UserError for
    sources without text.
    """
    texts = dict.fromkeys(_texts(good, text_field, "GOOD"), True)
    texts |= {text: False for text in _texts(other, text_field, "OTHER") if text not in texts}
    hashes = {text: int.from_bytes(sha256(text.encode()).digest()[:8], "little") for text in texts}
    order = sorted(texts, key=hashes.__getitem__)
    y_D = np.array([texts[text] for text in order])
    held_D = np.array([hashes[text] % HELD_OUT == 0 for text in order])
    for name, is_good in (("GOOD", True), ("OTHER", False)):
        if not (y_D[~held_D] == is_good).any() or not (y_D[held_D] == is_good).any():
            raise UserError(f"{name}: {int((y_D == is_good).sum())} documents are too few to fit and to check")
    places = list(features(order, buckets))
    weights, bias = _descend([places[row] for row in np.flatnonzero(~held_D)], y_D[~held_D], buckets, epochs, seed)
    with open(out, "wb") as file:
        np.savez_compressed(file, weights=weights, bias=np.float64(bias), format=np.int64(FORMAT))
    scores = np.array([probability(weights, bias, places[row]) for row in np.flatnonzero(held_D)])
    above = scores[~y_D[held_D]] > np.median(scores[y_D[held_D]])
    return Fit(int(y_D.sum()), int((~y_D).sum()), int(held_D.sum()), auc(scores, y_D[held_D]), float(above.mean()))


def auc(scores: np.ndarray, is_good: np.ndarray) -> float:
    """The chance that a good document scores above another, ties half (Mann-Whitney).

    Worked number: good 0.9, 0.4; others 0.5, 0.1: three of four pairs are in order, 0.75.
    """
    good, other = scores[is_good], np.sort(scores[~is_good])
    below = np.searchsorted(other, good, side="left") + np.searchsorted(other, good, side="right")
    return float(below.sum() / 2 / (len(good) * len(other)))


def _texts(sources: list[str], text_field: str, name: str) -> list[str]:
    found = [
        document.text
        for item in list_items(sources)
        if not isinstance(item, Skipped)
        for document in read_item(item, text_field)
        if isinstance(document, Document) and document.text.strip()
    ]
    if not found:
        raise UserError(f"{name} {', '.join(sources)}: there is no text")
    return found


def _descend(places: list[np.ndarray], y_D: np.ndarray, buckets: int, epochs: int, seed: int) -> tuple[Any, float]:
    """AdaGrad (Duchi et al. 2011) on the logistic loss, a document at a time."""
    weights, squares = np.zeros(buckets, np.float32), np.full(buckets, 1e-8, np.float32)
    bias, bias_square = 0.0, 1e-8
    share = len(y_D) / 2 / np.array([(~y_D).sum(), y_D.sum()])
    generator = np.random.default_rng(seed)
    with progress.current().task("fit", total=epochs * len(places), unit="documents") as bar:
        for _ in range(epochs):
            for row in generator.permutation(len(places)).tolist():
                here, y = places[row], bool(y_D[row])
                error = (probability(weights, bias, here) - y) * share[int(y)]
                gradient = np.float32(error / max(1, len(here)) ** 0.5)
                squares[here] += gradient**2
                weights[here] -= np.float32(RATE) * gradient / np.sqrt(squares[here])
                bias_square += error**2
                bias -= RATE * error / bias_square**0.5
                bar.advance(1)
    return weights, bias
