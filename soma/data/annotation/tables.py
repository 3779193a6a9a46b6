"""Rows from CSV, TSV, Excel (first sheet), CoNLL, fastText and plain lines, as doccano takes them in; and back."""

import csv
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from soma.base.errors import UserError
from soma.data.annotation.record import Record, Span
from soma.data.annotation.textgrid import decode

PREFIX = "__label__"
SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
LARGEST_SHEET = 1 << 28  # bytes unpacked: a zip of a megabyte may hold gigabytes

Numbered = Iterator[tuple[int, dict[str, Any] | Record | ValueError]]


def csv_rows(data: bytes, delimiter: str = ",") -> Numbered:
    """(line, row) of a table with a header, ValueError in place of a row that has too many cells."""
    reader = csv.reader(io.StringIO(decode(data), newline=""), delimiter=delimiter)
    yield from table_rows((reader.line_num, cells) for cells in reader)


def table_rows(lines: Iterator[tuple[int, list[Any]]]) -> Numbered:
    """Rows as objects by the names in the first line."""
    _, header = next(lines, (0, []))
    if "text" not in header:
        raise ValueError(f"the first line names the columns, and `text` is none of them: {', '.join(header)}")
    for number, cells in lines:
        if not cells:
            continue
        if len(cells) > len(header):
            yield number, ValueError(f"{len(cells)} cells, the header has {len(header)}")
        else:
            yield number, dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=True))


