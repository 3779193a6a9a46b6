"""Instruction and preference corpora: from the docstrings of a code corpus, or from files of one's own.

Written as a corpus is, with `messages` in place of `text`; preference pairs have `prompt_messages`, `chosen`,
`rejected`. `report.json`: python, corpus_hash, shape, splits {split: {samples, bytes}}, prompt_chars and answer_chars
(histograms as in the corpus report), dropped [{reason, count, examples}].
"""

import json
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soma.base import progress
from soma.base.artefact import hash_lines, write_json
from soma.base.errors import UserError
from soma.data import profile
from soma.data.config import DedupConfig, InstructConfig
from soma.data.corpus import SPLITS, read_corpus, text_id, write_dropped, write_shards
from soma.data.dedup import exact_key, near_duplicates
from soma.data.docstrings import function_pairs
from soma.data.instruct.checks import RowError, text_of
from soma.data.instruct.samples import Sample, read_samples
from soma.data.instruct.schemas import schema_of
from soma.data.readers import READ_ERRORS, Dropped, decompress, json_rows
from soma.data.sources import Item, list_items, source_fingerprint
from soma.data.split import held_out


@dataclass(slots=True)
class Row:
    """A sample on its way; `split` is set from the start where it comes from a corpus."""

    id: str
    sample: Sample
    source: str
    kind: str
    meta: dict[str, Any]
    split: str = ""
    cluster: str = ""

    @property
    def answer(self) -> str:
        """What is learned: the chosen answer, or all that the assistant says."""
        if self.sample.chosen is not None:
            return self.sample.chosen
        return "\n".join(text_of(m) for m in self.sample.messages if m["role"] == "assistant")

    @property
    def prompt(self) -> str:
        """What is asked: everything that is not the assistant's."""
        return "\n".join(text_of(m) for m in self.sample.messages if m["role"] != "assistant")

    @property
    def text(self) -> str:
        """All of it, to compare and to count."""
        parts = [text_of(m) for m in self.sample.messages]
        return "\n".join([*parts, self.sample.chosen or "", self.sample.rejected or ""]).rstrip("\n")


def instruct_fingerprint(config: InstructConfig) -> str:
    """Hash over name and content of the config's own files; the same for all configs without any."""
    return source_fingerprint(config.sources)


def build_instruct(config: InstructConfig, corpus: Path | None, out: Path) -> None:
    """Fill `out` with instruction or preference pairs, split into train and validation.

    With `config.sources` they come from those files: what is alike (near-duplicates, and samples with the same
    question) goes to the same split. Else they are made from the Python documents of `corpus`, which keeps its split;
    a function that is in both splits, or nearly so, stays in train only. Raises UserError where nothing is left and,
    if `config.strict`, for a row that does not fit its shape, naming file, row and field.
    """
    dropped: list[Dropped] = []
    if config.sources:
        shape, rows = _read_files(config, dropped)
        rows = _unique(rows, dropped, lambda row: row.id.encode())
        _require_some(rows, dropped, "instruct.sources")
        _split_files(config, rows)
    else:
        if corpus is None:
            raise UserError(
                "instruct: neither `sources` nor a corpus to make pairs from; add `data` or instruct.sources"
            )
        shape, rows = "docstrings", _read_functions(config, corpus, dropped)
        rows = _unique(rows, dropped, lambda row: exact_key(row.answer))
        _require_some(rows, dropped, "instruct (docstring pairs)")
        rows = _without_straddlers(rows, dropped)
    splits = {split: [row for row in rows if row.split == split] for split in SPLITS}
    for split, members in splits.items():
        _write_split(out, split, members, preference=shape == "preference")
    write_dropped(out, dropped)
    write_json(out / "report.json", _report(shape, splits, dropped))


# --- From a code corpus ---


def _read_functions(config: InstructConfig, corpus: Path, dropped: list[Dropped]) -> list[Row]:
    rows: list[Row] = []
    with progress.current().task("docstring pairs", unit="documents") as task:
        for split in SPLITS:
            for document in read_corpus(corpus, split, ["text", "source", "kind"]):
                if document["kind"] == "python":
                    rows += _functions_of(config, document, split, dropped)
                task.advance(1, pairs=len(rows))
    return rows


def _functions_of(
    config: InstructConfig, document: dict[str, Any], split: str, dropped: list[Dropped]
) -> Iterator[Row]:
    try:
        pairs = list(function_pairs(document["text"]))
    except (SyntaxError, ValueError) as error:
        dropped.append(Dropped(document["source"], "not_python", str(error), profile.excerpt(document["text"])))
        return
    for pair in pairs:
        source = f"{document['source']}:{pair.name}"
        if len(pair.answer) < config.min_chars or len(pair.prompt) + len(pair.answer) > config.max_chars:
            reason = "too_short" if len(pair.answer) < config.min_chars else "too_long"
            dropped.append(Dropped(source, reason, f"{len(pair.answer)} characters", profile.excerpt(pair.answer)))
            continue
        messages = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.answer}]
        if config.system:
            messages.insert(0, {"role": "system", "content": config.system})
        yield _row(Sample(messages), source, "docstrings", {"line": pair.line}, split)


def _without_straddlers(rows: list[Row], dropped: list[Dropped]) -> list[Row]:
    """`rows` (sorted by id) less validation functions that are like one in train, with their groups as clusters."""
    near = near_duplicates([row.answer for row in rows], DedupConfig())
    kept = []
    for root, members in near.groups.groups().items():
        in_train = any(rows[index].split == "train" for index in members)
        for index in members:
            rows[index].cluster = rows[root].id
            if in_train and rows[index].split == "validation":
                detail = "like a function in train"
                dropped.append(
                    Dropped(rows[index].source, "straddles_split", detail, profile.excerpt(rows[index].answer))
                )
            else:
                kept.append(rows[index])
    return sorted(kept, key=lambda row: row.id)


