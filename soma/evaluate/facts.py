"""What a run's report is made of, read from its artefacts. Every part may be missing; nothing here loads torch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from soma.base import doctor, machine
from soma.base.artefact import read_json

Json = dict[str, Any]
NOT_IN_REPORT = ("Chromium", "port", "network")  # checks that say nothing about what a run did


class Part(BaseModel):
    """A part of the report: plain values, as JSON gives them."""

    model_config = ConfigDict(extra="forbid")


class Training(Part):
    """One training stage: the lines of its `metrics.jsonl` by event, and its `summary.json`."""

    stage: str
    steps: list[Json] = []
    validations: list[Json] = []
    notes: list[str] = []
    summary: Json = {}


class Evaluation(Part):
    """One model's `scores.json`, `words.json`, `samples.parquet` and timing."""

    stage: str
    scores: Json = {}
    words: Json = {}
    samples: list[Json] = []
    timing: Json = {}


class Stage(Part):
    """One stage of the run as `run.json` has it."""

    stage: str
    key: str = ""
    cached: bool = False
    seconds: float | None = None
    peak_memory_bytes: float | None = None
    bytes: float | None = None
    content_hash: str = ""
    reproducible: bool | str = True
    inputs: dict[str, str] = {}


class Notice(Part):
    """Something that was off or did not hold, why, and what to do about it."""

    what: str
    why: str = ""
    do: str = ""


class ReportFacts(Part):
    """Everything that the report shows."""

    name: str = "run"
    description: str = ""
    started: str = ""
    stages: list[Stage] = []
    corpus: Json | None = None
    expectations: Json | None = None
    tokens: Json | None = None
    pairs: dict[str, Json] = {}
    training: list[Training] = []
    evaluations: list[Evaluation] = []
    answers: dict[str, Json] = {}
    probe: Json | None = None
    recipe: str = ""
    versions: dict[str, str] = {}
    machine: Json = {}
    notices: list[Notice] = []


def collect(folder: Path, artefacts: Mapping[str, Path]) -> ReportFacts:
    """The facts of a run: `run.json` and `recipe.yaml` in its folder, and the artefact of each stage by name."""
    record = read_json(folder / "run.json") if (folder / "run.json").exists() else {}
    recipe = folder / "recipe.yaml"
    stages = list(collect_stages(record, artefacts))
    return ReportFacts(
        name=record.get("name", folder.name), description=(record.get("recipe") or {}).get("description") or "",
        started=str(record.get("started", "")), stages=stages, corpus=collect_json(artefacts, "corpus", "report.json"),
        expectations=collect_json(artefacts, "expect", "expectations.json"),
        tokens=collect_json(artefacts, "tokens", "index.json"),
        pairs={name: facts for name in ("instruct", "preferences")
               if (facts := collect_json(artefacts, name, "report.json"))},
        training=list(collect_training(artefacts)), evaluations=list(collect_evaluations(artefacts)),
        answers={stage: facts for stage in artefacts if (facts := collect_json(artefacts, stage, "answers.json"))},
        probe=collect_json(artefacts, "probe", "logs/probe.json"),
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "", versions=record.get("versions", {}),
        machine=machine.facts().describe(), notices=list(collect_notices(stages)),
    )  # fmt: skip


def collect_json(artefacts: Mapping[str, Path], stage: str, name: str) -> Json | None:
    """A JSON file of a stage's artefact, or None where there is no such stage or file."""
    path = artefacts[stage] / name if stage in artefacts else None
    return read_json(path) if path is not None and path.exists() else None


def collect_stages(record: Json, artefacts: Mapping[str, Path]) -> Iterator[Stage]:
    """The stages of `run.json`; their inputs by stage name, which each artefact's own record knows by key."""
    names = {entry["key"]: entry["stage"] for entry in record.get("stages", [])}
    for entry in record.get("stages", []):
        known = {key: entry[key] for key in Stage.model_fields if entry.get(key) is not None}
        inputs = {role: names.get(key, key) for role, key in (entry.get("inputs") or {}).items()}
        yield Stage(**known | {"inputs": inputs})


def collect_training(artefacts: Mapping[str, Path]) -> Iterator[Training]:
    """Every artefact with a training log, in the order of the stages."""
    for stage, path in artefacts.items():
        log = path / "logs" / "metrics.jsonl"
        if not log.exists():
            continue
        found = Training(stage=stage, summary=collect_json(artefacts, stage, "logs/summary.json") or {})
        for line in log.read_text(encoding="utf-8").splitlines():
            record = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
            if record.get("event") == "train":
                found.steps.append(record)
            elif record.get("event") == "evaluate":
                found.validations.append(record)
            elif record.get("event") == "note":
                found.notes.append(str(record.get("text", "")))
        yield found


def collect_evaluations(artefacts: Mapping[str, Path]) -> Iterator[Evaluation]:
    """Every artefact with scores, in the order of the stages."""
    for stage, path in artefacts.items():
        scores = collect_json(artefacts, stage, "scores.json")
        if scores is None:
            continue
        samples: list[Json] = []
        if (path / "samples.parquet").exists():
            import pyarrow.parquet as pq

            samples = pq.read_table(path / "samples.parquet").to_pylist()
        timing = collect_json(artefacts, stage, "logs/timing.json") or {}
        words = collect_json(artefacts, stage, "words.json") or {}
        yield Evaluation(stage=stage, scores=scores, words=words, samples=samples, timing=timing)


def collect_notices(stages: list[Stage]) -> Iterator[Notice]:
    """What this machine lacks, and which stages would not give the same bytes again."""
    for check in doctor.diagnose(network=False):
        if check.state != "ok" and not check.name.startswith(NOT_IN_REPORT):
            yield Notice(what=f"{check.name}: {check.what}", why=check.why, do=check.do)
    for stage in stages:
        if isinstance(stage.reproducible, str) and stage.reproducible:
            yield Notice(what=f"{stage.stage} does not give the same bytes again", why=stage.reproducible)
