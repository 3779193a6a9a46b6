"""Annotation files: read into records, written from records, whatever the format.

| format | files |
|---|---|
| `doccano` | `.jsonl .json .csv .tsv .xlsx .txt` (fastText or a text a line) `.conll` |
| `prodigy` | `.jsonl .json` |
| `textgrid` | `.TextGrid`, long or short |
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from soma.base.artefact import write_text
from soma.base.errors import UserError
from soma.data.annotation import doccano, prodigy, tables
from soma.data.annotation.offsets import Unit, from_codepoints, to_codepoints
from soma.data.annotation.record import Name, Record, Task
from soma.data.annotation.textgrid import decode, grid_of, read_textgrid, records_of, write_textgrid

Format = Literal["doccano", "prodigy", "textgrid"]
FORMATS = ("doccano", "prodigy", "textgrid")
PRODIGY = {"_input_hash", "_task_hash", "_view_id", "_session_id", "_annotator_id", "spans", "options", "accept"}


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that was set aside, and why."""

    place: str
    reason: str


def read_records(
    path: Path, form: Format | None = None, task: Task | None = None, offsets: Unit = "codepoints",
    problems: list[Problem] | None = None,
) -> list[Record]:  # fmt: skip
    """The records of a file. form None: by its name and first row. task: doccano's, where rows do not show it.

    offsets: what the file counts spans in. Rows that do not fit are set aside into `problems`; without it the first
    one raises UserError with file, row and field, as does a file that cannot be read at all.
    """
    aside: list[Problem] = [] if problems is None else problems
    before, found = len(aside), []
    for place, record in _records(path, form, task):
        reason = str(record) if isinstance(record, ValueError) else record.check()
        if not isinstance(record, ValueError) and offsets != "codepoints":
            try:
                record = to_codepoints(record, offsets)
                reason = record.check()
            except ValueError as error:
                reason = str(error)
        if not reason:
            assert isinstance(record, Record)
            found.append(record)
            continue
        if problems is None:
            raise UserError(f"{place}: {reason}")
        aside.append(Problem(place, reason))
    if not found and len(aside) == before:
        raise UserError(f"{path}: no row in it")
    return found


def write_records(
    path: Path, records: Sequence[Record], form: Format, task: Task | None = None, offsets: Unit = "codepoints",
    options: Sequence[Name] = (), short: bool = False,
) -> None:  # fmt: skip
    """Write records to a file all at once, its kind by its suffix. Raises UserError for what it cannot say.

    options: the classes that there are (Prodigy). short: the short form (TextGrid).
    """
    records = [from_codepoints(record, offsets) for record in records]
    suffix = path.suffix.lower()
    if form == "textgrid":
        text = write_textgrid(grid_of(records), short)
    elif form == "doccano" and suffix in (".conll", ".txt"):
        text = tables.write_conll(records) if suffix == ".conll" else tables.write_fasttext(records)
    else:
        rows = [written(record, form, task, options) for record in records]
        if suffix == ".csv" and form == "doccano":
            text = tables.write_csv(rows)
        elif suffix == ".json":
            text = "[\n" + ",\n".join(" " + line(row) for row in rows) + "\n]\n"
        elif suffix == ".jsonl":
            text = "".join(line(row) + "\n" for row in rows)
        else:
            raise UserError(f"{path}: {form} is not written as {path.suffix or 'a file without suffix'}; take .jsonl")
    write_text(path, text)


def written(record: Record, form: Format, task: Task | None = None, options: Sequence[Name] = ()) -> dict[str, Any]:
    """A record as a row of doccano or a task of Prodigy."""
    return doccano.write_row(record, task) if form == "doccano" else prodigy.write_task(record, options)


def line(row: dict[str, Any]) -> str:
    """A row as one line of JSON; escaped where it holds half a surrogate pair, which UTF-8 has no bytes for."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row)
    return text


def format_of(row: dict[str, Any]) -> Format:
    """The format that a row looks like."""
    return "prodigy" if PRODIGY & row.keys() else "doccano"


def _records(path: Path, form: Format | None, task: Task | None) -> Iterator[tuple[str, Record | ValueError]]:
    """(place, record or what is wrong with it)."""
    suffix = path.suffix.lower()
    if suffix == ".textgrid" or form == "textgrid":
        for record in records_of(_reading(path, read_textgrid)):
            meta = record.meta
            yield f"{path}, {meta['tier']} at {meta['xmin']:g} s", record
        return
    for number, row in _reading(path, lambda path: list(_rows(path, suffix))):
        place = f"{path}, {'line' if suffix != '.json' else 'row'} {number}"
        if not isinstance(row, dict):
            yield place, row
            continue
        form = form or format_of(row)
        try:
            yield place, prodigy.read_task(row) if form == "prodigy" else doccano.read_row(row, task)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            yield place, ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r:.80}")
        except KeyError as error:
            yield place, ValueError(f"field {error} is missing")
        except (ValueError, TypeError, AttributeError) as error:
            yield place, ValueError(str(error))


def _reading(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _rows(path: Path, suffix: str) -> tables.Numbered:
    if suffix == ".xlsx":
        yield from tables.xlsx_rows(path)
        return
    data = path.read_bytes()
    if suffix in (".csv", ".tsv"):
        yield from tables.csv_rows(data, "," if suffix == ".csv" else "\t")
    elif suffix == ".conll":
        yield from tables.conll_records(decode(data))
    elif suffix == ".txt":
        yield from tables.fasttext_records(decode(data))
    elif suffix == ".json":
        rows = json.loads(decode(data))
        if not isinstance(rows, list):
            raise ValueError("a list of rows is expected in a .json file")
        yield from ((at, row if isinstance(row, dict) else ValueError("no object")) for at, row in enumerate(rows, 1))
    elif suffix == ".jsonl":
        yield from _json_lines(decode(data))
    else:
        raise ValueError(f"no kind of file that annotations come in ({suffix or 'no suffix'})")


def _json_lines(text: str) -> tables.Numbered:
    for number, raw in enumerate(text.split("\n"), 1):
        if raw.strip():
            try:
                row = json.loads(raw)
                yield number, row if isinstance(row, dict) else ValueError("no object")
            except ValueError as error:
                yield number, ValueError(f"not valid JSON ({error})")
