"""The store in Qdrant: a folder of this machine (the client's local mode, for one process at a time), or a server.

Local mode compares with every chunk: fine for some 10,000 of them. Dense and sparse vectors lie side by side in one
collection, whose metadata says what it was made with.
"""

import json
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from soma.base.errors import UserError
from soma.base.secrets import redact_url
from soma.serve.retrieval.chunks import Chunk
from soma.serve.retrieval.store import Description, Entry, Found, Held, Where

if TYPE_CHECKING:
    from qdrant_client import models

DENSE, SPARSE = "dense", "bm25"
NAMESPACE = uuid.UUID("5c9ae0d4-21b9-4d5f-b0f6-3f2a4f4f61c5")
PAGE = 4096  # points read at once
UPSERT = 256  # points written at once
FIELDS = tuple(field.name for field in fields(Chunk))
TIMEOUT = 60  # seconds of a server's answer


class QdrantStore:
    """A collection. `to`: a folder, which is made, or the URL of a server. Raises UserError."""

    def __init__(self, to: str, collection: str = "soma", *, api_key: str | None = None, make: bool = False) -> None:
        """make: a folder that is not there is made; else it is an error."""
        try:
            from qdrant_client import QdrantClient, models
        except ImportError:
            raise UserError("retrieval needs qdrant-client: pip install 'somacube[retrieval]'") from None
        self.models, self.collection, self.shown = models, collection, redact_url(to)
        self.lock = threading.RLock()  # local mode is not made for threads
        self.local = "://" not in to
        if not self.local:
            with self.told():
                self.client = QdrantClient(url=to, api_key=api_key, timeout=TIMEOUT, check_compatibility=False)
            return
        folder = Path(to).expanduser()
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "meta.json").is_file()):
            raise UserError(f"{to}: is there and is no index; give another folder")
        if not make and not (folder / "meta.json").is_file():
            raise UserError(f"{to}: there is no index; make one with `soma index DOCS --to {to}`")
        with self.told():
            self.client = QdrantClient(path=str(folder), force_disable_check_same_thread=True)

    @contextmanager
    def told(self) -> Iterator[None]:
        """What goes wrong, said for a person; one thread at a time."""
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException

        with self.lock:
            try:
                yield
            except RuntimeError as error:
                if "already accessed" not in str(error):
                    raise
                raise UserError(
                    f"{self.shown}: another process has this index open. Wait for it or stop it, or keep the index in "
                    "a Qdrant server (--to http://…), which many can use at once"
                ) from None
            except json.JSONDecodeError:
                raise UserError(f"{self.shown}: meta.json is damaged; remove the folder and index again") from None
            except (ApiException, QdrantException) as error:
                words = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"{self.shown}: the Qdrant server failed: {words}") from None

    def describe(self) -> Description | None:
        """See `Store`. Raises UserError for a collection that Soma has not made."""
        with self.told():
            if not self.client.collection_exists(self.collection):
                return None
            metadata = self.client.get_collection(self.collection).config.metadata or {}
        if "soma" not in metadata:
            raise UserError(f"{self.shown}: the collection {self.collection} was not made by Soma; name another one")
        return Description(**metadata["soma"])

    def create(self, description: Description) -> None:
        """See `Store`."""
        m = self.models
        with self.told():
            self.client.create_collection(
                self.collection,
                vectors_config={DENSE: m.VectorParams(size=description.dimensions, distance=m.Distance.COSINE)},
                sparse_vectors_config={SPARSE: m.SparseVectorParams(modifier=m.Modifier.IDF)},
                metadata={"soma": description.as_json()},
            )
            if not self.local:
                for name in ("file", "origin", "paths", "kind"):
                    self.client.create_payload_index(self.collection, name, m.PayloadSchemaType.KEYWORD)

    def upsert(self, entries: Sequence[Entry]) -> None:
        """See `Store`."""
        points = [self.point(entry) for entry in entries]
        for first in range(0, len(points), UPSERT):
            with self.told():
                self.client.upsert(self.collection, points[first : first + UPSERT], wait=True)

    def point(self, entry: Entry) -> "models.PointStruct":
        """A chunk as Qdrant has it."""
        chunk, m = entry.chunk, self.models
        weights = sorted(entry.weights.items())
        sparse = m.SparseVector(indices=[number for number, _ in weights], values=[value for _, value in weights])
        payload = {**asdict(chunk), "paths": paths(chunk)}
        vector: dict[str, Any] = {DENSE: entry.vector.astype(np.float32).tolist(), SPARSE: sparse}
        return m.PointStruct(id=chunk_id(chunk), vector=vector, payload=payload)

    def delete(self, origin: str, file: str, keep: str | None = None) -> None:
        """See `Store`."""
        m = self.models
        kept = [] if keep is None else [m.FieldCondition(key="hash", match=m.MatchValue(value=keep))]
        must = [m.FieldCondition(key=key, match=m.MatchValue(value=value))
                for key, value in (("origin", origin), ("file", file))]  # fmt: skip
        selector = m.FilterSelector(filter=m.Filter(must=list(must), must_not=list(kept)))
        with self.told():
            self.client.delete(self.collection, selector, wait=True)

    def hashes(self) -> dict[tuple[str, str], dict[str, Held]]:
        """See `Store`."""
        found: dict[tuple[str, str], dict[str, Held]] = {}
        offset: Any = None
        wanted = ["origin", "file", "hash", "number", "last"]
        while True:
            with self.told():
                points, offset = self.client.scroll(
                    self.collection, limit=PAGE, offset=offset, with_payload=wanted, with_vectors=False
                )
            for point in points:
                row = point.payload or {}
                held = found.setdefault((row["origin"], row["file"]), {}).setdefault(row["hash"], Held())
                held.have += 1
                if row["last"]:
                    held.whole = row["number"] + 1
            if offset is None:
                return found

    def dense(self, vector: np.ndarray, limit: int, where: Where | None = None) -> list[Found]:
        """See `Store`."""
        return self.query(vector.astype(np.float32).tolist(), DENSE, limit, where)

    def sparse(self, weights: Mapping[int, float], limit: int, where: Where | None = None) -> list[Found]:
        """See `Store`."""
        if not weights:
            return []
        numbers = sorted(weights)
        query = self.models.SparseVector(indices=numbers, values=[weights[number] for number in numbers])
        return [found for found in self.query(query, SPARSE, limit, where) if found.score > 0]

    def query(self, query: Any, using: str, limit: int, where: Where | None) -> list[Found]:
        with self.told():
            answer = self.client.query_points(
                self.collection, query=query, using=using, limit=limit, query_filter=self.filter(where),
                with_payload=True,
            )  # fmt: skip
        return [Found(str(point.id), read_chunk(point.payload or {}), float(point.score)) for point in answer.points]

    def filter(self, where: Where | None) -> "models.Filter | None":
        """As Qdrant has it; `store.check_where` has seen it."""
        if not where:
            return None
        m, must = self.models, []
        for key, value in where.items():
            several = list(value) if isinstance(value, list | tuple) else [value]
            conditions: list[Any] = [self.condition("paths" if key == "source" else key, each) for each in several]
            must.append(conditions[0] if len(conditions) == 1 else m.Filter(should=conditions))
        return m.Filter(must=must)

    def condition(self, key: str, value: Any) -> "models.FieldCondition":
        m = self.models
        if isinstance(value, float):
            return m.FieldCondition(key=key, range=m.Range(gte=value, lte=value))
        return m.FieldCondition(key=key, match=m.MatchValue(value=value))

    def count(self) -> int:
        """See `Store`."""
        with self.told():
            return int(self.client.count(self.collection).count)

    def close(self) -> None:
        """See `Store`."""
        with self.lock:
            self.client.close()


def chunk_id(chunk: Chunk) -> str:
    """The same for the same place of the same content."""
    return str(uuid.uuid5(NAMESPACE, "\0".join((chunk.origin, chunk.file, chunk.hash, str(chunk.number)))))


def paths(chunk: Chunk) -> list[str]:
    """What a filter by source finds a chunk under: its source, its file, the folders above."""
    parts = chunk.file.split("/")
    above = ["/".join(parts[:size]) for size in range(1, len(parts) + 1)]
    return list(dict.fromkeys([*above, chunk.source]))


def read_chunk(payload: Mapping[str, Any]) -> Chunk:
    return Chunk(**{name: payload[name] for name in FIELDS})
