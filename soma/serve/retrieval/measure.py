"""How good a search is: recall and nDCG on questions whose sources are known, the ways of searching side by side."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soma.base.errors import UserError
from soma.data.readers import Dropped, json_rows
from soma.data.sources import Item, list_items
from soma.serve.retrieval.qdrant import paths
from soma.serve.retrieval.search import MODES, MOST, Hit, Mode, Retriever

AT = (1, 5, 10)  # how many hits count
PER_SOURCE = 3  # hits asked for beyond those that count: several may be of one source


@dataclass(frozen=True)
class Pair:
    """A question and the sources that answer it: files, folders, or rows as `file.jsonl#3`."""

    question: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Quality:
    """Means over the questions, by the number of hits that count; seconds of the median question."""

    way: str
    recall: dict[int, float]
    ndcg: dict[int, float]
    seconds: float


def recall(ranking: Sequence[str], relevant: Sequence[str], k: int) -> float:
    """Share of the relevant that is among the first k. `recall(["a", "b", "c"], ["c", "a"], 2)` is 0.5."""
    return len(set(ranking[:k]) & set(relevant)) / len(set(relevant))


def ndcg(ranking: Sequence[str], relevant: Sequence[str], k: int) -> float:
    """Normalized discounted cumulative gain of the first k with gain 1 for the relevant: Σ 1 / log2(1 + rank) over
    their ranks, against the best order's (Järvelin & Kekäläinen 2002).

    `ndcg(["b", "a"], ["a"], 10)` is 1 / log2(3) = 0.6309.
    """
    wanted = set(relevant)
    gained = sum(1 / math.log2(1 + rank) for rank, each in enumerate(ranking[:k], start=1) if each in wanted)
    return gained / sum(1 / math.log2(1 + rank) for rank in range(1, min(k, len(wanted)) + 1))


def sources_of(hits: Sequence[Hit], relevant: Sequence[str]) -> list[str]:
    """The sources of hits in order, each once; a chunk under a relevant folder or file stands for that one."""
    found = []
    for hit in hits:
        under = paths(hit.chunk)
        found.append(next((name for name in relevant if name in under), hit.chunk.source))
    return list(dict.fromkeys(found))


def evaluate(retriever: Retriever, pairs: Sequence[Pair], at: Sequence[int] = AT) -> list[Quality]:
    """Dense, BM25, hybrid, and with a reranker that too. Raises UserError: no pairs."""
    if not pairs:
        raise UserError("there is no question to evaluate with")
    made = []
    ways: list[tuple[str, Mode, bool]] = [(mode, mode, False) for mode in MODES[1:] + MODES[:1]]
    ways += [("reranked", MODES[0], True)] if retriever.reranker else []
    for way, mode, rerank in ways:
        rankings, seconds = [], []
        for pair in pairs:
            started = time.perf_counter()
            hits = retriever.search(pair.question, min(PER_SOURCE * max(at), MOST), mode, rerank=rerank)
            seconds.append(time.perf_counter() - started)
            rankings.append(sources_of(hits, pair.sources))
        found = list(zip(rankings, pairs, strict=True))
        made.append(Quality(
            way,
            {k: statistics.fmean(recall(ranking, pair.sources, k) for ranking, pair in found) for k in at},
            {k: statistics.fmean(ndcg(ranking, pair.sources, k) for ranking, pair in found) for k in at},
            statistics.median(seconds),
        ))  # fmt: skip
    return made


def read_pairs(path: Path) -> list[Pair]:
    """JSONL rows `{"question": …, "sources": ["guide/a.md", "rows.jsonl#3"]}`; `source` with one is fine too. Raises
    UserError with file and line."""
    pairs = []
    for item in list_items([str(path)]):
        assert isinstance(item, Item)
        with item.open() as file:
            for line, row in json_rows(item, file):
                if isinstance(row, Dropped):
                    raise UserError(f"{path}, line {line}: {row.detail or row.reason}")
                given = row.get("sources", row.get("source")) if isinstance(row, dict) else None
                sources = [given] if isinstance(given, str) else given
                question = row.get("question") if isinstance(row, dict) else None
                whole = isinstance(question, str) and question.strip() and isinstance(sources, list) and sources
                if not whole or not all(isinstance(each, str) and each for each in sources or []):
                    raise UserError(f"{path}, line {line}: expected {{'question': '…', 'sources': ['…']}}")
                pairs.append(Pair(str(question), tuple(each.rstrip("/") for each in sources or [])))
    return pairs


def table(qualities: Sequence[Quality], questions: int) -> str:
    """Side by side, for a terminal."""
    at = list(qualities[0].recall)
    head = ["", *(f"recall@{k}" for k in at), *(f"nDCG@{k}" for k in at), "ms (median)"]
    rows = [
        [each.way, *(f"{each.recall[k]:.3f}" for k in at), *(f"{each.ndcg[k]:.3f}" for k in at),
         f"{each.seconds * 1e3:.1f}"]
        for each in qualities
    ]  # fmt: skip
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join([*lines, f"{questions} questions"])
