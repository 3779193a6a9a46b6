"""`soma data embed`: the order of rows, what a killed run has left, what is refused."""

import hashlib
import http.server
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from soma.base.errors import UserError
from soma.base.locks import lock
from soma.data.config import SemanticConfig
from soma.data.embed import REQUESTS, embed_corpus
from soma.data.partitions import text_id

BATCH = 2
BLOCK = BATCH * REQUESTS


def vector(text: str) -> list[float]:
    return [byte + 1.0 for byte in hashlib.sha256(text.encode()).digest()[:4]]


class Endpoint(http.server.BaseHTTPRequestHandler):
    """/v1/embeddings. A text with `held` in it waits for `released`; then `holding` is set."""

    texts: ClassVar[list[str]] = []
    held, changes_at = "", ""
    holding, released = threading.Event(), threading.Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Endpoint.held and Endpoint.held in body["input"]:
            Endpoint.holding.set()
            Endpoint.released.wait(300)
            return
        Endpoint.texts += body["input"]
        width = 3 if Endpoint.changes_at in body["input"] else 4
        rows = [{"index": index, "embedding": vector(text)[:width]} for index, text in enumerate(body["input"])]
        data = json.dumps({"data": rows}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Endpoint.texts, Endpoint.held, Endpoint.changes_at = [], "", ""
    Endpoint.holding, Endpoint.released = threading.Event(), threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Endpoint.released.set()
        server.shutdown()


def make_corpus(folder: Path) -> tuple[Path, list[str]]:
    """Three files of 90 texts in all, and what was dropped beside them."""
    texts = [f"text {number}" for number in range(90)]
    folder.mkdir()
    for name, rows in (
        ("train-00000", texts[:50]), ("train-00001", texts[50:70]), ("validation-00000", texts[70:]), ("dropped", ["x"])
    ):  # fmt: skip
        pq.write_table(pa.table({"text": rows}), folder / f"{name}.parquet")
    return folder, texts


def settings(url: str, **changes: Any) -> SemanticConfig:
    return SemanticConfig(**{"url": url, "model": "m", "batch": BATCH, "concurrency": 2} | changes)


def test_rows_are_in_the_corpus_s_order(tmp_path: Path, url: str) -> None:
    corpus, texts = make_corpus(tmp_path / "corpus")
    done = embed_corpus(str(corpus), tmp_path / "a.parquet", settings(url))
    assert (done.documents, done.asked, done.dimensions, done.skipped) == (90, 90, 4, 0)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["id"].to_pylist() == [text_id(text) for text in texts]
    assert table["source"].to_pylist()[0].startswith("train-00000.parquet")
    want = np.array([vector(text) for text in texts])
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    assert np.allclose(table["embedding"].to_pylist(), want, atol=1e-6)
    embed_corpus(str(corpus), tmp_path / "b.parquet", settings(url, concurrency=7))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet", "corpus"]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, url: str) -> None:
    corpus, texts = make_corpus(tmp_path / "corpus")
    embed_corpus(str(corpus), tmp_path / "whole.parquet", settings(url))
    Endpoint.texts, Endpoint.held = [], texts[BLOCK + 5]
    out = tmp_path / "killed.parquet"
    command = [sys.executable, "-m", "soma.cli", "data", "embed", str(corpus), "--url", url, "--model", "m",
               "--out", str(out), "--batch", str(BATCH), "--concurrency", "2"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        came = Endpoint.holding.wait(240)
        process.send_signal(signal.SIGKILL)
        assert came, process.communicate()[1]
        process.communicate()
    assert not out.exists()
    Endpoint.texts, Endpoint.held = [], ""
    Endpoint.released.set()
    done = embed_corpus(str(corpus), out, settings(url))
    assert (done.documents, done.asked) == (90, 90 - BLOCK)
    assert not set(Endpoint.texts) & set(texts[:BLOCK])
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_only_what_changed_is_asked_for_again(tmp_path: Path, url: str) -> None:
    """A run that ends in vectors of another length leaves its first block; new texts behind it are asked for."""
    corpus, texts = make_corpus(tmp_path / "corpus")
    out = tmp_path / "a.parquet"
    Endpoint.changes_at = texts[-1]
    with pytest.raises(UserError, match=r"vectors of \[3, 4\] dimensions"):
        embed_corpus(str(corpus), out, settings(url))
    assert not out.exists()
    Endpoint.changes_at, Endpoint.texts = "", []
    changed = [f"other {number}" for number in range(20)]
    pq.write_table(pa.table({"text": changed}), corpus / "validation-00000.parquet")
    assert embed_corpus(str(corpus), out, settings(url)).asked == 90 - 2 * BLOCK
    assert set(Endpoint.texts) == {*texts[2 * BLOCK : 70], *changed}
    with pytest.raises(UserError, match="is there already"):
        embed_corpus(str(corpus), out, settings(url))


def test_another_model_takes_nothing_of_the_first(tmp_path: Path, url: str) -> None:
    corpus, texts = make_corpus(tmp_path / "corpus")
    Endpoint.changes_at = texts[-1]
    with pytest.raises(UserError, match="dimensions"):
        embed_corpus(str(corpus), tmp_path / "a.parquet", settings(url))
    Endpoint.changes_at = ""
    assert embed_corpus(str(corpus), tmp_path / "a.parquet", settings(url, model="other")).asked == 90


def test_what_is_wrong_is_named(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOMA_NO_KEY", raising=False)
    empty, out = str(tmp_path / "empty.jsonl"), tmp_path / "a.parquet"
    Path(empty).write_text("")
    with pytest.raises(UserError, match="no text"):
        embed_corpus(empty, out, settings(url))
    with pytest.raises(UserError, match="soma data embed: the variable of the key SOMA_NO_KEY is not set"):
        embed_corpus(empty, out, settings(url, api_key_env="SOMA_NO_KEY"))
    with lock(tmp_path / ".a.parquet.lock"), pytest.raises(UserError, match="in use"):
        embed_corpus(empty, out, settings(url))
