"""The types of rows: inferred over files, compared between them, and rows held against them.

A path is a field's name, with `.` before the fields of an object and `[]` after a list: `meta.url`, `messages[].role`.
A type is one of JSON's (`null`, `boolean`, `integer`, `number`, `string`, `array`, `object`) or `binary`, `timestamp`
and `decimal` of Parquet.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from soma.base.artefact import read_json
from soma.base.errors import UserError
from soma.data.compression import decompress
from soma.data.readers import READ_ERRORS, Dropped, json_rows
from soma.data.sources import Item, Skipped, list_items

FIELDS = 1000  # paths of one file; objects that are used as maps have any number of keys
MISTAKES = 100  # that are listed
DEPTH = 20
TYPES = {
    bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array", tuple: "array",
    bytes: "binary", Decimal: "decimal", type(None): "null",
}  # fmt: skip


def type_of(value: Any) -> str:
    """The name of a value's type."""
    if isinstance(value, datetime | date | time | timedelta):
        return "timestamp"
    return TYPES.get(type(value), "object")


@dataclass
class Fields:
    """Types by path: how often each, over `rows` rows; `parents`: in how many objects a field could have been."""

    rows: int = 0
    types: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    parents: Counter[str] = field(default_factory=Counter)  # objects at a path; "" is the row
    more: int = 0  # values at paths beyond `FIELDS`

    def add(self, row: dict[str, Any]) -> None:
        """One row."""
        self.rows += 1
        self._object("", row, 0)

    def _object(self, path: str, value: dict[str, Any], depth: int) -> None:
        self.parents[path] += 1
        for name, inner in value.items():
            self._value(f"{path}.{name}" if path else str(name), inner, depth + 1)

    def _value(self, path: str, value: Any, depth: int) -> None:
        if path not in self.types and len(self.types) >= FIELDS:
            self.more += 1
            return
        self.types[path][type_of(value)] += 1
        if depth >= DEPTH:
            return
        if isinstance(value, dict):
            self._object(path, value, depth)
        elif isinstance(value, list | tuple):
            for inner in value:
                self._value(f"{path}[]", inner, depth + 1)

    def merge(self, other: "Fields") -> None:
        """Take in what another has seen."""
        self.rows += other.rows
        self.more += other.more
        self.parents.update(other.parents)
        for path, types in other.types.items():
            if path in self.types or len(self.types) < FIELDS:
                self.types[path].update(types)
            else:
                self.more += sum(types.values())

    def parent_count(self, path: str) -> int:
        """In how many objects a field could have been; of a list's elements, how many there are."""
        if path.endswith("[]"):
            return sum(self.types[path].values())
        return self.parents[path.rpartition(".")[0]]


def describe(fields: Fields) -> list[dict[str, Any]]:
    """[{path, types: {type: count}, null, missing, required}], by path; `missing` counts objects without the field."""
    found = []
    for path in sorted(fields.types):
        types = fields.types[path]
        missing = max(0, fields.parent_count(path) - sum(types.values()))
        found.append(
            {"path": path, "types": dict(sorted(types.items())), "null": types["null"], "missing": missing,
             "required": missing == 0}
        )  # fmt: skip
    return found


def kind_of_types(types: Iterable[str]) -> frozenset[str]:
    """Types without null, with whole numbers as numbers where both occur."""
    found = set(types) - {"null"}
    return frozenset(found - {"integer"} if "number" in found else found)


# --- Files ---


def rows_of(item: Item) -> Iterator[tuple[int, Any]]:
    """(row from 1, value) of a JSONL, JSON or Parquet file; a `Dropped` where one cannot be read."""
    try:
        with item.open() as raw:
            file = decompress(raw, item.compression)
            if item.kind == "parquet":
                yield from _parquet_rows(file, bool(item.compression))
            else:
                yield from json_rows(item, file)
    except READ_ERRORS as error:
        yield 0, Dropped(item.name, "unreadable", f"{type(error).__name__}: {error}")


def _parquet_rows(file: Any, packed: bool) -> Iterator[tuple[int, Any]]:
    import io

    import pyarrow.parquet as pq

    number = 0
    for batch in pq.ParquetFile(io.BytesIO(file.read()) if packed else file).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def fields_of(item: Item) -> tuple[Fields, list[dict[str, Any]]]:
    """The types of one file, and its rows that are none: [{source, row, problem}], `MISTAKES` of them at most."""
    fields = Fields()
    bad: list[dict[str, Any]] = []
    for number, row in rows_of(item):
        if isinstance(row, dict):
            fields.add(row)
        elif len(bad) < MISTAKES:
            problem = f"{row.reason}: {row.detail}" if isinstance(row, Dropped) else f"a row is {type_of(row)}"
            bad.append({"source": item.name, "row": number, "problem": problem})
    return fields, bad


