"""Search: by meaning (vectors), by words (BM25), by both, and again by a reranker."""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from soma.base.errors import UserError
from soma.serve.retrieval.chunks import Chunk
from soma.serve.retrieval.encoders import TextEncoder
from soma.serve.retrieval.http import ask
from soma.serve.retrieval.store import Found, InputError, Store, Where, check_where
from soma.serve.retrieval.words import query_weights

Mode = Literal["hybrid", "dense", "bm25"]
MODES: tuple[Mode, ...] = ("hybrid", "dense", "bm25")
RRF_K = 10  # Cormack et al. 2009 have 60, for lists of 1000; with lists of 50 see docs/lab.md
DEPTH = 50  # chunks that each way of searching brings to the fusion
RERANKED = 30  # chunks that the reranker sees
MOST = 200  # hits
Id = TypeVar("Id", bound=Hashable)


@dataclass(frozen=True)
class Hit:
    """A chunk that was found. `score`: of the last step; `scores`: of each: dense (cosine), bm25, rrf, rerank."""

    id: str
    chunk: Chunk
    score: float
    scores: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the API: the place and the text, no path of this machine."""
        chunk = self.chunk
        return {
            "id": self.id, "source": chunk.source, "title": chunk.title, "start": chunk.start, "end": chunk.end,
            "text": chunk.text, "meta": chunk.meta or {}, "score": self.score, "scores": dict(self.scores),
        }  # fmt: skip


def fuse(rankings: Sequence[Sequence[Id]], k: float = RRF_K) -> dict[Id, float]:
    """Reciprocal rank fusion: Σ 1 / (k + rank), best first; ties keep the order in which they were first seen.

    Cormack, Clarke & Büttcher 2009, "Reciprocal rank fusion outperforms Condorcet and individual rank learning
    methods". `fuse([["a", "b"], ["b"]])` is {"b": 1/12 + 1/11, "a": 1/11}.
    """
    scores: dict[Id, float] = {}
    for ranking in rankings:
        for rank, each in enumerate(ranking, start=1):
            scores[each] = scores.get(each, 0.0) + 1 / (k + rank)
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


class Reranker:
    """A `/v1/rerank` (or /rerank) route: of Soma, vLLM, Jina, Cohere. `url`: `http://host:8000/v1#MODEL`."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises UserError."""
        base, _, self.model = url.partition("#")
        if not base.startswith(("http://", "https://")) or not self.model:
            raise UserError(f"rerank {url!r}: expected URL#MODEL, as http://127.0.0.1:8000/v1#reranker")
        self.url, self.key = base.rstrip("/") + "/rerank", key

    def scores(self, question: str, texts: list[str]) -> list[float]:
        """How well each text answers the question. Raises UserError."""
        body = {"model": self.model, "query": question, "documents": texts, "return_documents": False}
        said = ask(self.url, body, self.key)
        try:
            found = {int(row["index"]): float(row["relevance_score"]) for row in said["results"]}
            return [found[place] for place in range(len(texts))]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self.url}: an answer that is no reranking of {len(texts)} texts") from None


