"""Semantic duplicates: texts that say the same in other words (Abbas et al. 2023, SemDeDup).

Embeddings come from any endpoint of OpenAI's shape (POST /v1/embeddings). Spherical k-means cuts them into clusters;
within a cluster, documents whose cosine is at least the threshold are joined. Pairs across clusters are not looked at:
that is what makes it affordable, and what it misses.

The vectors are kept in the order of ranks, so k-means starts and sums alike for any order of the input; the rest is as
deterministic as the endpoint. On disk 4 bytes a dimension and document; in memory a block of `BLOCK` documents, the
centroids, and the cosines of a cluster's rows with `BLOCK` others.
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from soma.base import progress
from soma.base.artefact import file_hash, json_hash
from soma.base.disk import claim
from soma.base.errors import UserError
from soma.base.secrets import redact_url
from soma.data.config import SemanticConfig
from soma.data.dedup.connect import Forest, components
from soma.data.dedup.files import map_array, save_array

FORMAT = 1  # raise it when the same partitions come to give other files
BLOCK = 2048
ROUNDS = 12  # of k-means; SemDeDup's result hardly depends on them
TRIES = 5
PATIENCE = 120.0  # seconds for one answer
RETRIED = (408, 429, 500, 502, 503, 504)


class Client:
    """Asks an endpoint for embeddings. `api_key_env` names the variable with its key; `who` asks, for messages."""

    def __init__(self, config: SemanticConfig, who: str = "data.dedup.semantic") -> None:
        self.config, self.who = config, who
        base = config.url.rstrip("/")
        self.url = base if base.endswith("/embeddings") else f"{base.removesuffix('/v1')}/v1/embeddings"
        self.headers = {"Content-Type": "application/json"}
        if config.api_key_env:
            key = os.environ.get(config.api_key_env)
            if not key:
                raise UserError(f"{who}: the variable of the key {config.api_key_env} is not set")
            self.headers["Authorization"] = f"Bearer {key}"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of length 1, float32 (texts, dimensions). An overloaded endpoint is asked again, up to `TRIES` times.

        Raises UserError where it cannot be reached or refuses.
        """
        cut = [text[: self.config.max_chars] for text in texts]
        body = json.dumps({"model": self.config.model, "input": cut, "encoding_format": "float"}).encode()
        for attempt in range(1, TRIES + 1):
            request = urllib.request.Request(self.url, body, self.headers)
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                    return self._vectors(json.loads(answer.read()), len(texts))
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.read(300).decode(errors='replace')}"
                if error.code not in RETRIED or attempt == TRIES:
                    raise self._failed(said) from None
                wait = error.headers.get("Retry-After", "")
                time.sleep(min(60.0, float(wait) if wait.isdigit() else 2.0**attempt / 4))
            except (OSError, ValueError) as error:
                if attempt == TRIES:
                    raise self._failed(str(error)) from None
                time.sleep(2.0**attempt / 4)
        raise AssertionError("the last attempt returns or raises")

    def _vectors(self, answer: Any, count: int) -> np.ndarray:
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], np.float32)
        except (KeyError, TypeError, ValueError):
            raise self._failed(f"an answer of another shape: {str(answer)[:200]}") from None
        if vectors.ndim != 2 or len(vectors) != count or not np.isfinite(vectors).all():
            raise self._failed(f"{count} texts were sent, the answer has vectors of shape {vectors.shape}")
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _failed(self, said: str) -> UserError:
        return UserError(f"{self.who}: {redact_url(self.url)} (model {self.config.model}): {said}")


def semantic_clusters(parts: Sequence[Path], rank_N: np.ndarray, work: Path, config: SemanticConfig) -> np.ndarray:
    """For each rank the smallest rank of its cluster of semantic duplicates, int64. `parts`, `rank_N` and `work` as in
    `near_partitions`.
    """
    documents = int(rank_N.max(initial=-1)) + 1
    if documents == 0:
        return np.zeros(0, np.int64)
    asked = config.model_dump(include={"url", "model", "max_chars"})
    keys = [json_hash([FORMAT, file_hash(part), asked])[:32] for part in parts]
    files = [work / "embeddings" / f"{key}.npy" for key in keys]
    client = Client(config)
    with progress.current().task("embeddings", total=documents, unit="documents") as bar:
        start = 0
        for part, path in zip(parts, files, strict=True):
            rank = rank_N[start : start + _rows(part)]
            start += len(rank)
            path = _embedded(client, part, path, rank >= 0)
            bar.advance(int((rank >= 0).sum()))
    vectors_ND = _by_rank(files, parts, rank_N, documents, work / "embeddings" / "ranked.npy")
    owner_N = kmeans(vectors_ND, config.clusters or max(1, round(documents**0.5)), config.seed)
    left, right = alike_pairs(vectors_ND, owner_N, config.threshold)
    return components(documents, left, right)


