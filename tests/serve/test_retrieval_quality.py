"""Recall and nDCG: worked numbers, the ways of searching side by side, and BoolQ with the packaged encoder."""

import gzip
import http.server
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plain_store import Letters, PlainStore
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.serve.retrieval.encoders import PACKAGED, packaged_folder
from soma.serve.retrieval.index import Cutting, index
from soma.serve.retrieval.measure import Pair, evaluate, ndcg, read_pairs, recall, table
from soma.serve.retrieval.search import Reranker, Retriever


def test_worked_numbers() -> None:
    ranking = ["b", "a", "x", "c"]
    assert [recall(ranking, ["a", "c"], k) for k in (1, 2, 3, 4)] == [0, 0.5, 0.5, 1]
    assert recall([], ["a"], 5) == 0
    assert ndcg(["b", "a"], ["a"], 10) == pytest.approx(0.63093, abs=1e-5)
    gained, best = 1 / math.log2(3) + 1 / math.log2(5), 1 + 1 / math.log2(3)
    assert ndcg(ranking, ["a", "c"], 10) == pytest.approx(gained / best) == pytest.approx(0.65092, abs=1e-5)
    assert ndcg(ranking, ["a", "c"], 2) == pytest.approx((1 / math.log2(3)) / best)
    assert ndcg(["a", "c"], ["a", "c"], 1) == ndcg(["a", "c", "b"], ["c", "a"], 5) == 1
    assert ndcg(["x"], ["a"], 5) == 0


@pytest.fixture
def retriever(tmp_path: Path) -> Retriever:
    folder = tmp_path / "docs"
    (folder / "zoo").mkdir(parents=True)
    for name, text in {"zoo/cat.txt": "cats purr", "zoo/dog.txt": "dogs bark", "sea.txt": "ships sail"}.items():
        (folder / name).write_text(text)
    store = PlainStore()
    index(store, Letters(), [str(folder)], "idx", Cutting())
    return Retriever(store, Letters())


class BackwardsReranker(http.server.BaseHTTPRequestHandler):
    """A /v1/rerank that likes what has many letters `b`; once it is busy."""

    busy = 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, found = 200, [{"index": place, "relevance_score": float(text.count("b"))}
                              for place, text in enumerate(body["documents"])]  # fmt: skip
        if BackwardsReranker.busy:
            BackwardsReranker.busy, status = 0, 503
        data = json.dumps({"results": found[::-1]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def test_side_by_side(retriever: Retriever) -> None:
    pairs = [Pair("purr", ("zoo/cat.txt",)), Pair("bark", ("zoo",)), Pair("ships", ("sea.txt", "zoo/dog.txt"))]
    found = {each.way: each for each in evaluate(retriever, pairs, (1, 3))}
    assert list(found) == ["dense", "bm25", "hybrid"]
    assert found["bm25"].recall[1] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["hybrid"].recall[3] == 1
    assert "nDCG@3" in table(list(found.values()), 3)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), BackwardsReranker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        retriever.reranker = Reranker(f"http://127.0.0.1:{server.server_port}/v1#any")
        reranked = evaluate(retriever, pairs, (1, 3))[-1]
        assert (reranked.way, reranked.recall[1]) == ("reranked", pytest.approx((0 + 1 + 0.5) / 3))
        hits = retriever.search("purr", 1)
        assert (hits[0].chunk.source, hits[0].score, list(hits[0].scores)[-1]) == ("zoo/dog.txt", 1.0, "rerank")
        assert retriever.search("purr", 1, rerank=False)[0].chunk.source == "zoo/cat.txt"
        server.shutdown()
    with pytest.raises(UserError, match="no question"):
        evaluate(retriever, [])
    with pytest.raises(UserError, match="expected URL#MODEL"):
        Reranker("http://127.0.0.1:1/v1")


def test_pairs_are_read_with_their_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"question": "q", "source": "a.md"}\n\n{"question": "r", "sources": ["guide/", "b.jsonl#2"]}\n')
    assert read_pairs(file) == [Pair("q", ("a.md",)), Pair("r", ("guide", "b.jsonl#2"))]
    for wrong in (
        "{",
        '{"question": "q"}',
        '{"question": "", "source": "a"}',
        '{"question": "q", "sources": [1]}',
        "[]",
    ):
        file.write_text('{"question": "q", "source": "a.md"}\n' + wrong + "\n")
        with pytest.raises(UserError, match=r"pairs.jsonl, line 2"):
            read_pairs(file)


def test_boolq(tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    """Real questions find their passages: far above chance, and hybrid not below the worse half."""
    pytest.importorskip("qdrant_client", reason="the extra [retrieval] is not installed")
    source = shared_data("glue_superglue_qa/boolq.validation.jsonl.gz")
    if packaged_folder() is None:
        pytest.skip(f"{PACKAGED} is not installed (the extra [retrieval])")
    rows = [json.loads(line) for line in gzip.decompress(source.read_bytes()).splitlines()]
    texts = list(dict.fromkeys(row["passage"] for row in rows if len(row["passage"]) < 400))[:24]
    (tmp_path / "boolq.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = [
        {"question": row["question"], "source": f"boolq.jsonl#{texts.index(row['passage']) + 1}"}
        for row in rows if row["passage"] in texts
    ][:12]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    run, to = CliRunner(), str(tmp_path / "idx")
    made = run.invoke(app, ["index", str(tmp_path / "boolq.jsonl"), "--to", to])
    assert made.exit_code == 0, made.output
    shown = run.invoke(app, ["search", to, "--evaluate", str(tmp_path / "pairs.jsonl")]).output.splitlines()
    ways = {line.split()[0]: float(line.split()[3]) for line in shown[1:4]}  # recall@10
    assert list(ways) == ["dense", "bm25", "hybrid"]
    assert min(ways.values()) > 0.8
    assert ways["hybrid"] >= min(ways["dense"], ways["bm25"])