def row_files(sources: Sequence[str]) -> list[Item]:
    """The JSONL, JSON and Parquet files of sources. Raises UserError where there is none."""
    items = [item for item in list_items(list(sources)) if not isinstance(item, Skipped)]
    found = [item for item in items if item.kind in ("jsonl", "parquet")]
    if not found:
        raise UserError(
            f"{', '.join(sources)}: no JSONL, JSON or Parquet file there, so there are no fields to look at"
        )
    return found


def infer(sources: Sequence[str]) -> dict[str, Any]:
    """`{"format", "rows", "files", "fields": describe(…), "drift": [{path, problem, files}], "bad_rows"}`."""
    total, by_file, bad = Fields(), [], []
    for item in row_files(sources):
        fields, broken = fields_of(item)
        total.merge(fields)
        bad += broken
        if fields.rows:
            by_file.append((item.name, fields))
    return {
        "format": "soma-schema", "version": 1, "rows": total.rows, "files": len(by_file), "fields": describe(total),
        "drift": file_drift(by_file), "bad_rows": bad[:MISTAKES],
    }  # fmt: skip


def file_drift(files: Sequence[tuple[str, Fields]]) -> list[dict[str, Any]]:
    """What differs between files: a field with other types than in most, or one that some files have and others lack.

    Each with the files that differ from the majority.
    """
    found = []
    for path in sorted({path for _, fields in files for path in fields.types}):
        kinds = {
            name: kind_of_types(fields.types[path]) for name, fields in files
            if path in fields.types and kind_of_types(fields.types[path])
        }  # fmt: skip
        common = Counter(kinds.values()).most_common()
        if len(common) > 1:
            usual = min((kind for kind, count in common if count == common[0][1]), key=sorted)
            odd = [f"{name} ({_words(kind)})" for name, kind in kinds.items() if kind != usual]
            found.append({"path": path, "problem": f"{_words(usual)} in most files", "files": sorted(odd)})
        parent = path.rpartition(".")[0]
        could = [(name, path in fields.types) for name, fields in files if fields.parents[parent]]
        lack = sorted(name for name, there in could if not there)
        have = sorted(name for name, there in could if there)
        if lack and have and not path.endswith("[]"):
            few, problem = (have, "only in") if len(have) < len(lack) else (lack, "missing in")
            found.append({"path": path, "problem": problem, "files": few})
    return found


def _words(kinds: Iterable[str]) -> str:
    return " or ".join(sorted(kinds)) or "null"


# --- Validation ---


def load_schema(path: Path) -> dict[str, Any]:
    """A schema that `infer` made. Raises UserError for another file."""
    schema = read_json(path)
    if (
        not isinstance(schema, dict)
        or schema.get("format") != "soma-schema"
        or not isinstance(schema.get("fields"), list)
    ):
        raise UserError(f"{path}: not a schema; `soma data schema FILES --out {path}` writes one")
    return schema


def validate(sources: Sequence[str], schema: dict[str, Any]) -> dict[str, Any]:
    """Hold rows against a schema: `{"rows", "mistakes": count, "by_path": {path: count}, "examples": [{source, row,
    path, problem}]}`.

    A field that was in every object must be there; a value must have one of the types that the schema saw (a whole
    number may stand for a number); null only where there was null; a field that the schema does not know is a mistake.
    """
    known = {entry["path"]: entry for entry in schema["fields"]}
    needed: dict[str, list[str]] = defaultdict(list)
    for path, entry in known.items():
        if entry["required"] and not path.endswith("[]"):
            needed[path.rpartition(".")[0]].append(path)
    rows, by_path = 0, Counter[str]()
    examples: list[dict[str, Any]] = []
    for item in row_files(sources):
        for number, row in rows_of(item):
            rows += 1
            if isinstance(row, dict):
                mistakes = _row_mistakes(row, known, needed)
            else:
                mistakes = iter([("", row.reason if isinstance(row, Dropped) else f"a row is {type_of(row)}")])
            for path, problem in mistakes:
                by_path[path] += 1
                if len(examples) < MISTAKES:
                    examples.append({"source": item.name, "row": number, "path": path, "problem": problem})
    return {"rows": rows, "mistakes": by_path.total(), "by_path": dict(by_path.most_common()), "examples": examples}


def _row_mistakes(
    row: dict[str, Any], known: dict[str, dict[str, Any]], needed: dict[str, list[str]]
) -> Iterator[tuple[str, str]]:
    waiting: list[tuple[str, Any]] = [("", row)]
    while waiting:
        path, value = waiting.pop()
        if path:
            entry = known.get(path)
            if entry is None:
                yield path, f"not in the schema ({_shown(value)})"
                continue
            kind = type_of(value)
            if kind not in entry["types"] and not (kind == "integer" and "number" in entry["types"]):
                yield path, f"{kind} where {_words(entry['types'])} is expected ({_shown(value)})"
                continue
        if isinstance(value, dict):
            inside = {(f"{path}.{name}" if path else str(name)): inner for name, inner in value.items()}
            yield from ((name, "missing") for name in needed.get(path, ()) if name not in inside)
            waiting.extend(inside.items())
        elif isinstance(value, list | tuple):
            waiting.extend((f"{path}[]", inner) for inner in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
