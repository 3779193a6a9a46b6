"""Semantic duplicates: embeddings of a real service and of a small one, clusters against brute force."""

import hashlib
import http.server
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from soma.base.artefact import read_json
from soma.base.errors import UserError
from soma.data.config import DataConfig, SemanticConfig
from soma.data.corpus import build_corpus, read_corpus
from soma.data.dedup import semantic
from soma.data.dedup.connect import components
from soma.data.dedup.semantic import Client, alike_pairs, kmeans, semantic_clusters

THEMES = ["ships", "bread", "stars", "glass", "rivers", "wolves"]


def vector(text: str) -> list[float]:
    """A theme's direction with a little of the text's own."""
    theme = next((number for number, name in enumerate(THEMES) if name in text), 7)
    own = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")).normal(size=8)
    return (np.eye(8)[theme] * 10 + own * 0.2).tolist()


class Endpoint(http.server.BaseHTTPRequestHandler):
    """/v1/embeddings; answers 503 to the first `busy` requests, and counts the texts that it embedded."""

    busy, texts, seen = 0, 0, []  # type: ignore[var-annotated]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.seen.append((self.path, self.headers.get("Authorization")))
        if Endpoint.busy:
            Endpoint.busy -= 1
            self.answer(503, {"error": "busy"})
        elif body["model"] == "unknown":
            self.answer(404, {"error": "no such model"})
        else:
            Endpoint.texts += len(body["input"])
            rows = [{"index": number, "embedding": vector(text)} for number, text in enumerate(body["input"])]
            self.answer(200, {"data": rows[::-1]})

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Endpoint.busy, Endpoint.texts, Endpoint.seen = 0, 0, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def texts() -> list[str]:
    return sorted(f"text {number} of {THEMES[number % len(THEMES)]}" for number in range(60))


def parts_of(folder: Path, rows: list[str], count: int) -> list[Path]:
    folder.mkdir()
    paths = []
    for number, some in enumerate(np.array_split(rows, count)):
        paths.append(folder / f"{number}.parquet")
        pq.write_table(pa.table({"text": pa.array(some.tolist(), pa.string())}), paths[-1])
    return paths


def test_themes_are_clusters_for_any_order(tmp_path: Path, url: str) -> None:
    rows = texts()
    config = SemanticConfig(url=url, model="m", batch=7, clusters=4)
    want = semantic_clusters(parts_of(tmp_path / "a", rows, 1), np.arange(60), tmp_path / "wa", config)
    theme = [next(name for name in THEMES if name in row) for row in rows]
    assert want.tolist() == [theme.index(name) for name in theme]
    order = random.Random(1).sample(range(60), 60)
    parts = parts_of(tmp_path / "b", [rows[row] for row in order], 3)
    found = semantic_clusters(parts, np.array(order), tmp_path / "wb", config)
    assert np.array_equal(found, want)
    strict = semantic_clusters(parts, np.array(order), tmp_path / "wb", config.model_copy(update={"threshold": 0.9999}))
    assert len(set(strict.tolist())) > 30  # negative control: by a high threshold no two texts say the same


def test_embeddings_are_kept_and_only_asked_for_once(tmp_path: Path, url: str) -> None:
    parts = parts_of(tmp_path / "a", texts(), 2)
    config = SemanticConfig(url=url, model="m")
    ranks = np.where(np.arange(60) % 2, -1, np.arange(60) // 2)
    semantic_clusters(parts, ranks, tmp_path / "work", config)
    assert Endpoint.texts == 30
    semantic_clusters(parts, ranks, tmp_path / "work", config.model_copy(update={"threshold": 0.5}))
    assert Endpoint.texts == 30
    semantic_clusters(parts, np.arange(60), tmp_path / "work", config)
    assert Endpoint.texts == 90


def test_pairs_within_clusters_are_all_found(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    vectors = generator.normal(size=(90, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    owner = kmeans(vectors, 6, 0)
    assert set(owner.tolist()) == set(range(6))
    want = np.argwhere((vectors @ vectors.T >= 0.8) & (owner[:, None] == owner[None]))
    monkeypatch.setattr(semantic, "BLOCK", 4)
    assert np.array_equal(kmeans(vectors, 6, 0), owner)
    found = components(90, *alike_pairs(vectors, owner, 0.8))
    assert np.array_equal(found, components(90, want[:, 0], want[:, 1]))
    assert len(set(found.tolist())) < 90


def test_kmeans_lowers_the_distance() -> None:
    generator = np.random.default_rng(3)
    centres = np.eye(6, dtype=np.float32)
    vectors = np.repeat(centres, 40, axis=0) + generator.normal(size=(240, 6)).astype(np.float32) * 0.05
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    owner = kmeans(vectors, 12, 1)
    assert all(len(set((np.flatnonzero(owner == k) // 40).tolist())) <= 1 for k in range(12))


def test_a_busy_endpoint_is_asked_again_and_a_refusal_is_said(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "secret-key")
    client = Client(SemanticConfig(url=url, model="m", api_key_env="TEST_KEY"))
    Endpoint.busy = 2
    assert np.allclose(np.linalg.norm(client.embed(["a", "b"]), axis=1), 1)
    assert Endpoint.seen == [("/v1/embeddings", "Bearer secret-key")] * 3
    with pytest.raises(UserError, match=r"model unknown.*404.*no such model") as caught:
        Client(SemanticConfig(url=url + "/v1", model="unknown")).embed(["a"])
    assert "secret" not in str(caught.value)
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(UserError, match="TEST_KEY is not set"):
        Client(SemanticConfig(url=url, model="m", api_key_env="TEST_KEY"))
    monkeypatch.setattr(semantic, "TRIES", 1)
    with pytest.raises(UserError, match="refused"):
        Client(SemanticConfig(url="http://127.0.0.1:9", model="m")).embed(["a"])


def test_a_corpus_without_semantic_duplicates(tmp_path: Path, url: str) -> None:
    rows = [*(f"one more {text}" for text in texts()[:12]), "something of its own entirely"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    out = tmp_path / "out"
    out.mkdir()
    dedup = {"semantic": {"url": url, "model": "m"}}
    source = str(tmp_path / "in.jsonl")
    build_corpus(
        DataConfig(sources=source, dedup=dedup, validation_fraction=0, min_documents=1),  # type: ignore[arg-type]
        out,
    )
    kept = [row["text"] for row in read_corpus(out, "train")]
    assert len(kept) == len({name for name in THEMES for row in rows if name in row}) + 1
    dropped = pq.read_table(out / "dropped.parquet").to_pylist()
    assert {row["reason"] for row in dropped} == {"semantic_duplicate"}
    assert dropped[0]["detail"].startswith("says what is in in.jsonl#")
    assert read_json(out / "report.json")["steps"][-1]["step"] == "semantic"
