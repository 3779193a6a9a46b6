"""One person's work on one file: what is still to do, and every decision on the disk before it is answered.

The file that comes out is the memory: each decision is a line that is appended and synced. A line that a kill cut short
is taken off at the next start. Changing or taking back an earlier decision writes the file anew, all at once.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from soma.base.artefact import write_text
from soma.base.errors import UserError
from soma.data.annotation.files import Format, line, read_records, written
from soma.data.annotation.record import Answer, Name, Record, Relation, Span, Task

Work = Literal["classification", "multilabel", "spans", "relations", "seq2seq"]
WORK = ("classification", "multilabel", "spans", "relations", "seq2seq")
VIEWS = {
    "classification": "choice", "multilabel": "choice", "spans": "spans_manual", "relations": "relations",
    "seq2seq": "text_input",
}  # fmt: skip
ITEM = "_item_hash"


class MadeSpan(BaseModel):
    """A span as the page sends it, in code points."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(ge=0)
    end: int = Field(ge=0)
    label: str
    id: Name | None = None


class MadeRelation(BaseModel):
    """A relation as the page sends it."""

    model_config = ConfigDict(extra="forbid")

    head: Name
    child: Name
    label: str


class Decision(BaseModel):
    """What the page sends of an item."""

    model_config = ConfigDict(extra="forbid")

    answer: Answer
    labels: list[Name] = Field(default_factory=list)
    spans: list[MadeSpan] = Field(default_factory=list)
    relations: list[MadeRelation] = Field(default_factory=list)
    targets: list[str] = Field(default_factory=list)


