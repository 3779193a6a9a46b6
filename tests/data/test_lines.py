"""Lines that stand in many documents: against brute force, for any partitions, order and workers; and in a corpus."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soma.base.artefact import read_json
from soma.data.dedup import lines
from soma.data.dedup.lines import normal_line, repeated_lines
from tests.data import test_against
from tests.data.test_against import build, dropped, kept

LINES = st.lists(st.sampled_from(["", "ab", "Menu 1", "menu  22", "x" * 9, "one two", "é" * 6]), max_size=6)
TEXTS = st.lists(LINES.map("\n".join), min_size=1, max_size=7)


def prose(*arguments: int) -> str:
    """Words without digits, which would all be the same."""
    return test_against.prose(*arguments).translate(str.maketrans("0123456789", "abcdefghij"))


def brute_force(texts: list[str], documents: int, min_chars: int, keep_first: bool) -> list[str]:
    holders = defaultdict(list)
    for number, text in enumerate(texts):
        for line in {normal_line(line) for line in text.split("\n")}:
            holders[line].append(number)
    left = []
    for number, text in enumerate(texts):
        stays = []
        for line in text.split("\n"):
            normal = normal_line(line)
            is_common = len(normal) >= min_chars and len(holders[normal]) >= documents
            if not is_common or (keep_first and holders[normal][0] == number):
                stays.append(line)
        left.append("\n".join(stays).strip() if stays != text.split("\n") else text)
    return left


def cut(
    folder: Path, texts: list[str], order: list[int], count: int, documents: int, keep_first: bool, workers: int = 1
) -> list[str]:
    """Every text without its lines; ranks are the texts' own order, whatever `order` they are written in."""
    folder.mkdir(parents=True)
    parts = []
    for number, rows in enumerate(np.array_split(order, count)):
        parts.append(folder / f"{number}.parquet")
        pq.write_table(pa.table({"text": pa.array([texts[row] for row in rows], pa.string())}), parts[-1])
    found = repeated_lines(
        parts, np.array(order), folder / "work", documents=documents, min_chars=5, keep_first=keep_first,
        workers=workers,
    )  # fmt: skip
    left = list(texts)
    for row in found.rows.tolist():
        left[order[row]], lost = found.cut(texts[order[row]], order[row])
        assert lost
    return left


@settings(max_examples=40, deadline=None)
@given(texts=TEXTS, documents=st.integers(2, 4), keep_first=st.booleans(), count=st.integers(1, 3), data=st.data())
def test_what_is_left_is_that_of_brute_force(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], documents: int, keep_first: bool, count: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    order = data.draw(st.permutations(range(len(texts))))
    folder = tmp_path_factory.mktemp("lines") / "run"
    assert cut(folder, texts, order, count, documents, keep_first) == brute_force(texts, documents, 5, keep_first)


def test_workers_and_ranges_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{prose(n)}\nline number {n % 5} of all\nAll rights reserved, {1990 + n}" for n in range(30)]
    monkeypatch.setattr(lines, "RANGE_LINES", 16)
    monkeypatch.setattr(lines, "FEW_LINES", 0)
    found = cut(tmp_path / "two", texts, list(range(30))[::-1], 3, 6, False, workers=2)
    assert found == brute_force(texts, 6, 5, False) == [prose(n) for n in range(30)]


def test_lines_leave_a_corpus(tmp_path: Path) -> None:
    notice = "Posted by the editor on 3 May, all rights reserved"
    texts = {str(n): f"{notice.replace('3', str(n % 10))}\n{prose(n)}\nshort" for n in range(12)}
    texts |= {"only": notice, "plain": prose(40)}
    block = {"near": False, "lines": {"documents": 5}}
    corpus = build(tmp_path, "cut", texts, dedup=block)
    assert kept(corpus) == {str(n): f"{prose(n)}\nshort" for n in range(12)} | {"plain": prose(40)}
    assert dropped(corpus)["13"] == ("repeated_text", "nothing of its own is left")
    facts = read_json(corpus / "report.json")["repeated_lines"]
    assert (facts["distinct"], facts["documents"], facts["lines"]) == (1, 13, 13)
    assert facts["examples"] == [{"line": normal_line(notice), "documents": 13}]
    counted = build(tmp_path, "count", texts, dedup={"near": False, "lines": {"documents": 5, "action": "count"}})
    assert kept(counted) == texts
    assert read_json(counted / "report.json")["repeated_lines"]["lines"] == 13
    first = build(tmp_path, "first", texts, dedup={"near": False, "lines": {"documents": 5, "keep_first": True}})
    assert sum("editor" in text for text in kept(first).values()) == 1


def test_spans_and_lines_together(tmp_path: Path) -> None:
    notice, menu = prose(50, 60), "Home | About | Contact us"
    texts = {str(n): f"{menu}\n{prose(n, 90)} {notice} {prose(100 + n, 90)}" for n in range(6)}
    corpus = build(tmp_path, "both", texts, dedup={"near": False, "substring": {}, "lines": {"documents": 6}})
    found = kept(corpus)
    whole = [name for name in found if notice in found[name]]
    assert len(whole) == 1
    assert {name: found[name] for name in set(found) - set(whole)} == {
        str(n): f"{prose(n, 90)} {prose(100 + n, 90)}" for n in range(6) if str(n) not in whole
    }
    assert found[whole[0]] == f"{prose(int(whole[0]), 90)} {notice} {prose(100 + int(whole[0]), 90)}"
