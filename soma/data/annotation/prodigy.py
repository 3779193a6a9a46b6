"""Prodigy's tasks (JSONL): textcat, choice, ner and spans, rel, text_input, compare, with answers and hashes.

Reference: https://prodi.gy/docs/api-interfaces. Hashes are Prodigy's own (`_input_hash`, `_task_hash`) and are kept;
it makes them itself for tasks that have none. Tokens, scores, sessions and views stay as they were.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from soma.data.annotation.record import REST, Comparison, Name, Record, Relation, Span

SPAN = ("start", "end", "label", "id")
RELATION = ("label", "id", "head", "child", "head_span", "child_span")
ANSWERS = ("accept", "reject", "ignore")
FIELD = "user_input"  # where the interface text_input puts what was written, unless its field_id says otherwise


def read_task(task: Mapping[str, Any]) -> Record:
    """A task as a record. Raises ValueError (pydantic's included) or KeyError naming what does not fit."""
    if task.get("answer") is not None and task["answer"] not in ANSWERS:
        raise ValueError(f"answer {task['answer']!r} is none of {', '.join(ANSWERS)}")
    used = {"text", "meta", "answer", "options", "spans", "relations", REST}
    found: dict[str, Any] = {"answer": task.get("answer"), "options": task.get("options") or []}
    source: dict[str, Any] = {"format": "prodigy"}
    if isinstance(task.get("input"), dict) and "accept" in task and "reject" in task:
        used |= {"input", "accept", "reject"}
        found["comparison"] = Comparison(accept=task["accept"], reject=task["reject"])
        source["input"] = {key: value for key, value in task["input"].items() if key != "text"}
        task = {**task, "text": task["input"].get("text")}
    elif isinstance(task.get("accept"), list):
        used.add("accept")
        found["labels"], source["view"] = task["accept"], "choice"
    elif isinstance(task.get("label"), str):
        used.add("label")
        found["labels"], source["view"] = [task["label"]], "textcat"
    field = task.get("field_id", FIELD)
    if isinstance(field, str) and isinstance(task.get(field), str):
        used.add(field)
        found["targets"], source["field"] = [task[field]], field
    found["spans"] = spans = [_span(span) for span in task.get("spans") or []]
    found["relations"] = [_relation(relation, spans) for relation in task.get("relations") or []]
    found |= task.get(REST) or {}
    extra = {key: value for key, value in task.items() if key not in used}
    keys = [key for key in task if key != "text" or "input" not in source]
    meta, text = task.get("meta"), task.get("text")
    if meta is not None and not isinstance(meta, dict):
        extra["meta"], meta = meta, None
    text = "" if text is None else text
    return Record(text=text, **found, meta=meta or {}, extra=extra, keys=keys, source=source)


def write_task(record: Record, options: Sequence[Name] = ()) -> dict[str, Any]:
    """The record as a task. options: the classes that there are, for a record that does not say them itself."""
    own = record.source if record.source.get("format") == "prodigy" else {}
    named: dict[Name | None, Span] = {span.id: span for span in record.spans}
    found: dict[str, Any] = {"text": record.text}
    said, always = ["spans", "relations", "options"], ["text"]
    if record.comparison is not None:
        found = {"input": {"text": record.text, **own.get("input", {})}}
        found |= {"accept": record.comparison.accept, "reject": record.comparison.reject}
        said.append("comparison")
    elif own.get("view") == "textcat" and len(record.labels) == 1:
        found["label"] = record.labels[0]
        said.append("labels")
    elif own.get("view") == "choice" or record.labels or options or (record.options and not own):
        found |= {"options": _options(record, options), "accept": record.labels}
        said.append("labels")
        always.append("accept")
    if record.options:
        found["options"] = record.options
    if len(record.targets) == 1:
        found[own.get("field", FIELD)] = record.targets[0]
        said.append("targets")
    spans = [span for span in record.spans if not span.extra.get("implicit")]
    found |= {
        "spans": [_write_span(span) for span in spans],
        "relations": [_write_relation(relation, named) for relation in record.relations],
        "meta": record.meta, "answer": record.answer, REST: record.rest(*said),
    }  # fmt: skip
    return record.ordered(found, always)


def _options(record: Record, names: Sequence[Name]) -> list[Any]:
    """What could be chosen; a made-up list goes without where the source had none (`keys` say so)."""
    if record.options or "accept" in record.keys:
        return record.options
    return [{"id": name, "text": str(name)} for name in names or record.labels]


def _span(span: Mapping[str, Any]) -> Span:
    extra = {key: value for key, value in span.items() if key not in SPAN}
    known = {key: span.get(key) for key in ("label", "id")}
    return Span(start=span["start"], end=span["end"], **known, extra=extra, keys=list(span))


def _write_span(span: Span) -> dict[str, Any]:
    found = {"start": span.start, "end": span.end, "label": span.label}
    if "id" in span.keys or not span.keys:  # else it was made up for relations
        found["id"] = span.id
    return span.ordered(found, ("start", "end"))


def _relation(relation: Mapping[str, Any], spans: list[Span]) -> Relation:
    """A relation. Ends that are no span of the task (tokens, say) become implicit spans at the end of `spans`."""
    names: dict[str, Any] = {}
    for end in ("head", "child"):
        place = relation.get(f"{end}_span")
        if not isinstance(place, dict):
            raise ValueError(f"relation {relation.get('label')!r} has no {end}_span")
        key = (place["start"], place["end"], place.get("label"))
        alike = [span for span in spans if (span.start, span.end, span.label) == key]
        span = next((span for span in alike if span.id == place.get("id")), alike[0] if alike else None)
        if span is None:
            span = Span(start=key[0], end=key[1], label=key[2], extra={"implicit": True}, keys=["start", "end"])
            spans.append(span)
        if span.id is None:
            taken = {str(other.id) for other in spans}
            span.id = next(name for name in range(len(taken) + 1) if str(name) not in taken)
        names[end] = span.id
    extra = {key: value for key, value in relation.items() if key not in RELATION}
    extra["ends"] = {key: relation[key] for key in RELATION[2:] if key in relation}
    return Relation(**names, label=relation.get("label"), id=relation.get("id"), extra=extra, keys=list(relation))


def _write_relation(relation: Relation, named: Mapping[Name | None, Span]) -> dict[str, Any]:
    """Its ends as they were read where their spans still lie there; else made from the spans."""
    given = relation.extra.get("ends", {})
    found: dict[str, Any] = {}
    for end, name in (("head", relation.head), ("child", relation.child)):
        span, place = named[name], given.get(f"{end}_span")
        if place and (place["start"], place["end"], place.get("label")) == (span.start, span.end, span.label):
            found |= {key: given[key] for key in (end, f"{end}_span") if key in given}
            continue
        tokens = {key: span.extra[key] for key in ("token_start", "token_end") if key in span.extra}
        if "token_end" in tokens:
            found[end] = tokens["token_end"]  # Prodigy's arrows hold on to the last token of a span
        found[f"{end}_span"] = {"start": span.start, "end": span.end, **tokens, "label": span.label}
        if sum((one.start, one.end, one.label) == (span.start, span.end, span.label) for one in named.values()) > 1:
            found[f"{end}_span"]["id"] = span.id
    extra = {key: value for key, value in relation.extra.items() if key != "ends"}
    return relation.model_copy(update={"extra": extra}).ordered({**found, "label": relation.label, "id": relation.id})