def xlsx_rows(path: Path) -> Numbered:
    """(line, row) of the first sheet of an Excel workbook. Raises ValueError for what is none."""
    try:
        with zipfile.ZipFile(path) as book:
            if sum(entry.file_size for entry in book.infolist()) > LARGEST_SHEET:
                raise ValueError(f"holds more than {LARGEST_SHEET >> 20} MiB unpacked")
            shared = []
            if "xl/sharedStrings.xml" in book.namelist():
                items = ElementTree.fromstring(book.read("xl/sharedStrings.xml"))
                shared = ["".join(t.text or "" for t in item.iter(f"{SHEET}t")) for item in items]
            sheets = sorted(name for name in book.namelist() if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", name))
            sheet = ElementTree.fromstring(book.read(min(sheets, key=len)))
    except (zipfile.BadZipFile, ElementTree.ParseError, KeyError, ValueError) as error:
        raise ValueError(f"no Excel workbook that can be read ({error})") from None
    yield from table_rows(_sheet_lines(sheet, shared))


def _sheet_lines(sheet: ElementTree.Element, shared: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    for number, row in enumerate(sheet.iter(f"{SHEET}row"), 1):
        cells: list[str] = []
        for cell in row.iter(f"{SHEET}c"):
            column = 0
            for letter in re.match(r"[A-Z]*", cell.get("r", "")).group():  # type: ignore[union-attr]
                column = column * 26 + ord(letter) - 64
            cells += [""] * (column - 1 - len(cells))
            value = "".join(t.text or "" for t in cell.iter(f"{SHEET}t"))
            value = value or cell.findtext(f"{SHEET}v") or ""
            cells.append(shared[int(value)] if cell.get("t") == "s" else value)
        while cells and not cells[-1]:
            cells.pop()
        yield int(row.get("r", number)), cells


def write_csv(rows: Sequence[dict[str, Any]]) -> str:
    """A table of rows, each with at most one label or text. Raises UserError for what a cell cannot hold."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for number, row in enumerate(rows, 1):
        cells = []
        for column in columns:
            value = row.get(column, "")
            if isinstance(value, list) and len(value) < 2:
                value = value[0] if value else ""
            if not isinstance(value, str | int | float):
                raise UserError(f"row {number}: {column!r} holds more than a cell of a table can say: write JSONL")
            cells.append(value)
        writer.writerow(cells)
    return out.getvalue()


def fasttext_records(text: str) -> Numbered:
    """`__label__a __label__b text`, a line each; empty lines are none."""
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split(" ")
        count = next((at for at, word in enumerate(words) if not word.startswith(PREFIX)), len(words))
        if line.strip():
            labels = [word.removeprefix(PREFIX) for word in words[:count]]
            yield number, Record(text=" ".join(words[count:]), labels=labels)


def write_fasttext(records: Sequence[Record]) -> str:
    """Lines of fastText. Raises UserError for a text of several lines and a class with a space."""
    lines = []
    for number, record in enumerate(records, 1):
        if record.rest("labels", "options") or len(record.text.splitlines()) > 1:
            raise UserError(f"record {number}: fastText holds classes and one line of text: write JSONL")
        labels = [f"{PREFIX}{label}" for label in record.labels]
        if any(re.search(r"\s", label) for label in labels):
            raise UserError(f"record {number}: a class of fastText has no space in it: {record.labels}")
        lines.append(" ".join([*labels, record.text] if record.text else labels))
    return "".join(line + "\n" for line in lines)


def conll_records(text: str) -> Numbered:
    """Sentences of CoNLL, `token tag` a line, as records: tokens joined by a space, tags (IOB2, IOBES) as spans."""
    tokens: list[tuple[str, str]] = []
    start, wrong = 1, None
    for number, line in enumerate([*text.splitlines(), ""], 1):
        cells = line.split("\t") if "\t" in line else line.split()
        if line.strip():
            if len(cells) != 2:
                wrong = wrong or ValueError(f"line {number}: {len(cells)} columns, expected a token and its tag")
            else:
                tokens.append((cells[0], cells[1]))
            continue
        if wrong or tokens:
            yield start, wrong or _sentence(tokens)
        tokens, start, wrong = [], number + 1, None


def _sentence(tokens: Sequence[tuple[str, str]]) -> Record:
    spans: list[Span] = []
    place, opened = 0, None
    for token, tag in tokens:
        kind, _, label = tag.partition("-")
        if kind in ("O", "") or not label:
            opened = None
        elif opened is not None and kind in ("I", "E") and opened.label == label:
            opened.end = place + len(token)
            opened = None if kind == "E" else opened
        else:
            spans.append(Span(start=place, end=place + len(token), label=label))
            opened = None if kind == "S" else spans[-1]
        place += len(token) + 1
    words = [token for token, _ in tokens]
    return Record(text=" ".join(words), spans=spans, source={"format": "conll", "tokens": words})


def write_conll(records: Sequence[Record]) -> str:
    """CoNLL in IOB2. Raises UserError for spans that overlap or cut a token, and for all else that it cannot say."""
    sentences = []
    for number, record in enumerate(records, 1):
        if record.rest("spans"):
            raise UserError(f"record {number}: CoNLL holds spans alone: write JSONL")
        if re.search(r"[\t\r\n]", record.text):
            raise UserError(f"record {number}: CoNLL holds one line of text without tabs: write JSONL")
        tags, place, lines = {span.start: span for span in record.spans}, 0, []
        ends = {span.end for span in record.spans}
        covered: Span | None = None
        borders = set()
        for token in record.source.get("tokens") or record.text.split(" "):
            here, place = place, place + len(token) + 1
            borders |= {here, here + len(token)}
            if here in tags:
                covered = tags[here]
            tag = "O" if covered is None else ("B-" if here == covered.start else "I-") + str(covered.label)
            lines.append(f"{token}\t{tag}\n")
            if covered is not None and here + len(token) >= covered.end:
                covered = None
        ordered = sorted(record.spans, key=lambda span: span.start)
        overlap = any(one.end > other.start for one, other in pairwise(ordered))
        if overlap or not {*tags, *ends} <= borders:
            raise UserError(f"record {number}: CoNLL holds no spans that overlap or cut a token: write JSONL")
        sentences.append("".join(lines))
    return "\n".join(sentences)
