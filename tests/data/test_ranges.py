"""A large file in ranges: read one after the other they are the file, for any lengths of lines."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soma.base.artefact import content_hash
from soma.data import partitions, readers
from soma.data.config import DataConfig
from soma.data.corpus import build_corpus
from soma.data.profile.report import data_report
from soma.data.profile.scan import Options
from soma.data.ranges import split_item
from soma.data.readers import read_item
from soma.data.sources import Item, list_items
from tests.data.test_partitions import prose

LINES = st.lists(
    st.one_of(
        st.just(b""),
        st.text(max_size=40).map(lambda text: json.dumps({"text": text}).encode()),
        st.text(max_size=30).map(lambda text: text.replace("\n", "").encode("utf-8", "replace")),
        st.sampled_from(
            [b"\xff bad", b"\0", b"\xef\xbb\xbf\xef\xbb\xbfx", b"[1]", "\u00e9\u20ac\U0001f600".encode() * 12]
        ),
    ),
    min_size=1,
    max_size=25,
)
ENDS = st.sampled_from([b"\n", b"\r\n"])
STARTS = st.sampled_from([b"", b"", codecs.BOM_UTF8])


def item_of(path: Path | str) -> Item:
    (item,) = list_items([str(path)])
    assert isinstance(item, Item)
    return item


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranges")


@pytest.fixture(scope="module", autouse=True)
def tiny_bounds() -> Iterator[None]:
    """Lines and pieces that are too long are those of a few dozen bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "LINE_BYTES", 60)
        patch.setattr(readers, "PIECE_BYTES", 25)
        yield


@settings(max_examples=100, deadline=None)
@given(
    lines=LINES, end=ENDS, start=STARTS, ended=st.booleans(), size=st.integers(1, 120),
    name=st.sampled_from(["a.jsonl", "a.json", "a.txt"]),
)  # fmt: skip
def test_ranges_read_as_the_file(
    folder: Path, lines: list[bytes], end: bytes, start: bytes, ended: bool, size: int, name: str
) -> None:
    data = start + end.join(lines) + (end if ended else b"")
    (folder / name).write_bytes(data)
    whole = item_of(folder / name)
    ranges = split_item(whole, size)
    pieces = []
    for item in ranges:
        with item.open() as file:
            pieces.append(file.read())
        assert item.size == len(pieces[-1])
        assert item.first_line == 1 + b"".join(pieces[:-1]).count(b"\n")
    assert b"".join(pieces) == data
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    assert [found for item in ranges for found in read_item(item, "text")] == list(read_item(whole, "text"))


def test_a_first_line_that_is_too_long_is_one_line_behind_a_byte_order_mark_too(tmp_path: Path) -> None:
    for start in (b"", codecs.BOM_UTF8):
        (tmp_path / "a.jsonl").write_bytes(start + b"x" * 100 + b'\n{"text": "one"}\n')
        long, row = read_item(item_of(tmp_path / "a.jsonl"), "text")
        assert (long.source, getattr(long, "reason", ""), row.source) == ("a.jsonl#1", "too_large", "a.jsonl#2")


def rows_file(path: Path, rows: int = 60) -> Path:
    lines = [json.dumps({"text": prose(row, 20 + row % 30), "n": row}) for row in range(rows)]
    lines[7:7] = ["", "no json", json.dumps({"text": prose(3, 23)})]
    path.write_text("\n".join(lines))
    return path


def build(sources: Path, out: Path, **settings: Any) -> str:
    out.mkdir()
    build_corpus(DataConfig(sources=str(sources), **settings), out, out.parent / f"{out.name}-state")  # type: ignore[arg-type]
    return content_hash(out)


def test_ranges_and_workers_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_BYTES", 64 << 20)
    path = rows_file(tmp_path / "rows.jsonl")
    one = build(path, tmp_path / "one")
    monkeypatch.setattr(partitions, "PARTITION_BYTES", 3000)
    assert build(path, tmp_path / "many", workers=2) == one
    made = sorted(tmp_path.glob("many-state/partitions/*.json"))
    assert len(made) > 3
    with open(path, "a") as file:  # a file that grew keeps the partitions of its first ranges
        file.write("\n" + json.dumps({"text": prose(777)}))
    before = {file.name: file.stat().st_mtime_ns for file in made}
    config = DataConfig(sources=str(path))  # type: ignore[arg-type]
    again = partitions.make_partitions(config, [item_of(path)], tmp_path / "many-state" / "partitions")
    kept = [part for part in again if part.path.with_suffix(".json").name in before]
    assert len(kept) == len(made) - 1


def test_plain_text_is_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE_BYTES", 2000)
    path = tmp_path / "book.txt"
    path.write_text("\n".join(prose(row, 40) for row in range(60)))
    one = build(path, tmp_path / "one")
    monkeypatch.setattr(partitions, "PARTITION_BYTES", 2000)
    assert build(path, tmp_path / "many") == one
    assert len(list(tmp_path.glob("many-state/partitions/*.json"))) > 3


def test_the_report_of_ranges_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_BYTES", 64 << 20)
    path = rows_file(tmp_path / "rows.jsonl")
    quick = Options(signals=("gopher_quality",), bias=False)
    one = data_report([str(path)], options=quick, near=False)
    monkeypatch.setattr(partitions, "PARTITION_BYTES", 3000)
    many = data_report([str(path)], options=quick, near=False)
    for report in (one, many):
        for figures in report["a"]["numbers"].values():  # sums are rounded in another order
            figures.update({name: pytest.approx(figures[name], rel=1e-9, abs=1e-12) for name in ("mean", "std")})
    assert one == many
    assert one["a"]["schema"]["files"] == 1


def test_what_is_split_and_what_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {number} of some more\n" for number in range(40))
    for name in ("a.txt", "a.py", "a.html", "a.txt.gz", "a.pdf"):
        (tmp_path / name).write_text(text)
    (tmp_path / "wide.txt").write_text(text, encoding="utf-16")
    (tmp_path / "array.json").write_text("[\n" + ",\n".join('{"text": "one"}' for _ in range(40)) + "]")
    (tmp_path / "rows.json").write_text('{"text": "one"}\n' * 40)
    counts = {item.name: len(split_item(item, 100)) for item in list_items([str(tmp_path)]) if isinstance(item, Item)}
    assert {name for name, count in counts.items() if count > 1} == {"a.txt", "rows.json"}
    far = item_of(f"file://{tmp_path}/rows.json")
    assert [item.first_line for item in split_item(far, 100)] == [1, 8, 15, 22, 29, 36]
    assert split_item(far, 1 << 20) == [far]
    (tmp_path / "rows.json").unlink()
    assert split_item(far, 100) == [far]


def test_a_report_is_merged_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker hands back is a file that is read once, not a text of the summary's sketches."""
    from soma.data.profile import scan

    monkeypatch.setattr(readers, "LINE_BYTES", 64 << 20)
    monkeypatch.setattr(partitions, "PARTITION_BYTES", 3000)
    results: list[Any] = []
    real = scan.map_tasks

    def watched(*arguments: Any) -> Iterator[Any]:
        for found in real(*arguments):
            results.append(found[1])
            yield found

    monkeypatch.setattr(scan, "map_tasks", watched)
    options = Options(signals=("gopher_quality",), bias=False)
    summary, parts = scan.scan([str(rows_file(tmp_path / "rows.jsonl"))], tmp_path / "work", options)
    assert summary.documents == 61
    assert results == [None] * len(parts)
    assert not list((tmp_path / "work").glob("*.summary"))