# --- From files ---


def _read_files(config: InstructConfig, dropped: list[Dropped]) -> tuple[str, list[Row]]:
    shape = None if config.shape == "auto" else config.shape
    rows = []
    with progress.current().task("read", unit="rows") as task:
        for item in list_items(config.sources):
            if not isinstance(item, Item) or item.kind != "jsonl":
                reason = "only JSON and JSONL files hold instruction rows"
                _set_aside(config, dropped, item.name, "unknown_kind", reason, "")
                continue
            for number, value in _rows(item):
                place = f"{item.name}#{number}"
                if isinstance(value, Dropped):
                    _set_aside(config, dropped, place, value.reason, value.detail, value.excerpt)
                    continue
                try:
                    if not isinstance(value, dict):
                        raise RowError("row", "an object expected")
                    shape = shape or schema_of(value)
                    found = read_samples(value, shape, config.system)
                    rows += [_row(sample, place, shape, {}) for sample in found]
                    if not found:
                        detail = "an answer that is not wanted (label: false)"
                        dropped.append(Dropped(place, "undesired", detail, profile.excerpt(json.dumps(value))))
                except RowError as error:
                    _set_aside(config, dropped, place, "bad_row", str(error), profile.excerpt(json.dumps(value)))
                task.advance(1)
    return shape or "messages", rows


def _rows(item: Item) -> Iterator[tuple[int, Any]]:
    try:
        with item.open() as raw:
            yield from json_rows(item, decompress(raw, item.compression))
    except READ_ERRORS as error:
        yield 0, Dropped(item.name, "unreadable", f"{type(error).__name__}: {error}")


def _set_aside(
    config: InstructConfig, dropped: list[Dropped], place: str, reason: str, detail: str, excerpt: str
) -> None:
    if config.strict:
        raise UserError(f"{place.replace('#', ', row ')}: {detail} (set strict: false to leave such rows out)")
    dropped.append(Dropped(place, reason, detail, excerpt))


def _split_files(config: InstructConfig, rows: Sequence[Row]) -> None:
    """Set cluster and split of `rows` (sorted by id)."""
    groups = near_duplicates([row.text for row in rows], DedupConfig()).groups
    same_question: dict[bytes, int] = {}
    sizes: Counter[str] = Counter()
    for index, row in enumerate(rows):
        groups.union(same_question.setdefault(exact_key(row.prompt), index), index)
    for index, row in enumerate(rows):
        row.cluster = rows[groups.find(index)].id
        sizes[row.cluster] += len(row.text.encode())
    out = held_out(sizes, config.validation_fraction, config.seed)
    for row in rows:
        row.split = "validation" if row.cluster in out else "train"


# --- Both ---


def _row(sample: Sample, source: str, kind: str, meta: dict[str, Any], split: str = "") -> Row:
    parts = [sample.messages, sample.chosen, sample.rejected, *([sample.tools] if sample.tools else [])]
    content = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return Row(text_id(content), sample, source, kind, meta, split)


def _unique(rows: list[Row], dropped: list[Dropped], key: Any) -> list[Row]:
    """One row per key, sorted by id: train before validation, then the smallest id, then the first source by name."""
    best: dict[bytes, Row] = {}
    for row in sorted(rows, key=lambda row: (row.split, row.id, row.source)):
        first = best.setdefault(key(row), row)
        if first is not row:
            detail = f"same as {first.source}"
            dropped.append(Dropped(row.source, "exact_duplicate", detail, profile.excerpt(row.answer)))
    return sorted(best.values(), key=lambda row: row.id)


def _require_some(rows: Sequence[Row], dropped: Sequence[Dropped], where: str) -> None:
    if not rows:
        raise UserError(f"{where}: no sample is left{profile.drop_summary(profile.ordered(dropped))}")


def _write_split(out: Path, split: str, rows: Sequence[Row], preference: bool) -> None:
    columns: dict[str, list[Any]] = {"id": [row.id for row in rows]}
    messages = [json.dumps(row.sample.messages, ensure_ascii=False) for row in rows]
    if preference:
        columns["prompt_messages"] = messages
        columns["chosen"] = [row.sample.chosen for row in rows]
        columns["rejected"] = [row.sample.rejected for row in rows]
    else:
        columns["messages"] = messages
    if any(row.sample.tools for row in rows):
        columns["tools"] = [json.dumps(row.sample.tools or [], ensure_ascii=False) for row in rows]
    columns["source"] = [row.source for row in rows]
    columns["meta"] = [json.dumps(row.meta, sort_keys=True) for row in rows]
    columns["kind"] = [row.kind for row in rows]
    columns["n_bytes"] = [len(row.text.encode()) for row in rows]
    columns["n_chars"] = [len(row.text) for row in rows]
    columns["cluster"] = [row.cluster for row in rows]
    write_shards(out, split, columns, columns["n_bytes"])


def _report(shape: str, splits: dict[str, list[Row]], dropped: list[Dropped]) -> dict[str, Any]:
    rows = [row for members in splits.values() for row in members]
    return {
        "format": "soma-instruct-report", "version": 1, "python": platform.python_version(), "shape": shape,
        "corpus_hash": hash_lines(sorted(row.id for row in rows)),
        "splits": {
            split: {"samples": len(members), "bytes": sum(len(row.text.encode()) for row in members)}
            for split, members in splits.items()
        },
        "prompt_chars": profile.histogram(np.array([len(row.prompt) for row in rows])),
        "answer_chars": profile.histogram(np.array([len(row.answer) for row in rows])),
        "dropped": profile.drop_reasons(profile.ordered(dropped)),
    }  # fmt: skip
