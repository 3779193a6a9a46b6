"""From what was made to a folder: duplicates and evaluation items out, every row with where it comes from.

`rows.jsonl`: Self-Instruct's tasks in the schema `seeds`, Evol-Instruct's in `alpaca`, each with `id` and `provenance`
(model, url_host, operator, parents, prompt_hashes, time, and the tokens of the requests that it came of).
`dropped.jsonl`: rows that were made and left out, with reason and detail. `report.json`: counts, what was spent.
`calls.jsonl`: the journal. `settings.json`: what must be the same when the folder is resumed.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soma.base.artefact import json_hash, read_json, write_json
from soma.base.errors import UserError
from soma.data.config import DecontaminateConfig, DedupConfig
from soma.data.decontaminate.items import make_targets, read_fields
from soma.data.decontaminate.match import Finder
from soma.data.dedup import exact_key, near_duplicates
from soma.data.instruct.conversations import write_seeds
from soma.data.instruct.convert import Outcome, records_of
from soma.data.instruct.generate.caller import Answer, Caller
from soma.data.instruct.generate.settings import Settings


@dataclass(frozen=True)
class Made:
    """A row, with `id` and `provenance`."""

    row: dict[str, Any]

    @classmethod
    def of(
        cls, row: dict[str, Any], operator: str, parents: Sequence[str], answers: Sequence[Answer], model: str
    ) -> "Made":
        """`answers`: to all requests that the row came of, in their order."""
        provenance = {
            "model": model, "url_host": answers[-1].host, "operator": operator, "parents": list(parents),
            "prompt_hashes": [answer.prompt_hash for answer in answers], "time": answers[-1].time,
            "tokens_in": sum(answer.tokens_in for answer in answers),
            "tokens_out": sum(answer.tokens_out for answer in answers),
        }  # fmt: skip
        return cls({"id": json_hash([row, operator, list(parents)])[:16], **row, "provenance": provenance})


def generate(seeds: str, settings: Settings, out: Path) -> dict[str, Any]:
    """Make rows from a file of seeds (any schema) into the folder `out`; returns the report.

    Killed at any time, the same call goes on; a larger budget goes further. Raises UserError for seeds that do not fit,
    a folder that was made with other settings, and an endpoint that fails.
    """
    from soma.data.instruct.generate import evolve, self_instruct

    tasks = read_seeds_file(seeds)
    _claim(out, settings.identity() | {"seeds": json_hash(tasks)})
    caller = Caller(settings, out)
    try:
        if settings.method == "self-instruct":
            made, turned_down = self_instruct.generate(tasks, settings, caller)
        else:
            asked = [(task["id"], _asked(task)) for task in tasks]
            made, turned_down = evolve.generate(asked, settings, caller)
    finally:
        caller.close()
    kept, dropped = _chosen(made, [_text(task) for task in tasks], settings)
    _write(out / "rows.jsonl", [one.row for one in kept])
    _write(out / "dropped.jsonl", dropped)
    reasons = turned_down + _count(dropped)
    report = {
        "format": "soma-generation", "version": 1, "method": settings.method, "model": settings.model,
        "seeds": len(tasks), "rows": len(kept), "left_out": dict(sorted(reasons.items())), "over_budget": caller.over,
        "spent": asdict(caller.spent) | {"money": str(caller.cost)},
    }  # fmt: skip
    write_json(out / "report.json", report)
    return report


def read_seeds_file(source: str) -> list[dict[str, Any]]:
    """The tasks of a file in any schema, in that of seeds, each with an `id`."""
    outcome = Outcome()
    tasks = []
    for number, record in enumerate(records_of([source], None, outcome, whole=True), start=1):
        id = record.get("more", {}).get("id")
        tasks.append({"id": str(id) if id is not None else f"seed {number}", **write_seeds(record)})
    if outcome.wrong:
        raise UserError("\n".join(["--seeds: rows that do not fit:", *outcome.lines()]))
    if not tasks:
        raise UserError(f"--seeds {source}: no row in it")
    return tasks


def _asked(task: dict[str, Any]) -> str:
    """A task as one text: its instruction with the input of its first instance."""
    given = task["instances"][0]["input"]
    return f"{task['instruction']}\n\n{given}" if given else str(task["instruction"])


def _claim(out: Path, identity: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    if path.exists():
        before = read_json(path)
        for key, value in identity.items():
            if before.get(key) != value:
                raise UserError(
                    f"{out} was begun with {key} {before.get(key)!r}, now it is {value!r}; give another --out"
                )
    else:
        write_json(path, identity)


def _text(row: dict[str, Any]) -> str:
    """What a row says, to compare."""
    parts = row.get("instances", [row])
    return "\n".join([row["instruction"], *(f"{part['input']}\n{part['output']}" for part in parts)])


def _chosen(made: Sequence[Made], seeds: Sequence[str], settings: Settings) -> tuple[list[Made], list[dict[str, Any]]]:
    """The rows that stay: the first of those that are alike, none that is like a seed or holds an evaluation item."""
    texts = [*seeds, *(_text(one.row) for one in made)]
    config = DedupConfig(threshold=settings.near, straddle_threshold=min(settings.near, 0.5))
    near = near_duplicates(texts, config).duplicates
    exact: dict[bytes, int] = {}
    found = _contaminated(texts[len(seeds) :], settings)
    kept, dropped = [], []
    for index, text in enumerate(texts):
        first = exact.setdefault(exact_key(text), index)
        if index < len(seeds):
            continue
        one = made[index - len(seeds)]
        root = near.find(index)
        other = first if first != index else root
        reason = "exact_duplicate" if first != index else "near_duplicate" if root != index else None
        detail = "" if reason is None else _name(other, len(seeds), made)
        if reason is None and index - len(seeds) in found:
            reason, detail = "contaminated", found[index - len(seeds)]
        if reason is None:
            kept.append(one)
        else:
            dropped.append({"reason": reason, "detail": detail, "row": one.row})
    return kept, dropped


def _name(index: int, seeds: int, made: Sequence[Made]) -> str:
    return f"like seed {index + 1}" if index < seeds else f"like {made[index - seeds].row['id']}"


def _contaminated(texts: list[str], settings: Settings) -> dict[int, str]:
    """By row, the evaluation item that is in it."""
    if not settings.decontaminate or not texts:
        return {}
    config = DecontaminateConfig(sets=list(settings.decontaminate))
    fields = read_fields(config)
    found: dict[int, str] = {}
    for match in Finder(make_targets(fields, config), config).find(texts):
        field = fields[match["field"]]
        found.setdefault(int(match["row"]), f"{field.set}#{field.item} {field.name}")
    return found


def _count(dropped: Iterable[dict[str, Any]]) -> Counter[str]:
    return Counter(one["reason"] for one in dropped)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """The file at once: whole, or as it was."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
