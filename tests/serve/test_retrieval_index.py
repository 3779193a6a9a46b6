"""`soma index` and search in it, with a small random BERT and the Qdrant of a folder; a plain store is the oracle."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_store import Letters, PlainStore
from tiny_encoder import make_encoder
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.serve.retrieval.encoders import PACKAGED, LocalEncoder, RemoteEncoder, check_same, describe, packaged_folder
from soma.serve.retrieval.index import Cutting, forget, index
from soma.serve.retrieval.qdrant import QdrantStore
from soma.serve.retrieval.search import Retriever, open_retriever
from soma.serve.running import running_service

pytest.importorskip("qdrant_client", reason="the extra [retrieval] is not installed")
CUTTING = Cutting(chunk_tokens=32, overlap=8)


class Counting:
    """An encoder that remembers what it was asked."""

    def __init__(self, inner: LocalEncoder) -> None:
        self.inner = inner
        self.reference, self.hash, self.max_tokens = inner.reference, inner.hash, inner.max_tokens
        self.count, self.close = inner.count, inner.close
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        return self.inner.encode(texts)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder") / "tiny-bert")


@pytest.fixture(scope="module")
def local(encoder_folder: Path) -> LocalEncoder:
    return LocalEncoder(encoder_folder, str(encoder_folder))


@pytest.fixture
def encoder(local: LocalEncoder) -> Counting:
    return Counting(local)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "guide").mkdir(parents=True)
    (folder / "guide" / "install.md").write_text(
        "# Install\n\n" + " ".join(f"Run step {name} of one chapter in the guide." for name in "abcdefghi")
    )
    (folder / "guide" / "river.md").write_text("# River\n\nThe river Danube ends in the Black Sea.\n")
    (folder / "cats.txt").write_text("A cat sits on the mat. Dogs chase cats.")
    rows = [{"text": "Gradient descent steps down the loss.", "title": "Optimizers", "year": 2024},
            {"text": "The key limit is one minute.", "title": "Limits", "year": 2025, "rate": 0.5}]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.txt").write_text("")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def content(store: Any) -> dict[str, tuple[Any, ...]]:
    """Everything in a store: by id the chunk, its vector to 5 digits, its weights."""
    if isinstance(store, PlainStore):
        return {key: (entry.chunk, np.round(entry.vector, 5).tolist()) for key, entry in store.entries.items()}
    points, _ = store.client.scroll("soma", limit=10_000, with_vectors=True)
    return {
        str(point.id): (point.payload, np.round(point.vector["dense"], 5).tolist(), point.vector["bm25"].indices)
        for point in points
    }  # fmt: skip


def test_chunks_carry_their_places(tmp_path: Path, docs: Path, encoder: Counting) -> None:
    store = QdrantStore(str(tmp_path / "idx"), make=True)
    report = index(store, encoder, [str(docs)], "idx", CUTTING)
    assert (report.written, report.unchanged, report.passed_over) == (5, 0, 1)
    assert report.chunks == store.count() == len(encoder.texts) - 2, "two texts are the probe"
    assert any("empty.txt" in problem for problem in report.problems)
    hits = Retriever(store, encoder).search("danube", 3, "bm25")
    assert [(hit.chunk.source, hit.chunk.title) for hit in hits] == [("guide/river.md", "River")]
    chunk = hits[0].chunk
    assert (docs / chunk.source).read_text()[chunk.start : chunk.end] == chunk.text
    for found in store.dense(encoder.encode(["x"])[0], 100):
        if found.chunk.kind != "jsonl":
            assert (docs / found.chunk.source).read_text()[found.chunk.start : found.chunk.end] == found.chunk.text
        assert encoder.count([found.chunk.told])[0] <= CUTTING.chunk_tokens
    rows = Retriever(store, encoder).search("gradient", 1, "bm25")
    assert (rows[0].chunk.source, rows[0].chunk.title, rows[0].chunk.meta) == (
        "rows.jsonl#1", "Optimizers", {"title": "Optimizers", "year": 2024},
    )  # fmt: skip
    store.close()


def test_again_encodes_only_what_changed(tmp_path: Path, docs: Path, encoder: Counting) -> None:
    """… and what is left is what a fresh index of the same files has."""
    store = QdrantStore(str(tmp_path / "idx"), make=True)
    index(store, encoder, [str(docs)], "idx", CUTTING)
    before = content(store)
    encoder.texts.clear()
    report = index(store, encoder, [str(docs)], "idx", CUTTING)
    # The empty file has no chunk to remember it by; it is read again and costs nothing.
    assert (report.written, report.unchanged, report.removed, encoder.texts) == (1, 4, 0, [])
    assert content(store) == before

    (docs / "cats.txt").write_text("A cat sits on the mat. Dogs chase a river.")
    (docs / "guide" / "install.md").unlink()
    (docs / "new.txt").write_text("The third chapter.")
    report = index(store, encoder, [str(docs)], "idx", CUTTING)
    assert (report.unchanged, report.removed) == (2, 1)
    assert encoder.texts == ["A cat sits on the mat. Dogs chase a river.", "The third chapter."]
    fresh = QdrantStore(str(tmp_path / "fresh"), make=True)
    index(fresh, encoder, [str(docs)], "fresh", CUTTING)
    assert content(store) == content(fresh) != before

    encoder.texts.clear()
    assert index(store, encoder, [str(docs)], "idx", Cutting(chunk_tokens=24, overlap=0)).unchanged == 0, "cut anew"
    assert encoder.texts
    fresh.close()
    store.close()


def test_sources_are_kept_apart(tmp_path: Path, docs: Path, encoder: Counting) -> None:
    """What is gone is taken out of what was named, and of nothing else; a file may be there twice."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "cats.txt").write_text("Cats run.")
    store = PlainStore()
    index(store, encoder, [str(docs)], "idx", CUTTING)
    index(store, encoder, [str(other)], "idx", CUTTING)
    index(store, encoder, [str(docs / "guide")], "idx", CUTTING)
    assert {file for _, file in store.hashes()} >= {"cats.txt", "river.md", "guide/river.md"}
    assert sum(file == "cats.txt" for _, file in store.hashes()) == 2
    assert forget(store, [str(docs)]) == 4
    assert {origin for origin, _ in store.hashes()} == {str(other), str(docs / "guide")}
    with pytest.raises(UserError, match="nothing in the index came from there"):
        forget(store, [str(docs)])


