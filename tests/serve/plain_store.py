"""A store of lists and sums, and an encoder that counts letters, for tests of retrieval; neither needs torch."""

from collections.abc import Mapping, Sequence

import numpy as np

from soma.serve.retrieval.qdrant import chunk_id, paths
from soma.serve.retrieval.store import Description, Entry, Found, Held, Where


class Letters:
    """How often each letter is there, as a unit vector; words are tokens."""

    reference, hash, max_tokens = "letters", "0" * 64, None

    def count(self, texts: list[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        counts_TD = np.array([[text.lower().count(chr(97 + place)) for place in range(26)] for text in texts])
        lengths_T1 = np.linalg.norm(counts_TD + 1e-3, axis=1, keepdims=True)
        return ((counts_TD + 1e-3) / lengths_T1).astype(np.float32)

    def close(self) -> None:
        pass


class PlainStore:
    """Another store behind the same interface: lists and sums. The oracle of the one in Qdrant."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.description: Description | None = None

    def describe(self) -> Description | None:
        return self.description

    def create(self, description: Description) -> None:
        self.description = description

    def upsert(self, entries: Sequence[Entry]) -> None:
        self.entries |= {chunk_id(entry.chunk): entry for entry in entries}

    def delete(self, origin: str, file: str, keep: str | None = None) -> None:
        self.entries = {
            key: entry for key, entry in self.entries.items()
            if (entry.chunk.origin, entry.chunk.file) != (origin, file) or entry.chunk.hash == keep
        }  # fmt: skip

    def hashes(self) -> dict[tuple[str, str], dict[str, Held]]:
        found: dict[tuple[str, str], dict[str, Held]] = {}
        for entry in self.entries.values():
            chunk = entry.chunk
            held = found.setdefault((chunk.origin, chunk.file), {}).setdefault(chunk.hash, Held())
            held.have += 1
            held.whole = chunk.number + 1 if chunk.last else held.whole
        return found

    def dense(self, vector: np.ndarray, limit: int, where: Where | None = None) -> list[Found]:
        return self.best({key: float(entry.vector @ vector) for key, entry in self.entries.items()}, limit, where)

    def sparse(self, weights: Mapping[int, float], limit: int, where: Where | None = None) -> list[Found]:
        total = len(self.entries)
        have = {term: sum(term in entry.weights for entry in self.entries.values()) for term in weights}
        scores = {
            key: sum(
                value * entry.weights.get(term, 0.0) * np.log(1 + (total - have[term] + 0.5) / (have[term] + 0.5))
                for term, value in weights.items()
            )
            for key, entry in self.entries.items()
        }
        return [found for found in self.best(scores, limit, where) if found.score > 0]

    def best(self, scores: dict[str, float], limit: int, where: Where | None) -> list[Found]:
        kept = [key for key in scores if all(self.fits(key, *pair) for pair in (where or {}).items())]
        return [Found(key, self.entries[key].chunk, scores[key]) for key in sorted(kept, key=lambda k: -scores[k])][
            :limit
        ]

    def fits(self, key: str, name: str, value: object) -> bool:
        chunk = self.entries[key].chunk
        wanted = value if isinstance(value, list) else [value]
        if name == "source":
            return any(each in paths(chunk) for each in wanted)
        if name.startswith("meta."):
            return (chunk.meta or {}).get(name[5:]) in wanted
        return getattr(chunk, name) in wanted

    def count(self) -> int:
        return len(self.entries)

    def close(self) -> None:
        pass
