"""Evaluation sets found in documents: against brute force, and real items planted into pages."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from soma.base.errors import UserError
from soma.data.config import DecontaminateConfig
from soma.data.decontaminate.items import Field, make_targets, plain, read_fields
from soma.data.decontaminate.match import Finder, find_contamination

WORDS = [f"word{n}" for n in range(40)]


def config(**more: object) -> DecontaminateConfig:
    return DecontaminateConfig(sets=["unused"], **more)  # type: ignore[arg-type]


def finder(texts: list[str], settings: DecontaminateConfig) -> Finder:
    fields = [Field("set", number, "text", text) for number, text in enumerate(texts)]
    return Finder(make_targets(fields, settings), settings)


def windows(text: str, length: int) -> set[str]:
    words = plain(text).casefold().split()
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}


def brute_force(documents: list[str], items: list[str], settings: DecontaminateConfig) -> dict[tuple[int, int], tuple]:
    """(document, item) → (near, windows found, overlap)."""
    found: dict[tuple[int, int], tuple] = {}
    near_windows = [windows(item, settings.near_ngram) for item in items]
    for d, document in enumerate(documents):
        for i, item in enumerate(items):
            length = min(settings.ngram, len(plain(item).split()))
            mine = windows(item, length)
            common = len(mine & windows(document, length))
            alike = len(near_windows[i] & windows(document, settings.near_ngram))
            if common:
                found[d, i] = (False, common, common / len(mine))
            elif len(near_windows[i]) >= 4 and alike / len(near_windows[i]) >= (settings.near or 2):
                found[d, i] = (True, alike, alike / len(near_windows[i]))
    return found


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_matches_are_those_of_brute_force(seed: int) -> None:
    generator = random.Random(seed)
    settings = config(ngram=6, min_words=3, near_ngram=2, near=0.5)

    def words(low: int, high: int) -> list[str]:
        return [generator.choice(WORDS) for _ in range(generator.randint(low, high))]

    items = sorted({" ".join(words(3, 14)) for _ in range(12)})
    documents = []
    for _ in range(80):
        page = words(0, 30)
        piece = generator.choice(items).split()
        for _ in range(generator.randint(0, 3)):
            piece[generator.randrange(len(piece))] = generator.choice(WORDS)
        at = generator.randint(0, len(page))
        page[at:at] = piece
        documents.append(generator.choice([" ", ", ", "\n"]).join(page).title())
    found = finder(items, settings).find(documents)
    got = {(r, f): (n, w, o) for r, f, n, w, o, _ in found.tolist()}
    assert got == brute_force(documents, items, settings)
    assert {near for near, _, _ in got.values()} == {True, False}


def test_where_it_stands_and_batches_do_not_mix() -> None:
    item = "the quick brown fox jumps over a lazy dog"
    look = finder([item], config(ngram=9))
    (found,) = look.find(["x y z. The QUICK brown, fox\njumps over a lazy dog!"]).tolist()
    assert found[:4] == (0, 0, False, 1)
    assert found[5] == 3
    halves = [item[:20], item[20:]]
    assert len(look.find(halves)) == 0  # its words stand in a row in the batch, but in two documents
    assert len(look.find(["", item, ""])) == 1


def test_a_short_field_counts_only_whole() -> None:
    look = finder(["one two three four five six seven eight nine"], config(near=None))
    assert len(look.find(["zero one two three four five six seven eight nine ten"])) == 1
    assert len(look.find(["zero one two three four five six seven eight ten"])) == 0


def test_a_copy_with_changed_words_is_near() -> None:
    words = [f"w{n}" for n in range(60)]
    changed = [*words]
    for place in range(6, 60, 12):
        changed[place] = "other"
    look = finder([" ".join(words)], config(near=0.5))
    (found,) = look.find([" ".join(changed)]).tolist()
    assert found[2] is True
    assert found[4] == len(windows(" ".join(words), 5) & windows(" ".join(changed), 5)) / 56
    assert len(finder([" ".join(words)], config(near=None)).find([" ".join(changed)])) == 0


def test_sets_of_all_shapes(tmp_path: Path) -> None:
    long = "alpha beta gamma delta epsilon zeta eta theta iota kappa"
    rows = [{"q": long, "choices": ["no", long + " a"], "n": 3}, {"deep": {"er": [long + " b"]}, "again": long}]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    pq.write_table(pa.table({"text": [long + " c"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text(f"short\n\n{long} d\nsame paragraph\n\n\n{long} e\n")
    sets = [str(tmp_path / name) for name in ("a.jsonl.gz", "b.parquet", "c.txt")]
    fields = read_fields(DecontaminateConfig(sets=sets))
    assert [(field.set.split("/")[-1], field.item, field.name, field.text.split()[-1]) for field in fields] == [
        ("a.jsonl.gz", 1, "q", "kappa"), ("a.jsonl.gz", 1, "choices.1", "a"), ("a.jsonl.gz", 2, "deep.er.0", "b"),
        ("b.parquet", 1, "text", "c"), ("c.txt", 2, "paragraph", "paragraph"), ("c.txt", 3, "paragraph", "e"),
    ]  # fmt: skip


def test_bad_sets_are_named(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": ')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(3000))[:-100])
    for name, said in (("short.txt", "no field of at least 8 words"), ("bad.jsonl", "#2: bad_json"),
                       ("cut.jsonl.gz", "cannot be read"), ("none.jsonl", "no such file")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            read_fields(DecontaminateConfig(sets=[str(tmp_path / name)]))
    with pytest.raises(ValueError, match="min_words"):
        config(min_words=14)


def test_over_partitions_for_any_workers(tmp_path: Path) -> None:
    generator = random.Random(5)
    texts = [" ".join(generator.choices(WORDS, k=40)) for _ in range(30)]
    fields = [Field("set", n, "text", " ".join(texts[3 * n].split()[5:25])) for n in range(8)]
    used = np.arange(30) % 2 == 0
    found = []
    for count, workers in ((1, 1), (4, 2)):
        parts = []
        for number, rows in enumerate(np.array_split(texts, count)):
            parts.append(tmp_path / f"{count}-{number}.parquet")
            pq.write_table(pa.table({"text": pa.array(rows)}), parts[-1])
        found.append(find_contamination(parts, used, fields, tmp_path / str(count), config(), workers))
    assert np.array_equal(*found)
    assert found[0]["row"].tolist() == [0, 6, 12, 18]
    assert found[0]["overlap"].tolist() == [1.0] * 4


# --- Real items in real pages ---


def planted(shared_data: Callable[[str], Path]) -> tuple[list[str], list[tuple[int, str, int]]]:
    """Pages of C4 with questions of MMLU and problems of HumanEval put into every third; (page, set, item from 1)."""
    lines = shared_data("web_jsonl/c4_demo.jsonl").read_text().splitlines()
    pages = [json.loads(line)["text"] for line in lines]
    generator = random.Random(1)
    sets = {}
    for source in ("mmlu/test.jsonl.gz", "humaneval/HumanEval.jsonl.gz"):
        sets[source] = gzip.decompress(shared_data(source).read_bytes()).decode().splitlines()
    truth = []
    for page in range(0, len(pages), 3):
        source, name = (("mmlu/test.jsonl.gz", "question"), ("humaneval/HumanEval.jsonl.gz", "prompt"))[page % 2]
        rows = sets[source]
        item = generator.randrange(len(rows))
        text = json.loads(rows[item])[name]
        if len(plain(text).split()) >= 13:
            at = pages[page].find(" ", len(pages[page]) // 2)
            pages[page] = f"{pages[page][:at]}\n{text.upper() if page % 4 else text}\n{pages[page][at:]}"
            truth.append((page, source, item + 1))
    return pages, truth


def test_planted_items_are_found_and_nothing_else(shared_data: Callable[[str], Path]) -> None:
    pages, truth = planted(shared_data)
    sets = [str(shared_data("mmlu/test.jsonl.gz")), str(shared_data("humaneval/HumanEval.jsonl.gz"))]
    settings = DecontaminateConfig(sets=sets)
    fields = read_fields(settings)
    matches = Finder(make_targets(fields, settings), settings).find(pages)
    whole = matches[matches["overlap"] == 1]
    found = {(int(m["row"]), fields[m["field"]].set) for m in whole}
    assert len(truth) > 50
    assert {(page, source) for page, source, _ in truth} <= found  # recall 1: every planted item, whole
    clean = set(range(len(pages))) - {page for page, _, _ in truth}
    assert not clean & set(matches["row"].tolist())  # no page without a planted item is called contaminated
    generator = random.Random(2)
    words = [plain(page).split() for page in pages]
    scrambled = [" ".join(generator.sample(page, len(page))) for page in words]  # the same words are no match
    assert not len(Finder(make_targets(fields, settings), settings).find(scrambled))