def test_a_file_that_cannot_be_read_now_stays(tmp_path: Path, docs: Path, encoder: Counting) -> None:
    store = PlainStore()
    index(store, encoder, [str(docs)], "idx", CUTTING)
    (docs / "cats.txt").unlink()
    (docs / "cats.txt").symlink_to(tmp_path / "not there yet")
    report = index(store, encoder, [str(docs)], "idx", CUTTING)
    assert report.removed == 0
    assert any("cats.txt" in problem for problem in report.problems)
    assert (str(docs), "cats.txt") in store.hashes()


KILLED = """
    import os, signal, sys
    from plain_store import Letters
    from soma.serve.retrieval import index as module
    from soma.serve.retrieval.qdrant import QdrantStore

    class Killed(QdrantStore):
        calls = 0
        def upsert(self, entries):
            super().upsert(entries)
            Killed.calls += 1
            if sys.argv[3] == "upsert" and Killed.calls == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        def delete(self, *where):
            if sys.argv[3] == "delete":
                os.kill(os.getpid(), signal.SIGKILL)
            super().delete(*where)

    module.BATCH = 3
    docs, to = sys.argv[1:3]
    module.index(Killed(to, make=True), Letters(), [docs], to, module.Cutting(32, 8))
"""


@pytest.mark.parametrize("place", ["upsert", "delete"])
def test_killed_in_the_middle(tmp_path: Path, docs: Path, place: str) -> None:
    """kill -9 between two batches of one file, and between a file's new chunks and its old ones' end."""
    to, encoder = str(tmp_path / "idx"), Letters()
    if place == "delete":
        store = QdrantStore(to, make=True)
        index(store, encoder, [str(docs)], "idx", CUTTING)
        store.close()
        (docs / "guide" / "install.md").write_text(
            "# Install\n\n" + " ".join(f"Run chapter {name} of the third." for name in "abcdefghi")
        )
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(docs), to, place]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    store, fresh = QdrantStore(to), QdrantStore(str(tmp_path / "fresh"), make=True)
    index(fresh, encoder, [str(docs)], "fresh", CUTTING)
    assert content(store) != content(fresh), "it was killed before it was done"
    index(store, encoder, [str(docs)], "idx", CUTTING)
    assert content(store) == content(fresh)
    store.close()
    fresh.close()


