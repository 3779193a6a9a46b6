"""The one record that every annotation format is read into and written from.

Offsets are Unicode code points, as Python, doccano and spaCy count them, the end outside. What a format says that the
record has no name for stays in `extra`, and `keys` remembers which fields stood in the source, in which order: a
record that is written back in its own format gives the same JSON.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = str | int
Answer = Literal["accept", "reject", "ignore"]
TASKS = ("classification", "spans", "relations", "seq2seq", "intent")
REST = "soma"  # the field for what a format, or a task of it, has no place for
SAID = ("labels", "spans", "relations", "targets", "options", "comparison")
Task = Literal["classification", "spans", "relations", "seq2seq", "intent"]


class Kept(BaseModel):
    """What keeps the fields that Soma has no name for."""

    model_config = ConfigDict(extra="forbid")

    extra: dict[str, Any] = Field(default_factory=dict, description="fields without a name of their own, as they were")
    keys: list[str] = Field(default_factory=list, description="fields of the source in their order; empty: made here")

    def ordered(self, found: Mapping[str, Any], always: Sequence[str] = ()) -> dict[str, Any]:
        """`found` and the extra fields in the order of the source.

        What says nothing stays out unless it stood there or is one of `always`. An extra field that bears the name of
        one in `found` is another format's; it gives way where that one says something.
        """
        whole = {**self.extra, **{key: value for key, value in found.items() if says(value) or key not in self.extra}}
        order = [key for key in self.keys if key in whole] + [key for key in whole if key not in self.keys]
        stay = {*self.keys, *self.extra, *always}
        return {key: whole[key] for key in order if key in stay or says(whole[key])}


class Span(Kept):
    """A stretch of the text, [start, end) in code points. `id`: what relations call it."""

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    label: str | None = None
    id: Name | None = None


class Relation(Kept):
    """An arrow from one span to another, by their ids."""

    head: Name
    child: Name
    label: str | None = None
    id: Name | None = None


class Comparison(BaseModel):
    """Two outputs for the text, of which `answer` says whether the first is the better one."""

    accept: Any
    reject: Any


class Record(Kept):
    """A text with what was said of it. `source`: the format that it was read from, and how it said it there."""

    text: str = ""
    labels: list[Name] = Field(default_factory=list, description="classes of the whole text")
    spans: list[Span] = Field(default_factory=list)
    relations: list[Relation] = Field(default_factory=list)
    targets: list[str] = Field(default_factory=list, description="texts that answer it (sequence to sequence)")
    options: list[Any] = Field(default_factory=list, description="what could be chosen, {id, text} each")
    comparison: Comparison | None = None
    answer: Answer | None = Field(None, description="whether the annotator took it, refused it or passed over it")
    meta: dict[str, Any] = Field(default_factory=dict)
    source: dict[str, Any] = Field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """All that is said, without the order and form in which one format says it: equal where nothing was lost."""
        whole = self.model_dump(exclude={"keys", "source"})
        for part in (*whole["spans"], *whole["relations"]):
            del part["keys"]
            part["extra"].pop("ends", None)  # how Prodigy said where a relation's spans lie
        return whole

    def rest(self, *said: str) -> dict[str, Any]:
        """What the record says besides the fields in `said`: the value of the field `REST`."""
        whole = {name: getattr(self, name) for name in SAID if name not in said}
        return {name: _plain(value) for name, value in whole.items() if says(value)}

    def identity(self) -> str:
        """What the same item is called in the files of several annotators."""
        for key in ("_input_hash", "_item_hash", "id"):
            if self.extra.get(key) is not None:
                return f"{key}:{self.extra[key]}"
        return "text:" + hashlib.sha256(self.text.encode(errors="surrogatepass")).hexdigest()[:16]

    def classes(self) -> list[Name] | None:
        """The classes that the annotator stands by: none of them where refused, None where passed over."""
        if self.answer == "ignore":
            return None
        return [] if self.answer == "reject" else self.labels

    def check(self) -> str:
        """What is wrong with spans and relations; empty if nothing is."""
        for span in self.spans:
            if span.end < span.start or (("text" in self.keys or not self.keys) and span.end > len(self.text)):
                return (
                    f"span [{span.start}, {span.end}) {span.label!r} lies outside of the text ({len(self.text)} long)"
                )
        known = [span.id for span in self.spans if span.id is not None]
        if len(known) != len(set(known)):
            return "two spans have the same id"
        for relation in self.relations:
            for end in (relation.head, relation.child):
                if end not in known:
                    return f"relation {relation.label!r} names the span {end!r}, which is not there"
        return ""


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.model_dump() if isinstance(value, BaseModel) else value


def says(value: Any) -> bool:
    """Whether a field's value says anything."""
    return value is not None and value != [] and value != {} and value != ""