class Session:
    """The items of a file, and the decisions on them so far (index of the item: record, in the order of deciding)."""

    def __init__(
        self, source: Path, out: Path, work: Work, labels: Sequence[str] = (), relation_labels: Sequence[str] = (),
        *, form: Format = "prodigy", read_as: Format | None = None, annotator: str | None = None,
    ) -> None:  # fmt: skip
        """Raises UserError for files that do not go together and for labels that the work needs or has no use for."""
        self.source, self.out, self.work, self.form, self.annotator = source, out, work, form, annotator
        self.labels, self.relation_labels = list(labels), list(relation_labels)
        self._check()
        task: Task = "classification" if work == "multilabel" else work
        self.task = task
        self.records = read_records(source, read_as, task if read_as == "doccano" or task == "seq2seq" else None)
        seen: Counter[str] = Counter()
        self.items = [self._item(record, seen) for record in self.records]
        self.decisions: dict[int, Record] = {}
        if out.exists():
            self._resume()

    def _check(self) -> None:
        needed = {"relations": self.relation_labels, "seq2seq": ["text"]}.get(self.work, self.labels)
        if not needed or (self.work == "relations" and not self.labels):
            names = "labels and relation labels" if self.work == "relations" else "labels"
            raise UserError(f"{self.work} needs {names} (--labels a,b; --relation-labels x,y)")
        for given in (self.labels, self.relation_labels):
            if len(set(given)) != len(given) or "" in given:
                raise UserError(f"labels {','.join(given)}: each one once, and none of them empty")
        if self.out.suffix != ".jsonl":
            raise UserError(f"--out {self.out}: decisions are appended to a .jsonl file")
        if self.out.exists() and self.source.exists() and self.out.samefile(self.source):
            raise UserError(f"--out {self.out} is the file that is read: take another")

    def _item(self, record: Record, seen: Counter[str]) -> str:
        """What an item is called in the file that comes out: the same for everybody who works on this file."""
        text = record.text + "\0" + line(record.meta)
        seen[text] += 1
        return hashlib.sha256(f"{seen[text]}\0{text}".encode(errors="surrogatepass")).hexdigest()[:16]

    def _resume(self) -> None:
        data = self.out.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # the process died while it wrote this line: nobody was told that it is kept
            with open(self.out, "r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        if not whole.strip():
            return
        index = {item: number for number, item in enumerate(self.items)}
        for record in read_records(self.out, self.form, self.task):
            number = index.get(record.extra.get(ITEM, ""))
            if number is None:
                raise UserError(f"{self.out} holds decisions on other items than those of {self.source}: take another")
            self.decisions.pop(number, None)
            self.decisions[number] = record

    # --- What the page asks ---

    def summary(self) -> dict[str, Any]:
        """What the page shows around the item."""
        counts = Counter(record.answer for record in self.decisions.values())
        return {
            "work": self.work, "labels": self.labels, "relation_labels": self.relation_labels,
            "total": len(self.items), "decided": len(self.decisions), "next": self.next(), "answers": dict(counts),
            "source": self.source.name, "out": self.out.name,
        }  # fmt: skip

    def next(self, after: int = -1) -> int | None:
        """The first item after `after` that is not decided, else the first at all, None if there is none."""
        open_ = [number for number in range(len(self.items)) if number not in self.decisions]
        return next((number for number in open_ if number > after), open_[0] if open_ else None)

    def item(self, number: int) -> dict[str, Any]:
        """An item for the page, with the decision on it, or what the file proposes."""
        record = self.decisions.get(number, self.records[number])
        return {
            "index": number, "text": record.text, "meta": record.meta, "labels": record.labels,
            "spans": [span.model_dump(include={"start", "end", "label", "id"}) for span in record.spans],
            "relations": [one.model_dump(include={"head", "child", "label"}) for one in record.relations],
            "targets": record.targets, "answer": record.answer if number in self.decisions else None,
            "decided": number in self.decisions,
        }  # fmt: skip

    def decide(self, number: int, decision: Decision) -> None:
        """Keep a decision, on the disk when this returns. Raises ValueError for one that does not fit the item."""
        record = self._decided(number, decision)
        if wrong := record.check():
            raise ValueError(wrong)
        again = number in self.decisions
        decisions = {other: one for other, one in self.decisions.items() if other != number} | {number: record}
        if again:
            self._write(decisions)
        else:
            self._append(record)
        self.decisions = decisions

    def undo(self) -> int | None:
        """Take the last decision back. Returns its item, None where there was none."""
        if not self.decisions:
            return None
        *others, last = self.decisions
        self._write({number: self.decisions[number] for number in others})
        del self.decisions[last]
        return last

    def _decided(self, number: int, decision: Decision) -> Record:
        record = self.records[number]
        given: dict[str, Any] = {}
        if self.work in ("classification", "multilabel"):
            unknown = [label for label in decision.labels if label not in self.labels and label not in record.labels]
            if unknown or (self.work == "classification" and len(decision.labels) > 1):
                raise ValueError(f"labels {decision.labels}: expected {self.work} of {self.labels}")
            options = [{"id": label, "text": label} for label in self.labels]
            given = {"labels": decision.labels, "options": record.options or options}
        elif self.work in ("spans", "relations"):
            before = {(span.start, span.end, span.label): span for span in record.spans}
            spans = []
            for made in decision.spans:
                old = before.get((made.start, made.end, made.label))
                spans.append(old.model_copy(update={"id": made.id}) if old else Span(**made.model_dump()))
            given = {"spans": spans}
            if self.work == "relations":
                known = {(one.head, one.child, one.label): one for one in record.relations}
                given["relations"] = [
                    known.get((one.head, one.child, one.label)) or Relation(**one.model_dump())
                    for one in decision.relations
                ]
        else:
            given = {"targets": decision.targets}
        extra = {**record.extra, ITEM: self.items[number], "_view_id": VIEWS[self.work], "_timestamp": int(time.time())}
        if self.annotator:
            extra["_annotator_id"] = self.annotator
        source = {key: value for key, value in record.source.items() if key == "input"}
        return record.model_copy(update={**given, "answer": decision.answer, "extra": extra, "source": source})

    # --- The disk ---

    def _line(self, record: Record) -> str:
        return line(written(record, self.form, self.task)) + "\n"

    def _append(self, record: Record) -> None:
        new = not self.out.exists()
        with open(self.out, "ab") as file:
            end = file.tell()
            try:
                file.write(self._line(record).encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)  # a full disk: the page says so, and no half line stays
                raise
        if new:
            folder = os.open(self.out.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _write(self, decisions: dict[int, Record]) -> None:
        write_text(self.out, "".join(map(self._line, decisions.values())))
