"""Repeated substrings: against brute force and a suffix array, for any partitions, order and workers."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soma.data.dedup import substring
from soma.data.dedup.substring import SPAN, cut_spans, repeated_spans, window_hashes
from soma.data.dedup.words import mix

SMALL = st.lists(st.text(alphabet="ab ", max_size=40), min_size=1, max_size=6)


def brute_force(texts: list[str], length: int, unit: str) -> list[set[int]]:
    """For each text the units covered by a window that occurred before and does not overlap its first occurrence."""
    seen: dict[tuple[object, ...], tuple[int, int]] = {}
    covered: list[set[int]] = []
    for number, text in enumerate(texts):
        units: list[object] = list(text.casefold().split()) if unit == "words" else list(text.encode())
        gone: set[int] = set()
        for start in range(len(units) - length + 1):
            first = seen.setdefault(tuple(units[start : start + length]), (number, start))
            if first[0] != number or start - first[1] >= length:
                gone |= set(range(start, start + length))
        covered.append(gone)
    return covered


def find(
    folder: Path, texts: list[str], length: int, unit: str = "words", count: int = 2, order: list[int] | None = None,
    workers: int = 1,
) -> list[np.ndarray]:  # fmt: skip
    """Spans of each text; ranks are the texts' own order, whatever `order` they are written in."""
    folder.mkdir(parents=True)
    order = list(range(len(texts))) if order is None else order
    parts, cuts = [], np.array_split(order, count)
    for number, rows in enumerate(cuts):
        parts.append(folder / f"{number}.parquet")
        pq.write_table(pa.table({"text": pa.array([texts[row] for row in rows], pa.string())}), parts[-1])
    found = repeated_spans(parts, np.array(order), folder / "work", length, unit, workers)  # type: ignore[arg-type]
    spans = [np.zeros(0, SPAN)] * len(texts)
    for rows, some in zip(cuts, found, strict=True):
        for place, row in enumerate(rows.tolist()):
            spans[row] = some[some["row"] == place]
    return spans


def places(spans: np.ndarray) -> set[int]:
    return {unit for span in spans.tolist() for unit in range(span[1], span[2])}


@pytest.mark.parametrize("unit", ["words", "bytes"])
def test_spans_are_those_of_brute_force(tmp_path_factory: pytest.TempPathFactory, unit: str) -> None:
    @given(SMALL, st.integers(1, 4), st.randoms())
    @settings(max_examples=40, deadline=None)
    def check(texts: list[str], length: int, generator: random.Random) -> None:
        order = generator.sample(range(len(texts)), len(texts))
        found = find(tmp_path_factory.mktemp("case") / "x", texts, length, unit, generator.randint(1, 3), order)
        assert [places(spans) for spans in found] == brute_force(texts, length, unit)

    check()


def suffix_array_coverage(data: bytes, length: int) -> set[int]:
    """Places in a substring of at least `length` bytes that occurs twice: neighbours in the sorted suffixes."""
    suffixes = sorted(range(len(data)), key=lambda start: data[start:])
    found: set[int] = set()
    for left, right in pairwise(suffixes):
        if data[left : left + length] == data[right : right + length] and max(left, right) + length <= len(data):
            found |= {*range(left, left + length), *range(right, right + length)}
    return found


def test_a_suffix_array_finds_the_same(tmp_path: Path) -> None:
    """Every removed byte lies in a repeated span, and what remains of such spans is first occurrences."""
    generator = random.Random(3)
    block = "".join(generator.choice("abcd") for _ in range(60))
    text = "".join(generator.choice("abcd") for _ in range(80))
    text = text + block + "x" + text[:30] + "y" + block[10:50] + "".join(generator.choice("efgh") for _ in range(90))
    want = suffix_array_coverage(text.encode(), 20)
    (spans,) = find(tmp_path / "a", [text], 20, "bytes", 1)
    gone = places(spans)
    assert gone < want
    assert gone == set(range(141, 171)) | set(range(172, 212))
    assert len(text) - len(cut_spans(text, spans, "bytes")) == 70
    assert not suffix_array_coverage(cut_spans(text, spans, "bytes").encode(), 20)


def test_cutting() -> None:
    spans = np.array([(0, 1, 3), (0, 4, 5)], SPAN)
    assert cut_spans(" One\ttwo  three\n four five", spans) == "One\tfour"
    assert cut_spans("a b", np.zeros(0, SPAN)) == "a b"
    assert cut_spans("aébcdef", np.array([(0, 2, 5)], SPAN), "bytes") == "adef"  # a half of é goes with the other
    assert cut_spans("a b c d e", np.array([(0, 0, 5)], SPAN)) == ""


def test_case_folding_makes_no_words() -> None:
    """Words of the folded text are those of the text: spans found in the one are cut from the other."""
    assert not [c for c in map(chr, range(0x110000)) if not c.isspace() and any(x.isspace() for x in c.casefold())]
    assert not [c for c in map(chr, range(0x110000)) if c.isspace() and not c.casefold().isspace()]


def test_same_for_any_workers_order_and_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(4)
    words = [f"w{n}" for n in range(300)]
    shared = [" ".join(generator.choices(words, k=70)) for _ in range(5)]
    texts = []
    for _ in range(60):
        texts.append(" ".join(generator.choices(words, k=generator.randint(5, 90))))
        if generator.random() < 0.5:
            texts[-1] += " " + generator.choice(shared) + " " + " ".join(generator.choices(words, k=9))
    want = find(tmp_path / "one", texts, 50, count=1)
    assert sum(map(len, want)) > 15
    monkeypatch.setattr(substring, "RANGE_WINDOWS", 500)
    monkeypatch.setattr(substring, "FEW_WINDOWS", 0)
    found = find(tmp_path / "many", texts, 50, "words", 4, generator.sample(range(60), 60), workers=2)
    assert all(np.array_equal(a[["start", "end"]], b[["start", "end"]]) for a, b in zip(found, want, strict=True))
    assert len(list((tmp_path / "many" / "work").glob("*/repeated/*.npy"))) > 3


def test_a_hash_that_sees_less_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: windows that agree in their first 3 of 5 words are not repeated substrings."""
    texts = ["a b c d e f", "a b c x y z"]
    assert [len(spans) for spans in find(tmp_path / "right", texts, 5)] == [0, 0]
    monkeypatch.setattr(substring, "window_hashes", lambda units, length: window_hashes(units, 3)[: len(units) - 4])
    assert [len(spans) for spans in find(tmp_path / "wrong", texts, 5)] == [0, 1]


def test_window_hashes_do_not_depend_on_their_place() -> None:
    units = mix(np.arange(1, 200, dtype=np.uint64))
    everywhere = window_hashes(np.concatenate([units, units]), 7)
    assert np.array_equal(everywhere[:193], everywhere[199:])
    assert len(np.unique(everywhere)) == 193 + 6
    assert len(window_hashes(units[:6], 7)) == 0
