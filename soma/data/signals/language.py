"""Language identification by py3langid: a naive Bayes model over byte n-grams that comes with the package."""

from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from soma.data.signals.parse import Batch

SAMPLE_CHARS = 4000  # of a document that are looked at: its first, middle and last thirds of this


class Identifier(Protocol):
    """Names the language of a text."""

    def classify(self, text: str) -> tuple[str, float]:
        """ISO 639-1 code and probability."""
        ...


@lru_cache(maxsize=1)
def identifier() -> Identifier:
    """The identifier of this process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    found: Identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return found


def identify(batch: Batch) -> dict[str, Any]:
    """`language`: ISO 639-1 code; `language_probability`: float64."""
    found = [identifier().classify(sample(text)) for text in batch.texts]
    return {
        "language": np.array([code for code, _ in found], dtype=object),
        "language_probability": np.array([float(probability) for _, probability in found]),
    }


def sample(text: str) -> str:
    """Up to `SAMPLE_CHARS` characters from three places of a text."""
    if len(text) <= SAMPLE_CHARS:
        return text
    third, middle = SAMPLE_CHARS // 3, len(text) // 2
    return "\n".join((text[:third], text[middle - third // 2 : middle + third // 2], text[-third:]))
