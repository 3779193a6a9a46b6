"""A corpus held against an earlier one, an index, evaluation sets, and its own repeated text."""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from soma.base.artefact import read_json
from soma.base.errors import UserError
from soma.data.config import DataConfig
from soma.data.corpus import build_corpus, read_corpus
from soma.data.dedup.against import add_to_index, open_old
from soma.data.duplicates import outside_fingerprint

WORDS = [f"word{n}" for n in range(400)]


def prose(seed: int, words: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def build(tmp_path: Path, name: str, texts: dict[str, str], **more: object) -> Path:
    """A corpus of these texts, each a row with its name."""
    rows = "".join(json.dumps({"text": text, "name": key}) + "\n" for key, text in texts.items())
    (tmp_path / f"{name}.jsonl").write_text(rows)
    out = tmp_path / name
    out.mkdir()
    settings = {"validation_fraction": 0, "min_documents": 1} | more
    build_corpus(DataConfig(sources=str(tmp_path / f"{name}.jsonl"), **settings), out)  # type: ignore[arg-type]
    return out


def kept(corpus: Path) -> dict[str, str]:
    return {json.loads(row["meta"])["name"]: row["text"] for row in read_corpus(corpus, "train")}


def dropped(corpus: Path) -> dict[str, tuple[str, str]]:
    """Row of the source → (reason, detail)."""
    rows = pq.read_table(corpus / "dropped.parquet").to_pylist()
    return {row["source"].split("#")[1]: (row["reason"], row["detail"]) for row in rows}


def changed(text: str, *places: int) -> str:
    words = text.split()
    for place in places:
        words[place] = "other"
    return " ".join(words)


# --- An earlier corpus ---

OLD = {"a": prose(1), "b": prose(2), "c": prose(3)}
NEW = {
    "same": f"  {prose(1)}\n", "near": changed(prose(2), 7), "nearer": changed(prose(2), 7, 80), "new": prose(9),
    "pair": prose(10), "pair2": changed(prose(10), 5),
}  # fmt: skip


def test_what_was_there_is_dropped(tmp_path: Path) -> None:
    old = build(tmp_path, "old", OLD)
    against = build(tmp_path, "against", NEW, dedup={"against": [str(old)]})
    assert set(kept(against)) == {"new", "pair2"} or set(kept(against)) == {"new", "pair"}
    gone = dropped(against)
    assert gone["1"] == ("exact_duplicate", "same as old.jsonl#1, of an earlier corpus")
    assert gone["2"] == ("near_duplicate", "like old.jsonl#2, of an earlier corpus")
    assert gone["3"][0] == "near_duplicate"
    alone = build(tmp_path, "alone", NEW)
    assert len(kept(alone)) == 4  # without the earlier corpus only the copies among the new go
    assert read_json(against / "report.json")["near_duplicates"]["sizes"] == {"2": 2}


def test_an_index_says_the_same_as_its_corpora(tmp_path: Path) -> None:
    first, second = build(tmp_path, "first", {"a": OLD["a"]}), build(tmp_path, "second", {"b": OLD["b"], "c": OLD["c"]})
    config = DataConfig(sources="x").dedup  # type: ignore[arg-type]
    add_to_index(tmp_path / "index", [first], config)
    facts = add_to_index(tmp_path / "index", [first, second], config)
    assert len(facts["corpora"]) == 2
    assert sum(part["documents"] for part in facts["parts"]) == 3
    by_index = build(tmp_path, "new1", NEW, dedup={"against": [str(tmp_path / "index")]})
    by_corpora = build(tmp_path, "new2", NEW, dedup={"against": [str(first), str(second)]})
    assert kept(by_index) == kept(by_corpora)
    assert {row: reason for row, (reason, _) in dropped(by_index).items()} == {
        row: reason for row, (reason, _) in dropped(by_corpora).items()
    }


def test_the_command_makes_an_index(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from soma.cli import app

    corpus = build(tmp_path, "corpus", OLD)
    asked = ["data", "index", str(corpus), "--out", str(tmp_path / "index"), "--ngram", "4"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "3 documents of 1 corpora" in done.output
    assert read_json(tmp_path / "index" / "index.json")["settings"]["ngram"] == 4


def test_growing_by_parts_is_deduplicating_the_whole(tmp_path: Path) -> None:
    """New data against old leaves what all of it at once would: no text twice, none lost."""
    texts = {str(n): changed(prose(n // 3), *range(n % 3)) for n in range(60)}
    halves = [dict(list(texts.items())[:40]), dict(list(texts.items())[20:])]
    first = build(tmp_path, "h0", halves[0])
    second = build(tmp_path, "h1", halves[1], dedup={"against": [str(first)]})
    whole = build(tmp_path, "whole", texts)
    families = [sorted(int(name) // 3 for name in kept(one)) for one in (first, second, whole)]
    assert sorted(families[0] + families[1]) == families[2] == list(range(20))


def test_mistakes_are_named(tmp_path: Path) -> None:
    old = build(tmp_path, "old", OLD)
    config = DataConfig(sources="x").dedup  # type: ignore[arg-type]
    add_to_index(tmp_path / "index", [old], config)
    other = config.model_copy(update={"num_hashes": 64})
    with pytest.raises(UserError, match=r"was made with .*128.*make another index"):
        open_old([str(tmp_path / "index")], other)
    with pytest.raises(UserError, match="make another index"):
        add_to_index(tmp_path / "index", [old], other)
    with pytest.raises(UserError, match="neither a corpus"):
        open_old([str(tmp_path)], config)
    with pytest.raises(UserError, match="no such folder"):
        open_old([str(tmp_path / "none")], config)
    with pytest.raises(UserError, match="not empty, and no index"):
        add_to_index(old, [old], config)


# --- Evaluation sets ---

QUESTION = "which of these numbers is the smallest prime that divides the sum of all others in the list"


def test_contaminated_documents_leave_and_are_listed(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text(json.dumps({"id": "q1", "question": QUESTION}) + "\n")
    texts = {"clean": prose(1), "leak": f"{prose(2)}\n{QUESTION.upper()}!\n{prose(3)}", "other": prose(4)}
    block = {"sets": [str(tmp_path / "set.jsonl")]}
    corpus = build(tmp_path, "drop", texts, decontaminate=block)
    assert set(kept(corpus)) == {"clean", "other"}
    assert dropped(corpus) == {"2": ("contaminated", f"100% of {tmp_path.name}/set.jsonl#1 question")}
    (row,) = pq.read_table(corpus / "contamination.parquet").to_pylist()
    assert (row["source"], row["item"], row["field"], row["match"]) == ("drop.jsonl#2", 1, "question", "ngram")
    assert (row["overlap"], row["n_windows"], row["item_text"]) == (1.0, 6, QUESTION)
    assert "WHICH OF THESE NUMBERS" in row["document_text"]
    facts = read_json(corpus / "report.json")
    assert facts["contamination"]["documents"] == 1
    assert facts["contamination"]["sets"] == [{"set": f"{tmp_path.name}/set.jsonl", "fields": 1, "found": 1}]
    assert facts["steps"][-1]["step"] == "decontaminate"
    listed = build(tmp_path, "report", texts, decontaminate=block | {"action": "report"})
    assert set(kept(listed)) == set(texts)
    assert pq.read_table(listed / "contamination.parquet").num_rows == 1


def test_another_set_is_another_corpus(tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text(QUESTION)
    config = DataConfig(sources="x", decontaminate={"sets": [str(tmp_path / "set.txt")]})  # type: ignore[arg-type]
    before = outside_fingerprint(config)
    (tmp_path / "set.txt").write_text(QUESTION + " again")
    assert outside_fingerprint(config) != before
    assert outside_fingerprint(DataConfig(sources="x")) == ""  # type: ignore[arg-type]


# --- Repeated text ---


def test_repeated_text_is_cut(tmp_path: Path) -> None:
    notice = prose(50, 60)
    texts = {str(n): f"{prose(n, 90)}\n{notice}\n{prose(100 + n, 90)}" for n in range(4)}
    texts |= {"only": notice, "plain": prose(7)}
    dedup = {"near": False, "substring": {}}
    corpus = build(tmp_path, "cut", texts, dedup=dedup)
    found = kept(corpus)
    whole = [name for name, text in found.items() if notice in text]
    assert len(whole) == 1  # the first by id keeps it
    assert found["plain"] == texts["plain"]
    for name in set(found) - {*whole, "plain", "only"}:
        assert found[name] == f"{prose(int(name), 90)}\n{prose(100 + int(name), 90)}"
    facts = read_json(corpus / "report.json")["repeated_text"]
    assert (facts["spans"], facts["units"]) == (4, 240)
    if "only" not in found:
        assert dropped(corpus)["5"] == ("repeated_text", "nothing of its own is left")
    counted = build(tmp_path, "count", texts, dedup={"near": False, "substring": {"action": "count"}})
    assert kept(counted) == texts
    assert read_json(counted / "report.json")["repeated_text"]["units"] == 240


def test_ids_are_those_of_what_is_left(tmp_path: Path) -> None:
    from soma.data.partitions import text_id

    notice = prose(50, 60)
    corpus = build(tmp_path, "c", {str(n): f"{prose(n)} {notice}" for n in range(6)}, dedup={"substring": {}})
    rows = list(read_corpus(corpus, "train"))
    assert [row["id"] for row in rows] == sorted(text_id(row["text"]) for row in rows)
    assert all(row["n_bytes"] == len(row["text"].encode()) and row["n_chars"] == len(row["text"]) for row in rows)
    again = build(tmp_path, "d", {str(n): f"{prose(n)} {notice}" for n in range(6)[::-1]}, dedup={"substring": {}})
    assert read_json(again / "report.json")["corpus_hash"] == read_json(corpus / "report.json")["corpus_hash"]


def test_the_settings_in_the_guide_are_settings() -> None:
    import yaml

    guide = (Path(__file__).parents[2] / "docs" / "dedup.md").read_text()
    block = yaml.safe_load(guide.split("```yaml")[1].split("```")[0])
    config = DataConfig.model_validate(block["data"])
    assert config.dedup.substring is not None
    assert config.decontaminate is not None


@pytest.mark.parametrize("many", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_all_of_it_is_the_same_for_any_workers_and_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    """Rows in another order, more partitions, more workers: the same rows and texts stay, for the same reasons."""
    monkeypatch.setattr("soma.data.dedup.near.FEW", 0)
    monkeypatch.setattr("soma.data.dedup.substring.FEW_WINDOWS", 0)
    monkeypatch.setattr("soma.data.dedup.substring.RANGE_WINDOWS", 2000)
    (tmp_path / "set.txt").write_text(QUESTION)
    old = build(tmp_path, "old", {str(n): prose(n) for n in range(5)})
    notice = prose(50, 60)
    texts = [
        changed(prose(n // 2), 3 * (n % 2)) + (f" {notice} {prose(900 + n, 70)}" if n % 3 == 0 else "")
        for n in range(60)
    ]
    texts[25] += f" {QUESTION}"
    settings = {
        "validation_fraction": 0.1, "min_documents": 1, "decontaminate": {"sets": [str(tmp_path / "set.txt")]},
        "dedup": {"against": [str(old)], "substring": {}},
    }  # fmt: skip
    found = []
    for name, workers, size in (("one", 1, 1 << 20), ("two", many, 9000)):
        monkeypatch.setattr("soma.data.partitions.PARTITION_BYTES", size)
        folder = tmp_path / f"{name}-in"
        folder.mkdir()
        rows = random.Random(size).sample(range(60), 60)
        for number in range(6):
            lines = [json.dumps({"text": texts[row]}) for row in rows[number * 10 : number * 10 + 10]]
            (folder / f"{number}.jsonl").write_text("\n".join(lines))
        out = tmp_path / name
        out.mkdir()
        build_corpus(DataConfig(sources=str(folder), workers=workers, **settings), out)  # type: ignore[arg-type]
        dropped_rows = pq.read_table(out / "dropped.parquet").to_pylist()
        reasons = sorted((row["reason"], row["excerpt"]) for row in dropped_rows)
        kept_rows = [
            (split, row["id"], row["text"]) for split in ("train", "validation") for row in read_corpus(out, split)
        ]
        facts = read_json(out / "report.json")
        found.append((reasons, kept_rows, facts["corpus_hash"], facts["repeated_text"]["units"], facts["steps"]))
    assert found[0] == found[1]
    assert {reason for reason, _ in found[0][0]} == {"near_duplicate", "contaminated"}
    assert found[0][3] > 500
