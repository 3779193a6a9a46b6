"""doccano's rows: text classification, sequence labelling, relation extraction, sequence to sequence, intents.

Shapes as in doccano's own export and in its tests (https://github.com/doccano/doccano, backend/data_import):
`label` (or `labels`) holds class names, [start, end, label] triples or target texts; relation extraction has
`entities` and `relations`; intent detection with slot filling has `cats` and `entities`. Other fields are a row's meta
there and are kept here. Classes and target texts look alike: the task has to be said for the latter.
"""

from collections.abc import Mapping
from typing import Any

from soma.data.annotation.record import REST, Record, Relation, Span, Task

ENTITY = ("id", "start_offset", "end_offset", "label")
RELATION = ("id", "from_id", "to_id", "type")
SAYS: dict[Task, tuple[str, ...]] = {
    "classification": ("labels",), "spans": ("spans",), "seq2seq": ("targets",), "relations": ("spans", "relations"),
    "intent": ("labels", "spans"),
}  # fmt: skip


def read_row(row: Mapping[str, Any], task: Task | None = None) -> Record:
    """A row as a record. task None: what it looks like. Raises ValueError or KeyError naming what does not fit."""
    task = task or task_of(row)
    column = "labels" if "labels" in row and "label" not in row else "label"
    used = {"text", "meta", "answer", REST}
    found: dict[str, Any] = {"answer": row.get("answer")}
    source: dict[str, Any] = {"format": "doccano", "task": task}
    if task in ("relations", "intent"):
        used |= {"entities", "cats" if task == "intent" else "relations"}
        found["spans"] = [_entity(entity) for entity in row.get("entities") or []]
        if task == "intent":
            found["labels"] = row.get("cats") or []
        else:
            found["relations"] = [_relation(relation) for relation in row.get("relations") or []]
    else:
        used.add(column)
        values = row.get(column)
        source |= {"column": column, "plain": isinstance(values, str)}
        values = [] if values is None or values == "" else [values] if isinstance(values, str) else values
        found[SAYS[task][0]] = [_entity(value) for value in values] if task == "spans" else values
    found |= row.get(REST) or {}
    extra, meta, text = {key: row[key] for key in row if key not in used}, row.get("meta"), row.get("text")
    if meta is not None and not isinstance(meta, dict):
        extra["meta"], meta = meta, None
    text = "" if text is None else text
    return Record(text=text, **found, meta=meta or {}, extra=extra, keys=list(row), source=source)


def write_row(record: Record, task: Task | None = None) -> dict[str, Any]:
    """The record as a row of a task. task None: the one that it was read from, or what it holds."""
    own = record.source if record.source.get("format") == "doccano" else {}
    task = task or own.get("task") or task_of_record(record)
    column = own.get("column", "label")
    found: dict[str, Any] = {"text": record.text}
    if task in ("relations", "intent"):
        found["entities"] = [_write_entity(span, triple=task == "intent") for span in record.spans]
        if task == "intent":
            found["cats"] = record.labels
        else:
            found["relations"] = [_write_relation(relation) for relation in record.relations]
    elif task == "spans":
        found[column] = [_write_entity(span, triple=True) for span in record.spans]
    else:
        found[column] = record.targets if task == "seq2seq" else record.labels
    if own.get("plain") and len(found[column]) < 2:
        found[column] = found[column][0] if found[column] else ""
    always = () if own else (*found,)  # nothing chosen is an answer too
    found |= {"meta": record.meta, "answer": record.answer, REST: record.rest(*SAYS[task])}
    return record.ordered(found, always)


def task_of(row: Mapping[str, Any]) -> Task:
    """The task that a row looks like; class names and target texts look alike and count as classes."""
    if "relations" in row:
        return "relations"
    entities = row.get("entities")
    if "cats" in row or isinstance(entities, list):
        return "relations" if entities and isinstance(entities[0], dict) and "cats" not in row else "intent"
    values = row.get("label") if "label" in row else row.get("labels")
    if isinstance(values, list) and values and all(isinstance(value, list | dict) for value in values):
        return "spans"
    return "classification"


def task_of_record(record: Record) -> Task:
    """The doccano task that can say what a record holds."""
    if record.relations:
        return "relations"
    if record.spans:
        return "intent" if record.labels else "spans"
    return "seq2seq" if record.targets and not record.labels else "classification"


def _entity(value: Any) -> Span:
    if isinstance(value, dict):
        extra = {key: one for key, one in value.items() if key not in ENTITY}
        known = {key: value.get(key) for key in ("label", "id")}
        return Span(start=value["start_offset"], end=value["end_offset"], **known, extra=extra, keys=list(value))
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"{value!r} is not [start, end, label]")
    return Span(start=value[0], end=value[1], label=value[2])


def _write_entity(span: Span, triple: bool) -> Any:
    """[start, end, label] where that says all of it, else an object."""
    if triple and span.id is None and not span.extra and "start_offset" not in span.keys:
        return [span.start, span.end, span.label]
    found = {"id": span.id, "start_offset": span.start, "end_offset": span.end, "label": span.label}
    return span.ordered(found, ("start_offset", "end_offset", "label"))


def _relation(value: Any) -> Relation:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is not {{from_id, to_id, type}}")
    extra = {key: one for key, one in value.items() if key not in RELATION}
    ends = {"head": value["from_id"], "child": value["to_id"]}
    return Relation(**ends, label=value.get("type"), id=value.get("id"), extra=extra, keys=list(value))


def _write_relation(relation: Relation) -> dict[str, Any]:
    found = {"id": relation.id, "from_id": relation.head, "to_id": relation.child, "type": relation.label}
    return relation.ordered(found, ("from_id", "to_id", "type"))
