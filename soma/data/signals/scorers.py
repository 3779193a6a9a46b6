"""Models that judge texts, without torch: a list of words, a linear classifier, or whatever answers at a URL.

`words:PATH` is the share of a text's words that are in a file (one word or phrase a line, small letters): a plain
measure of toxicity, with a list of one's own, for none comes with Soma. `http://…` is asked with `{"texts": […]}` and
answers `{"scores": […]}`, one figure a text: perplexity, the probability of a class, whatever the model there says.
`linear:PATH` is a classifier that `soma data quality` has fitted. `model:PATH`, the perplexity of a language model, is
opened by the run (`soma.evaluate.scorer`).
"""

import json
import re
import urllib.request
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from soma.base.errors import UserError
from soma.data.signals.measure import Scorer

SECONDS = 120.0
WORD = re.compile(r"\w[\w'’-]*")


class WordList:
    """Share of the words that are in a list; a phrase counts as its words."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            lines = path.read_text().lower().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"filters.quality.scorer: {path} cannot be read ({error})") from None
        self.terms = sorted({line.strip() for line in lines if line.strip() and not line.startswith("#")})
        if not self.terms:
            raise UserError(f"filters.quality.scorer: {path} holds no word (one a line is expected)")
        self.name = f"words:{self.terms}"

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """All terms, the longest first."""
        terms = sorted(self.terms, key=lambda term: (-len(term), term))
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, terms))})(?!\w)")

    def score(self, texts: Sequence[str]) -> list[float]:
        """Between 0 and 1 for each text."""
        found = []
        for text in texts:
            words = len(WORD.findall(text))
            hits = sum(len(match.group().split()) for match in self.pattern.finditer(text.lower()))
            found.append(hits / max(1, words))
        return found


class UrlScorer:
    """A service that scores texts."""

    def __init__(self, url: str) -> None:
        self.url = self.name = url

    def score(self, texts: Sequence[str]) -> list[float]:
        """What the service says of each text. Raises UserError where it does not answer as it should."""
        body = json.dumps({"texts": list(texts)}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                scores = [float(value) for value in json.load(answer)["scores"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"filters.quality.scorer: {self.url} gave no scores ({type(error).__name__}: {error})"
            ) from None
        if len(scores) != len(texts):
            raise UserError(f"filters.quality.scorer: {self.url} gave {len(scores)} scores for {len(texts)} texts")
        return scores


def open_scorer(address: str) -> Scorer:
    """The scorer of an address. Raises UserError for what is none."""
    kind, _, rest = address.partition(":")
    if kind == "words" and rest:
        return WordList(Path(rest).expanduser())
    if kind == "linear" and rest:
        from soma.data.signals.linear import LinearScorer

        return LinearScorer(Path(rest).expanduser())
    if kind in ("http", "https"):
        return UrlScorer(address)
    if kind == "model":
        raise UserError(f"filters.quality.scorer: {address} is opened by a run; a program hands a Scorer over itself")
    raise UserError(
        f"filters.quality.scorer: {address!r} is neither words:PATH, linear:PATH, model:PATH nor an http address"
    )
