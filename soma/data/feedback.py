"""Training data from the request log of a service (`soma.serve.requestlog`) and the feedback that came for it.

* `sft.jsonl`: {"messages": […]} for every answer with a thumb up, and for every correction in place of its answer.
* `dpo.jsonl`: {"prompt": […], "chosen", "rejected"} for every correction and the answer that it corrects, and for an
  answer with a thumb up beside one with a thumb down to the same conversation.

Both are what `soma adapt` reads (`soma.data.instruct.schemas`). Of several feedbacks for one answer the last counts,
part by part: a later thumb leaves the correction as it is. Feedback counts if the key that gave it is the one that
asked.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soma.base.artefact import write_text
from soma.base.errors import UserError
from soma.data.instruct.checks import RowError
from soma.data.instruct.samples import read_samples
from soma.data.instruct.schemas import Schema

REQUEST_COLUMNS = ["request_id", "choice", "key_id", "messages", "prompt", "completion", "outcome", "time"]


@dataclass
class Answer:
    """An answer and what was thought of it."""

    messages: list[dict[str, Any]]
    completion: str
    rating: str | None = None
    correction: str | None = None


@dataclass
class Export:
    """What came of a log. `left_out`: reasons and how many answers with feedback each."""

    sft: list[dict[str, Any]] = field(default_factory=list)
    dpo: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def export_feedback(folder: Path, out: Path) -> Export:
    """Write `sft.jsonl` and `dpo.jsonl` to the folder `out`; a file of no rows is not written. Raises UserError."""
    made = Export()
    answers = _answers(folder, made.left_out)
    for answer in answers:
        final = answer.correction or (answer.completion if answer.rating == "up" else None)
        if final is not None:
            turns = [*answer.messages, {"role": "assistant", "content": final}]
            _add(made.sft, {"messages": turns}, "messages", made.left_out)
        if answer.correction is not None and answer.correction != answer.completion:
            _add(made.dpo, _pair(answer.messages, answer.correction, answer.completion), "preference", made.left_out)
    for pair in _rated_pairs(answers):
        _add(made.dpo, pair, "preference", made.left_out)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("sft.jsonl", made.sft), ("dpo.jsonl", made.dpo)):
        unique = dict.fromkeys(json.dumps(row, ensure_ascii=False) for row in rows)
        if unique:
            write_text(out / name, "".join(line + "\n" for line in unique))
    return made


def _pair(messages: list[dict[str, Any]], chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": messages, "chosen": chosen, "rejected": rejected}


def _rated_pairs(answers: list[Answer]) -> Iterator[dict[str, Any]]:
    """Answers to the same conversation of which one was liked and another was not."""
    groups: dict[str, dict[str, list[str]]] = {}
    for answer in answers:
        if answer.rating is not None and answer.correction is None:
            group = groups.setdefault(json.dumps(answer.messages, sort_keys=True), {"up": [], "down": []})
            group[answer.rating].append(answer.completion)
    for key, group in groups.items():
        for chosen, rejected in zip(group["up"], group["down"], strict=False):
            if chosen != rejected:
                yield _pair(json.loads(key), chosen, rejected)


def _add(rows: list[dict[str, Any]], row: dict[str, Any], schema: Schema, left_out: Counter[str]) -> None:
    """A row, if it is one that training takes."""
    try:
        read_samples(row, schema, None)
    except RowError as error:
        left_out[str(error)] += 1
        return
    rows.append(row)


def _answers(folder: Path, left_out: Counter[str]) -> list[Answer]:
    """Answers with feedback, in the order in which they were asked for."""
    feedback = _feedback(folder)
    found: dict[tuple[str, int], tuple[Any, Answer]] = {}
    foreign = set()
    for row in _rows(folder, "requests", REQUEST_COLUMNS):
        key = (row["request_id"], row["choice"])
        if key not in feedback:
            continue
        told = feedback[key].get(row["key_id"])
        if told is None:
            foreign.add(key)
        elif row["outcome"] == "ok":
            found[key] = row["time"], Answer(_messages(row), row["completion"], **told)
    left_out["the request was another key's"] += len(foreign - found.keys())
    left_out["the request is not in the log, or did not end well"] += len(feedback.keys() - found.keys() - foreign)
    for reason in [reason for reason, count in left_out.items() if not count]:
        del left_out[reason]
    return [answer for _, answer in sorted(found.values(), key=lambda each: each[0])]


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    if row["messages"] is None:
        return [{"role": "user", "content": row["prompt"] or ""}]
    found = []
    for each in json.loads(row["messages"]):
        role = each.get("role") if isinstance(each, dict) else None
        content = each.get("content") if isinstance(each, dict) else None
        found.append({"role": "system" if role == "developer" else role, "content": content})
    return found


def _feedback(folder: Path) -> dict[tuple[str, int], dict[str | None, dict[str, Any]]]:
    """By answer and key: the last rating and the last correction."""
    found: dict[tuple[str, int], dict[str | None, dict[str, Any]]] = {}
    rows = _rows(folder, "feedback", ["request_id", "choice", "key_id", "rating", "correction", "time"])
    for row in sorted(rows, key=lambda row: row["time"]):
        by_key = found.setdefault((row["request_id"], row["choice"]), {})
        told = by_key.setdefault(row["key_id"], {"rating": None, "correction": None})
        told |= {name: row[name] for name in told if row[name] is not None}
    return found


def _rows(folder: Path, table: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows of a table, file by file. Raises UserError for a folder that is no request log, and a file that is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not (folder / table).is_dir():
        raise UserError(f"{folder}: no request log; expected a folder with `requests` and `feedback` in it")
    for path in sorted((folder / table).glob("[!.]*.parquet")):
        try:
            yield from pq.read_table(path, columns=columns).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read as a file of the request log: {error}") from None