def _rows(part: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(part).num_rows)


def _embedded(client: Client, part: Path, path: Path, used: np.ndarray) -> Path:
    """The vectors of a part, one for each row; zeros for rows that take no part. Made again where more rows do now."""
    import pyarrow.parquet as pq

    if path.exists() and map_array(path)[used].any(axis=1).all():
        return path
    batch = client.config.batch
    with ThreadPoolExecutor(client.config.concurrency) as pool, pq.ParquetFile(part) as file:
        found: list[np.ndarray] = []
        rows = np.flatnonzero(used)
        start = 0
        for group in file.iter_batches(batch * client.config.concurrency, columns=["text"]):
            here = rows[(rows >= start) & (rows < start + len(group))] - start
            start += len(group)
            texts = group.column(0).take(here).to_pylist()
            found += pool.map(client.embed, [texts[i : i + batch] for i in range(0, len(texts), batch)])
    dimensions = {vectors.shape[1] for vectors in found} or {1}
    assert len(dimensions) == 1, "one model has one number of dimensions"
    vectors_ND = np.zeros((len(used), dimensions.pop()), np.float32)
    vectors_ND[rows] = np.concatenate(found) if found else 0
    save_array(path, vectors_ND)
    return path


def _by_rank(files: Sequence[Path], parts: Sequence[Path], rank_N: np.ndarray, documents: int, out: Path) -> np.ndarray:
    """All vectors in the order of their ranks, memory-mapped."""
    dimensions = max(map_array(path).shape[1] for path in files)
    vectors_ND: np.ndarray = np.lib.format.open_memmap(out, "w+", np.float32, (documents, dimensions))
    claim(out)
    start = 0
    for part, path in zip(parts, files, strict=True):
        rank = rank_N[start : start + _rows(part)]
        start += len(rank)
        if (rank >= 0).any():
            vectors_ND[rank[rank >= 0]] = map_array(path)[rank >= 0]
    return vectors_ND


def kmeans(vectors_ND: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Spherical k-means: the cluster of each vector, int64 (N,). Ends when nothing moves, after `ROUNDS` at most.

    Starts from distinct random rows. A cluster that comes to be empty keeps its centre.
    """
    count = min(clusters, len(vectors_ND))
    start = np.sort(np.random.default_rng(seed).choice(len(vectors_ND), count, replace=False))
    centres_KD = np.array(vectors_ND[start])
    owner_N = np.full(len(vectors_ND), -1)
    for _ in range(ROUNDS):
        sums_KD = np.zeros(centres_KD.shape, np.float64)
        before = owner_N.copy()
        for low in range(0, len(vectors_ND), BLOCK):
            block_BD = np.asarray(vectors_ND[low : low + BLOCK])
            owner_N[low : low + BLOCK] = (block_BD @ centres_KD.T).argmax(axis=1)
            np.add.at(sums_KD, owner_N[low : low + BLOCK], block_BD)
        if np.array_equal(before, owner_N):
            break
        lengths = np.linalg.norm(sums_KD, axis=1, keepdims=True)
        centres_KD = np.where(lengths > 0, sums_KD / np.maximum(lengths, 1e-12), centres_KD).astype(np.float32)
    return owner_N


def alike_pairs(vectors_ND: np.ndarray, owner_N: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs within a cluster whose cosine is at least `threshold`: a spanning forest of them."""
    order = np.argsort(owner_N, kind="stable")
    ends = np.flatnonzero(np.diff(owner_N[order])) + 1
    forest = Forest()
    for members in np.split(order, ends):
        for left, right in _pairs_of(vectors_ND, members, threshold):
            forest.union(left, right)
    edges = np.array(forest.edges, np.int64).reshape(-1, 2)
    return edges[:, 0], edges[:, 1]


def _pairs_of(vectors_ND: np.ndarray, members: np.ndarray, threshold: float) -> Iterator[tuple[int, int]]:
    for low in range(0, len(members), BLOCK):
        rows = members[low : low + BLOCK]
        block_BD = np.asarray(vectors_ND[rows])
        for other in range(low, len(members), BLOCK):
            columns = members[other : other + BLOCK]
            cosines_BC = block_BD @ np.asarray(vectors_ND[columns]).T
            for i, j in np.argwhere(cosines_BC >= threshold).tolist():
                if rows[i] < columns[j]:
                    yield int(rows[i]), int(columns[j])