def test_both_stores_find_the_same(tmp_path: Path, docs: Path, encoder: Counting) -> None:
    """Dense, BM25 and hybrid, with and without filters, against lists and sums."""
    store, plain = QdrantStore(str(tmp_path / "idx"), make=True), PlainStore()
    for each in (store, plain):
        index(each, encoder, [str(docs)], "idx", CUTTING)
    ours, oracle = Retriever(store, encoder), Retriever(plain, encoder)
    filters = [None, {"source": "guide"}, {"source": ["cats.txt", "rows.jsonl#2"]}, {"meta.year": 2025},
               {"meta.year": [2024, 2025], "kind": "jsonl"}, {"meta.rate": 0.5}, {"title": "River"},
               {"source": "gui"}]  # fmt: skip
    for mode in ("dense", "bm25", "hybrid"):
        for where in filters:
            for question in ("cat on the river", "gradient descent limit", "install step two three"):
                made, wanted = (each.search(question, 50, mode, where) for each in (ours, oracle))
                assert [hit.id for hit in made] == [hit.id for hit in wanted]
                scores = [sorted(hit.scores.items()) for hit in made], [sorted(hit.scores.items()) for hit in wanted]
                assert [[name for name, _ in each] for each in scores[0]] == [
                    [n for n, _ in each] for each in scores[1]
                ]
                flat = [[value for each in side for _, value in each] for side in scores]
                assert np.allclose(*flat, atol=1e-5)
    assert len(ours.search("the", 50)) == len(oracle.search("the", 50)) > 5
    assert {hit.chunk.source for hit in ours.search("cat", 9, where={"source": "guide"})} == {
        "guide/install.md", "guide/river.md",
    }  # fmt: skip
    assert ours.search("cat", where={"source": "gui"}) == [], "a folder's name, not the beginning of one"
    with pytest.raises(UserError, match="expected one of source, kind"):
        ours.search("cat", where={"colour": "red"})
    store.close()


def test_questions_without_an_answer(tmp_path: Path, encoder: Counting) -> None:
    (tmp_path / "docs").mkdir()
    store = QdrantStore(str(tmp_path / "idx"), make=True)
    report = index(store, encoder, [str(tmp_path / "docs")], "idx", CUTTING)
    assert (report.written, store.count()) == (0, 0)
    retriever = Retriever(store, encoder)
    assert [retriever.search("cat", mode=mode) for mode in ("dense", "bm25", "hybrid")] == [[], [], []]
    assert retriever.search("?!", mode="bm25") == []
    for wrong in ({"question": "  "}, {"question": "x", "limit": 0}, {"question": "x", "mode": "fuzzy"}):
        with pytest.raises(UserError):
            retriever.search(**wrong)  # type: ignore[arg-type]
    store.close()


def test_another_encoder_is_refused(tmp_path: Path, docs: Path, encoder: Counting) -> None:
    to = str(tmp_path / "idx")
    store = QdrantStore(to, make=True)
    index(store, encoder, [str(docs)], "idx", CUTTING)
    described = store.describe()
    assert described is not None
    assert (described.encoder, described.encoder_hash, described.dimensions) == (encoder.reference, encoder.hash, 32)
    before = content(store)
    other = LocalEncoder(make_encoder(tmp_path / "other", seed=2), "other")
    wide = LocalEncoder(make_encoder(tmp_path / "wide", width=64), "wide")
    for wrong, words in ((other, "other .sha256 .*32 dimensions. is another one"), (wide, "64 dimensions")):
        with pytest.raises(UserError, match=words) as refused:
            index(store, wrong, [str(docs)], "idx", CUTTING)
        assert encoder.hash[:12] in str(refused.value)
        assert wrong.hash[:12] in str(refused.value)
    assert content(store) == before
    with pytest.raises(UserError, match="at most"):
        index(store, encoder, [str(docs)], "idx", Cutting(chunk_tokens=127))
    store.close()
    with pytest.raises(UserError, match="is another one"):
        open_retriever(to, str(tmp_path / "other"))
    retriever = open_retriever(to)  # the one that it was made with
    assert retriever.encoder.hash == encoder.hash
    retriever.close()