class Retriever:
    """Questions in, hits out."""

    def __init__(
        self, store: Store, encoder: TextEncoder, reranker: Reranker | None = None,
        check: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        """check: of the encoder, at the first search that needs it; a service need not be there before."""
        self.store, self.encoder, self.reranker, self.check = store, encoder, reranker, check

    def search(
        self, question: str, limit: int = 5, mode: Mode = "hybrid", where: Where | None = None, *, rerank: bool = True,
    ) -> list[Hit]:  # fmt: skip
        """The best chunks, best first. `where`: see `store.Where`. `rerank`: by the reranker, where there is one.
        Raises InputError: a question without words, a filter that cannot be asked for."""
        if not question.strip():
            raise InputError("the question is empty")
        if not 1 <= limit <= MOST:
            raise InputError(f"limit is {limit}; expected 1 to {MOST}")
        if mode not in MODES:
            raise InputError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
        check_where(where)
        reranker = self.reranker if rerank else None
        first = max(limit, RERANKED) if reranker else limit
        hits = self.ranked(question, first, mode, where)
        return self.reranked(question, hits, reranker)[:limit] if reranker and hits else hits

    def ranked(self, question: str, limit: int, mode: Mode, where: Where | None) -> list[Hit]:
        """Without the reranker."""
        depth = max(limit, DEPTH) if mode == "hybrid" else limit
        found: dict[str, list[Found]] = {}
        if mode != "bm25":
            if self.check is not None:
                self.check()
                self.check = None
            found["dense"] = self.store.dense(self.encoder.encode([question])[0], depth, where)
        if mode != "dense":
            found["bm25"] = self.store.sparse(query_weights(question), depth, where)
        for ranking in found.values():  # equal chunks come in one order, whatever the store does
            ranking.sort(key=lambda each: (-round(each.score, 6), each.id))
        chunks = {each.id: each.chunk for ranking in found.values() for each in ranking}
        scores: dict[str, dict[str, float]] = {}
        for way, ranking in found.items():
            for each in ranking:
                scores.setdefault(each.id, {})[way] = each.score
        if mode == "hybrid":
            for id_, score in fuse([[each.id for each in ranking] for ranking in found.values()]).items():
                scores[id_]["rrf"] = score
        final = "rrf" if mode == "hybrid" else mode
        order = sorted(scores, key=lambda id_: (-scores[id_][final], id_))[:limit]
        return [Hit(id_, chunks[id_], scores[id_][final], scores[id_]) for id_ in order]

    def reranked(self, question: str, hits: list[Hit], reranker: Reranker) -> list[Hit]:
        values = reranker.scores(question, [hit.chunk.told for hit in hits])
        pairs = sorted(zip(values, hits, strict=True), key=lambda pair: -pair[0])
        return [Hit(hit.id, hit.chunk, value, {**hit.scores, "rerank": value}) for value, hit in pairs]

    def close(self) -> None:
        """Let go of store and encoder."""
        self.store.close()
        self.encoder.close()


def open_retriever(
    to: str, encoder: str | None = None, *, collection: str = "soma", api_key: str | None = None,
    encoder_key: str | None = None, rerank: str | None = None, rerank_key: str | None = None,
) -> Retriever:  # fmt: skip
    """The retriever of an index. `encoder`: left out, the one that the index was made with. Raises UserError."""
    from soma.serve.retrieval.encoders import check_same, load_encoder
    from soma.serve.retrieval.qdrant import QdrantStore

    reranker = None if rerank is None else Reranker(rerank, rerank_key)
    store = QdrantStore(to, collection, api_key=api_key)
    try:
        description = store.describe()
        if description is None:
            raise UserError(f"{store.shown}: there is no index {collection}; make one with `soma index`")
        loaded = load_encoder(encoder or description.encoder, encoder_key)
        check = partial(check_same, description, loaded, store.shown)
        if loaded.hash:
            check()
    except BaseException:
        store.close()
        raise
    return Retriever(store, loaded, reranker, None if loaded.hash else check)


def read_where(given: Sequence[str]) -> dict[str, Any]:
    """Filters as they stand on the command line: `source=guide`, `meta.year=2024`; one key several times: one of
    these. What reads as a JSON number or truth value is one. Raises UserError."""
    found: dict[str, list[Any]] = {}
    for each in given:
        key, equals, text = each.partition("=")
        if not key or not equals:
            raise UserError(f"filter {each!r}: expected FIELD=VALUE")
        value: Any = text
        if key.startswith("meta."):
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            value = value if isinstance(value, str | int | float) else text
        found.setdefault(key, []).append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def show(place: int, hit: Hit) -> str:
    """A hit for a terminal."""
    chunk = hit.chunk
    scores = ", ".join(f"{name} {value:.4g}" for name, value in hit.scores.items())
    title = f"  {chunk.title}" if chunk.title else ""
    text = "\n".join(f"    {line}" for line in chunk.text.splitlines())
    return f"{place}. {chunk.source}:{chunk.start}-{chunk.end}{title}\n   {scores}\n{text}"
