"""Where chunks lie. One small interface; `qdrant.py` is the one that Soma brings."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from soma.base.errors import UserError
from soma.serve.retrieval.chunks import Chunk

FILTERS = ("source", "kind", "title")
Where = Mapping[str, Any]  # `source` (a file, or a folder above it), `kind`, `title`, `meta.KEY`; a list: one of these


class InputError(UserError):
    """What was asked is wrong, not what answers: no question, no such filter."""


def check_where(where: Where | None) -> None:
    """Raises InputError for a filter that cannot be asked for."""
    for key, value in (where or {}).items():
        if key not in FILTERS and not (key.startswith("meta.") and len(key) > len("meta.")):
            raise InputError(f"filter {key!r}: expected one of {', '.join(FILTERS)}, or meta.KEY")
        several = value if isinstance(value, list) else [value]
        if not several or not all(isinstance(each, str | int | float) for each in several):
            raise InputError(f"filter {key}: {value!r} is no text, number, true or false, and no list of these")


@dataclass(frozen=True)
class Description:
    """What an index was made with. `probe`: the encoder's vectors of `encoders.PROBE`, by which the same encoder is
    known where no hash is; `average_words`: of a chunk, for BM25."""

    encoder: str
    encoder_hash: str
    dimensions: int
    average_words: float
    probe: list[list[float]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Entry:
    """A chunk with its vector, fp32 [dimensions] of length 1, and its BM25 weights."""

    chunk: Chunk
    vector: np.ndarray
    weights: Mapping[int, float]


@dataclass(frozen=True)
class Found:
    """A chunk and how well it fits."""

    id: str
    chunk: Chunk
    score: float


@dataclass
class Held:
    """What is there of one content of a file: how many chunks, and how many there are when it is whole (None: unknown,
    its last chunk is not there)."""

    have: int = 0
    whole: int | None = None

    @property
    def complete(self) -> bool:
        return self.whole == self.have


class Store(Protocol):
    """An index. Ids of chunks are made from what they are, so that writing one again changes nothing."""

    def describe(self) -> Description | None:
        """What it was made with; None: it does not exist."""

    def create(self, description: Description) -> None:
        """Make an empty index."""

    def upsert(self, entries: Sequence[Entry]) -> None:
        """Write chunks; when this returns they stay, whatever happens to this process."""

    def delete(self, origin: str, file: str, keep: str | None = None) -> None:
        """Take out the chunks of a file, but for those of the content hash `keep`."""

    def hashes(self) -> dict[tuple[str, str], dict[str, Held]]:
        """By origin and file: the content hashes that are there."""

    def dense(self, vector: np.ndarray, limit: int, where: Where | None = None) -> list[Found]:
        """The chunks whose vectors have the largest cosine with this one, best first."""

    def sparse(self, weights: Mapping[int, float], limit: int, where: Where | None = None) -> list[Found]:
        """The chunks with the largest BM25 score above 0, best first."""

    def count(self) -> int:
        """Chunks in it."""

    def close(self) -> None:
        """Let go of it."""