@pytest.mark.slow
def test_encoders_of_a_service(tmp_path: Path, docs: Path, encoder: Counting, encoder_folder: Path) -> None:
    """The same folder behind /v1/embeddings and behind V2: the same vectors, so the same index; another is refused."""
    with running_service(encoder_folder, precision="fp32") as url:
        over_openai, over_v2 = RemoteEncoder(f"{url}/v1"), RemoteEncoder(f"{url}/v2/models/tiny-bert")
        assert over_openai.reference == f"{url}/v1#tiny-bert"
        texts = ["The river Danube", "a cat"]
        for remote in (over_openai, over_v2):
            assert np.allclose(remote.encode(texts), encoder.encode(texts), atol=1e-5)
            check_same(describe(encoder, 10), remote, "idx")
            other = LocalEncoder(make_encoder(tmp_path / "other", seed=2), "other")
            with pytest.raises(UserError, match="no hash known"):
                check_same(describe(other, 10), remote, "idx")
        store = PlainStore()
        index(store, over_openai, [str(docs)], "idx", CUTTING)
        assert store.description is not None
        assert store.description.encoder_hash == ""
        assert Retriever(store, over_v2).search("danube", 1)[0].chunk.source == "guide/river.md"
        with pytest.raises(UserError, match="nobody"):
            RemoteEncoder(f"{url}/v1#nobody").encode(["x"])


def test_folders_that_are_no_index(tmp_path: Path, docs: Path) -> None:
    with pytest.raises(UserError, match="there is no index"):
        QdrantStore(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="is no index"):
        QdrantStore(str(docs), make=True)


def test_a_folder_that_another_process_has(tmp_path: Path, docs: Path, encoder_folder: Path) -> None:
    to = tmp_path / "idx"
    holding = "import sys; from soma.serve.retrieval.qdrant import QdrantStore; s = QdrantStore(sys.argv[1], make=True)"
    command = [sys.executable, "-c", holding + "; print('held', flush=True); sys.stdin.read()", str(to)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdin
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process has this index open"):
            QdrantStore(str(to), make=True)
        holder.stdin.close()
    QdrantStore(str(to), make=True).close()


def test_commands(tmp_path: Path, docs: Path, encoder_folder: Path) -> None:
    run, to = CliRunner(), str(tmp_path / "idx")
    options = ["--to", to, "--encoder", str(encoder_folder), "--chunk-tokens", "32", "--overlap", "8"]
    made = run.invoke(app, ["index", str(docs), *options])
    assert made.exit_code == 0, made.output
    found = run.invoke(app, ["search", to, "danube", "--limit", "1", "--mode", "bm25"])
    assert "guide/river.md:0-48  River" in found.output
    rows = run.invoke(app, ["search", to, "the", "--json", "--where", "meta.year=2025"]).output.splitlines()
    assert [json.loads(row)["source"] for row in rows] == ["rows.jsonl#2"]
    assert str(tmp_path) not in "".join(rows)
    assert "nothing found" in run.invoke(app, ["search", to, "the", "--where", "source=none"]).output
    assert run.invoke(app, ["index", str(docs), "--to", to, "--forget"]).exit_code == 0
    assert "nothing found" in run.invoke(app, ["search", to, "danube"]).output


def test_the_packaged_encoder(tmp_path: Path) -> None:
    """MiniLM of PyPI by our own model code: its hash is known, and nearness is meaning."""
    folder = packaged_folder()
    if folder is None:
        pytest.skip(f"{PACKAGED} is not installed (the extra [retrieval])")
    encoder = LocalEncoder(folder, PACKAGED)
    one, two, three = encoder.encode(["A man eats food.", "Someone is having a meal.", "The stock market fell."])
    assert one @ two > 0.5 > one @ three
    assert (encoder.max_tokens, len(one), encoder.hash[:12]) == (510, 384, "1f5ab455fa86")
    encoder.close()
