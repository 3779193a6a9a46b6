"""Texts to attributes, and attributes to decisions: two steps, so that another threshold needs no text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from soma.data.signals import gopher, web
from soma.data.signals.config import FiltersConfig
from soma.data.signals.language import identify
from soma.data.signals.parse import Batch, Parser
from soma.data.signals.personal import personal


class Scorer(Protocol):
    """A model that judges texts: handed in by the run, in this process or behind a URL."""

    name: str  # stands for the model in the key of what was scored: another name, another result

    def score(self, texts: Sequence[str]) -> Sequence[float]:
        """One figure for each text, such as the perplexity of a model or the probability of a class."""
        ...


def _c4_any(batch: Batch) -> dict[str, np.ndarray]:
    return web.c4(batch, terminal=False)


SIGNALS: dict[str, Callable[[Batch], dict[str, Any]]] = {
    "gopher_quality": gopher.quality, "gopher_repetition": gopher.repetition, "c4": web.c4, "c4_any": _c4_any,
    "fineweb": web.fineweb, "refinedweb": web.refinedweb, "language": identify, "personal": personal,
}  # fmt: skip


class Measurer:
    """Computes the attributes of texts; remembers words from one batch to the next."""

    def __init__(self, signals: Sequence[str], scorer: Scorer | None = None) -> None:
        self.signals, self.scorer, self.parser = list(signals), scorer, Parser()

    def measure(self, texts: Sequence[str]) -> dict[str, Any]:
        """Columns of attributes, a value for each text. Raises ValueError for a signal that needs a scorer."""
        batch = self.parser.parse(texts)
        found: dict[str, Any] = {}
        for name in self.signals:
            if name == "quality":
                if self.scorer is None:
                    raise ValueError("filters.quality: needs a scorer, and the run was given none")
                found["score"] = np.array(self.scorer.score(texts), np.float64)
            else:
                found |= SIGNALS[name](batch)
        return found


def decide(
    attributes: Mapping[str, Any], filters: FiltersConfig, count: int
) -> tuple[np.ndarray, list[str], list[str]]:
    """Which of `count` documents are dropped, and why.

    Returns (reason_D, names, details): `reason_D` int16 is −1 for a document that stays, else the place in `names` of
    the first rule that drops it; `details` says the value beside the threshold, empty for one that stays.
    """
    reason_D = np.full(count, -1, np.int16)
    names: list[str] = []
    details = [""] * count

    def drop(name: str, bad_D: np.ndarray, detail: Callable[[int], str]) -> None:
        names.append(name)
        for row in np.flatnonzero(bad_D & (reason_D < 0)).tolist():
            reason_D[row] = len(names) - 1
            details[row] = detail(row)

    if filters.language is not None and filters.language.keep:
        languages = np.asarray(attributes["language"])
        keep = ", ".join(filters.language.keep)
        drop(
            "language.keep", ~np.isin(languages, filters.language.keep),
            lambda row: f"language = {languages[row]}, kept: {keep}",
        )  # fmt: skip
    for rule in filters.rules():
        values = np.asarray(attributes[rule.column])
        bad = values < rule.threshold if rule.least else values > rule.threshold
        bound = "at least" if rule.least else "at most"
        text = f"{bound} {rule.threshold:g}"
        drop(rule.name, bad, lambda row, v=values, r=rule, t=text: f"{r.column} = {v[row]:.4g}, {t}")  # type: ignore[misc]
    return reason_D, names, details
