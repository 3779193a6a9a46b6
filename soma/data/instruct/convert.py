"""Files of instruction data: which schema they are in, whether every row fits it, and as another schema."""

import bz2
import gzip
import json
import lzma
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from soma.base.errors import UserError
from soma.data.instruct.checks import RowError
from soma.data.instruct.parts import join, split
from soma.data.instruct.samples import require_whole
from soma.data.instruct.schemas import Record, Row, Schema, from_record, schema_of, to_record
from soma.data.readers import READ_ERRORS, Dropped, decompress, json_rows
from soma.data.sources import Item, list_items

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass
class Outcome:
    """What became of the rows: read, written, set aside [(file, row, what is wrong)]; the schemas found."""

    rows: int = 0
    written: int = 0
    schemas: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, int, str]] = field(default_factory=list)

    def lines(self, limit: int = 20) -> list[str]:
        """What is wrong, a line each: `file, row 3: field: what was expected`."""
        found = [f"{file}, row {number}: {problem}" for file, number, problem in self.wrong[:limit]]
        more = len(self.wrong) - limit
        return [*found, f"… and {more:,} more"] if more > 0 else found


def records_of(sources: list[str], schema: Schema | None, outcome: Outcome, whole: bool = False) -> Iterator[Record]:
    """The records of all rows; those that do not fit are noted in `outcome`. Where `schema` is None, each file's first
    row tells it. `whole`: a row must also have something to learn from.
    """
    for item in list_items(sources):
        if not isinstance(item, Item) or item.kind != "jsonl":
            outcome.wrong.append((item.name, 0, "only JSON and JSONL files hold instruction rows"))
            continue
        of_file = schema
        for number, row in _rows(item):
            outcome.rows += 1
            try:
                if isinstance(row, Dropped):
                    raise RowError(row.reason, row.detail)
                if not isinstance(row, dict):
                    raise RowError("row", "an object expected")
                of_file = of_file or schema_of(row)
                record = to_record(row, of_file)
                if whole:
                    require_whole(record, of_file)
            except RowError as error:
                outcome.wrong.append((item.name, number, str(error)))
                continue
            outcome.schemas[of_file] += 1
            yield record


def _rows(item: Item) -> Iterator[tuple[int, Any]]:
    try:
        with item.open() as raw:
            yield from json_rows(item, decompress(raw, item.compression))
    except READ_ERRORS as error:
        yield 0, Dropped(item.name, "unreadable", f"{type(error).__name__}: {error}")


def convert_file(source: str, out: Path, target: Schema, schema: Schema | None = None, strict: bool = True) -> Outcome:
    """Write the rows of a file, folder or address as another schema: JSON Lines, or for `.json` an array; compressed
    for `.gz`, `.bz2`, `.xz`. The file appears when it is whole.

    Raises UserError for rows that do not fit, all of them named; with `strict=False` they are left out.
    """
    outcome = Outcome()
    unfinished = out.with_name(f".{out.name}.unfinished")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _open(unfinished, out) as file:
            rows = (
                from_record(part, target)
                for record in join(records_of([source], schema, outcome))
                for part in split(record, target)
            )
            outcome.written = _write(file, rows, array=".json" in out.suffixes)
        if outcome.wrong and strict:
            raise UserError(
                "\n".join([*outcome.lines(), f"nothing was written to {out} (--skip-bad leaves such rows out)"])
            )
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)
    return outcome


def check_file(source: str, schema: Schema | None = None) -> Outcome:
    """Whether every row fits its schema and has something to learn from."""
    outcome = Outcome()
    for _ in records_of([source], schema, outcome, whole=True):
        pass
    return outcome


def _open(path: Path, named: Path) -> IO[str]:
    opener: Callable[..., Any] = OPENERS.get(named.suffix, open)
    return opener(path, "wt", encoding="utf-8")


def _write(file: IO[str], rows: Iterable[Row], array: bool) -> int:
    count = 0
    for row in rows:
        before = ("[\n" if count == 0 else ",\n") if array else ""
        file.write(before + json.dumps(row, ensure_ascii=False) + ("" if array else "\n"))
        count += 1
    if array:
        file.write("\n]\n" if count else "[]\n")
    return count
