"""Several rows of one: a Self-Instruct task with several instances as Alpaca rows, a pair of answers as rows of KTO.

Each row says in `soma_kept` which part of what it is; they become one again where all are there, one after the other.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from soma.base.artefact import json_hash
from soma.data.instruct.conversations import read_seeds, write_seeds
from soma.data.instruct.pairs import answer_start
from soma.data.instruct.patch import same
from soma.data.instruct.schemas import Record, Schema

PART = "part"


def split(record: Record, target: Schema) -> list[Record]:
    """The records that a schema has for one: instances apart for all but `seeds`, good and bad answer for `kto`."""
    if target != "seeds" and "instances" in record:
        return _numbered(record, "instances", list(_instances(record)))
    if target == "kto" and "rejected" in record and "label" not in record:
        start = answer_start(record)
        good = {key: value for key, value in record.items() if key != "rejected"} | {"label": True}
        bad = {key: value for key, value in good.items() if key != "kept"}
        bad |= {"messages": [*record["messages"][:start], *record["rejected"]], "label": False, "answer": start}
        return _numbered(record, "rejected", [good, bad])
    return [record]


def _instances(record: Record) -> Iterator[Record]:
    others = write_seeds(record)["instances"][1:]
    yield {key: value for key, value in record.items() if key != "instances"}
    shared = {key: record[key] for key in ("more", "is_classification") if key in record}
    instruction = write_seeds(record)["instruction"]
    for instance in others:
        yield read_seeds({"instruction": instruction, "instances": [instance]}, True) | shared


def _numbered(record: Record, what: str, parts: list[Record]) -> list[Record]:
    group = json_hash(record)[:16]
    return [
        part | {PART: {"of": group, "what": what, "index": index, "count": len(parts)}}
        for index, part in enumerate(parts)
    ]


def join(records: Iterable[Record]) -> Iterator[Record]:
    """The records, parts of one together where they follow each other, all of them, and still fit."""
    waiting: list[Record] = []
    for record in records:
        part = record.get(PART)
        if waiting and (part is None or not _follows(waiting[-1][PART], part)):
            yield from waiting
            waiting = []
        if part is None or (not waiting and part["index"] != 0):
            yield record
            continue
        waiting.append(record)
        if part["index"] == part["count"] - 1:
            whole = _whole(waiting)
            yield from [whole] if whole else waiting
            waiting = []
    yield from waiting


def _follows(before: dict[str, Any], part: dict[str, Any]) -> bool:
    return part == before | {"index": before["index"] + 1}


def _whole(parts: list[Record]) -> Record | None:
    """The record that was split, None where the parts were edited so that they are not parts of one any more."""
    what = parts[0][PART]["what"]
    whole = {key: value for key, value in parts[0].items() if key != PART}
    if what == "instances":
        rows = [write_seeds({key: value for key, value in part.items() if key != "instances"}) for part in parts]
        if any(row["instruction"] != rows[0]["instruction"] for row in rows):
            return None
        return whole | {"instances": [row["instances"][0] for row in rows[1:]]}
    start, other = answer_start(parts[0]), parts[1]
    if not (parts[0].get("label") is True and other.get("label") is False and answer_start(other) == start):
        return None
    if not same(parts[0]["messages"][:start], other["messages"][:start]):
        return None
    del whole["label"]
    return whole | {"rejected": other["messages"][start:]}
