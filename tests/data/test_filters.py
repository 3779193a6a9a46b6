"""Filters in a recipe: reasons, attributes beside the corpus, and thresholds that change without measuring again."""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from soma.base.artefact import content_hash, read_json
from soma.data import partitions
from soma.data.config import DataConfig
from soma.data.corpus import build_corpus, build_documents, read_corpus
from soma.data.signals.measure import Measurer

STOPS = ["the", "and", "of", "to", "that", "with"]


QUALITY = {"min_stop_words": None, "max_ellipses_per_word": 0.1}
FILTERS = {
    "gopher_repetition": {"max_top_2gram": None, "max_top_3gram": None, "max_top_4gram": None},
    "gopher_quality": QUALITY,
}


def prose(seed: int, sentences: int = 8) -> str:
    generator = random.Random(seed)
    lines = [[f"name{generator.randrange(10**6)}" for _ in range(9)] for _ in range(sentences)]
    return " ".join(" ".join([*words, generator.choice(STOPS), words[0] + "s"]) + "." for words in lines)


def folder_of(tmp_path: Path) -> Path:
    texts = [prose(seed) for seed in range(60)]
    texts += [prose(seed, 1) for seed in range(100, 105)]  # short
    texts += [prose(200).replace(" ", " #")]
    texts += ["same line again and again.\n" * 30 + prose(300)]
    root = tmp_path / "docs"
    root.mkdir()
    for part in range(3):
        rows = [json.dumps({"text": text}) for text in texts[part::3]]
        (root / f"{part}.jsonl").write_text("\n".join(rows))
    return root


def build(tmp_path: Path, name: str, config: DataConfig, **more: Path) -> Path:
    (tmp_path / name).mkdir()
    build_corpus(config, tmp_path / name, **more)
    return tmp_path / name


def rows_of(corpus: Path, split: str, kind: str = "") -> list[dict[str, object]]:
    return pq.read_table(corpus / f"{kind}{split}-00000.parquet").to_pylist()


def test_a_dropped_document_has_its_reason_and_value(tmp_path: Path) -> None:
    config = DataConfig(sources=str(folder_of(tmp_path)), filters=FILTERS)  # type: ignore[arg-type]
    corpus = build(tmp_path, "corpus", config)
    dropped = pq.read_table(corpus / "dropped.parquet").to_pylist()
    found = {row["reason"]: row["detail"] for row in dropped}
    assert set(found) == {
        "gopher_quality.min_words", "gopher_quality.max_hashes_per_word", "gopher_repetition.max_dup_lines",
    }  # fmt: skip
    assert found["gopher_quality.min_words"].endswith(", at least 50")
    assert found["gopher_repetition.max_dup_lines"] == "dup_lines = 0.9355, at most 0.3"
    assert all(row["excerpt"] for row in dropped)
    report = read_json(corpus / "report.json")
    assert [(step["step"], step["documents"]) for step in report["steps"]] == [
        ("read", 67), ("clean", 67), ("filters", 60), ("exact", 60), ("near", 60),
    ]  # fmt: skip


def test_attributes_lie_beside_the_corpus_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of(tmp_path)
    config = DataConfig(sources=str(root), filters=FILTERS, attributes=["language"])  # type: ignore[arg-type]
    corpus = build(tmp_path, "corpus", config)
    for split in ("train", "validation"):
        rows, beside = rows_of(corpus, split), rows_of(corpus, split, "attributes-")
        assert [row["id"] for row in rows] == [row["id"] for row in beside]
        columns = Measurer(config.signals).measure([str(row["text"]) for row in rows])
        for name, values in columns.items():
            assert [row[name] for row in beside] == values.tolist()
    # How the work is cut, and by how many it is done, changes no byte.
    monkeypatch.setattr(partitions, "PARTITION_FILES", 1)
    monkeypatch.setattr(partitions, "BATCH_ROWS", 5)
    assert content_hash(build(tmp_path, "cut", config)) == content_hash(corpus)
    assert content_hash(build(tmp_path, "two", config.model_copy(update={"workers": 2}))) == content_hash(corpus)
    # Attributes alone take nothing out; without filters the corpus is as it was.
    plain = DataConfig(sources=str(root))  # type: ignore[arg-type]
    measured = plain.model_copy(update={"attributes": ["fineweb"]})
    first, second = build(tmp_path, "plain", plain), build(tmp_path, "measured", measured)
    assert list(read_corpus(first, "train")) == list(read_corpus(second, "train"))
    assert (second / "attributes-train-00000.parquet").exists()
    assert not (first / "attributes-train-00000.parquet").exists()


def test_a_changed_threshold_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(sources=str(folder_of(tmp_path)), filters=FILTERS)  # type: ignore[arg-type]
    documents = tmp_path / "documents"
    documents.mkdir()
    build_documents(config, documents)
    whole = build(tmp_path, "whole", config)
    loose = DataConfig(sources="nowhere", filters={**FILTERS, "gopher_quality": {**QUALITY, "min_words": 5}})  # type: ignore[arg-type]

    def never(*_: object) -> None:
        raise AssertionError("a signal was measured again")

    monkeypatch.setattr(Measurer, "measure", never)
    again = build(tmp_path, "again", config, documents=documents)
    assert content_hash(again) == content_hash(whole)
    more = build(tmp_path, "more", loose, documents=documents)
    counts = [read_json(corpus / "report.json")["steps"][2]["documents"] for corpus in (again, more)]
    assert counts == [60, 65]


def test_stages_of_a_recipe_with_filters() -> None:
    from soma.recipe import Recipe
    from soma.stages.order import stages_of

    def stages(**data: object) -> dict[str, dict[str, object]]:
        recipe = Recipe.model_validate({"name": "x", "data": {"sources": "docs", **data}, "tokenizer": {}})
        return {stage.name: stage.config for stage in stages_of(recipe)}

    assert list(stages()) == ["corpus", "tokenizer"]
    one, two = stages(filters="fineweb"), stages(filters={"presets": ["fineweb"], "fineweb": {"max_short_lines": 0.5}})
    assert list(one) == ["documents", "corpus", "tokenizer"]
    assert one["documents"] == two["documents"]
    assert one["corpus"] != two["corpus"]
    assert one["documents"] != stages(filters="c4")["documents"]
    assert stages(workers=3) == stages()
