"""Runs a recipe's stages, caches them by content, and records what came from what.

A stage's key is the hash of its inputs' keys, its config and its format version; its artefact is
`RUNS/store/STAGE-KEY/`. What exists is not made again. Unfinished work lies in `RUNS/store/.work/STAGE-KEY/`, where a
stage that can resume finds it after kill -9; the artefact appears by one rename, whole. `RUNS/NAME/` holds what a
person looks for: `run.json`, `report.html`, and a link to each artefact.
"""

import errno
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import soma
from soma.base import progress
from soma.base.artefact import content_hash, directory_bytes, json_hash, publish, read_json, write_json, write_text
from soma.base.disk import full
from soma.base.errors import UserError
from soma.base.machine import PeakMemory
from soma.base.runs import differences, enforce_quota, entry_name, hold
from soma.base.secrets import redact
from soma.base.units import human_bytes
from soma.evaluate.report import write_report
from soma.recipe import Recipe, to_yaml
from soma.stages.order import stages_of
from soma.stages.stage import Build, Stage
from soma.tracking import Trackers, Tracking

KEY_LENGTH = 16
VERSIONED = ("torch", "numpy", "tokenizers", "safetensors", "daft", "pyarrow")


@dataclass
class Planned:
    """A stage with its key, its place, and why it would run (empty: it is cached)."""

    stage: Stage
    identity: dict[str, Any]
    path: Path
    reasons: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Hash of everything that shapes the artefact."""
        return json_hash(self.identity)[:KEY_LENGTH]

    @property
    def cached(self) -> bool:
        return not self.reasons

    @property
    def work(self) -> Path:
        """Where the stage keeps what must survive a kill."""
        return self.path.parent / ".work" / self.path.name


@dataclass
class RunResult:
    """What a run left: folder, artefact of each stage, record as in `run.json`, the last model's folder, the report."""

    folder: Path
    artefacts: dict[str, Path]
    record: dict[str, Any]
    model: Path | None
    report: Path | None

    def headline(self) -> list[str]:
        """The run's figures in a few lines, each with what it depends on."""
        lines = []
        for name in ("evaluate", "evaluate_tuned"):
            if name not in self.artefacts:
                continue
            scores = read_json(self.artefacts[name] / "scores.json")
            others = ", ".join(f"{key} -9 {peer['bits_per_byte']:.3f}" for key, peer in scores["baselines"].items())
            basis = f"Python {scores['python']}, corpus {scores['corpus_hash'][:12]}"
            lines.append(
                f"{name}: {scores['bits_per_byte']['value']:.3f} bits per byte on {scores['bytes']:,} held-out bytes"
                + (f" ({others})" if others else "")
                + f"; {scores['parameters']:,} parameters, {basis}"
            )
        for name in ("tune_scores", "prefer_scores"):
            if name in self.artefacts:
                from soma.evaluate.tuned import headline as tuned_headline

                lines.append(f"{name}: {tuned_headline(read_json(self.artefacts[name] / 'answers.json'))}")
        stages = self.record["stages"]
        made = [entry for entry in stages if not entry["cached"]]
        seconds = sum(entry["seconds"] for entry in made)
        peak = max((entry["peak_memory_bytes"] for entry in stages), default=0)
        made_in = f"{len(made)} of {len(stages)} stages made in {progress.duration(seconds)}"
        lines.append(f"{made_in}; peak memory {human_bytes(peak)}")
        return lines


def plan(recipe: Recipe, runs: Path) -> list[Planned]:
    """The recipe's stages in order, each with its key and whether its artefact is there."""
    before = _stage_records(runs / recipe.name / "run.json")
    planned: dict[str, Planned] = {}
    for stage in stages_of(recipe):
        identity = {
            "stage": stage.name,
            "format": stage.format_version,
            "config": stage.config,
            "outside": stage.fingerprint(),
            "inputs": {role: planned[name].key for role, name in stage.inputs.items()},
        }
        item = Planned(stage, identity, runs / "store")
        item.path /= entry_name(stage.name, item.key)
        if not (item.path / "run.json").exists():
            item.reasons = _why(before.get(stage.name), item)
        planned[stage.name] = item
    return list(planned.values())


def _stage_records(run_json: Path) -> dict[str, dict[str, Any]]:
    """The `run.json` of each artefact that the last run of this name made or used."""
    if not run_json.exists():
        return {}
    records = {}
    for entry in read_json(run_json).get("stages", []):
        artefact = run_json.parent.parent / "store" / f"{entry['stage']}-{entry['key']}" / "run.json"
        if artefact.exists():
            records[entry["stage"]] = read_json(artefact)
    return records


def _why(before: dict[str, Any] | None, item: Planned) -> list[str]:
    """What makes a stage run: what differs from its artefact of the last run of this name."""
    identity = item.identity
    if item.work.exists():
        return ["it was begun and not finished; it resumes where it can"]
    if before is None:
        return ["it was never made"]
    reasons = [
        f"{item.stage.name}.{change.key}: {change.a!r} → {change.b!r}"
        for change in differences(before.get("config", {}), redact(identity["config"]))
    ]
    if before.get("outside") != identity["outside"]:
        reasons.append("the files that it reads changed")
    reasons += [
        f"its input {name!r} changed"
        for name, key in identity["inputs"].items()
        if before.get("inputs", {}).get(name) != key
    ]
    if before.get("format") != identity["format"]:
        reasons.append(f"its format is version {identity['format']} now (was {before.get('format')})")
    return reasons or ["its artefact was removed"]


def select(planned: Sequence[Planned], first: str | None, last: str | None) -> list[Planned]:
    """The stages from `first` to `last`, both included. Raises UserError for a name that is not there."""
    names = [item.stage.name for item in planned]
    for option, name in (("--from", first), ("--to", last)):
        if name is not None and name not in names:
            raise UserError(f"{option} {name}: no such stage in this recipe; there are {', '.join(names)}")
    start = names.index(first) if first else 0
    end = names.index(last) + 1 if last else len(names)
    if start >= end:
        raise UserError(f"--from {first} comes after --to {last}; the order is {', '.join(names)}")
    missing = [item.stage.name for item in planned[:start] if not item.cached]
    if missing:
        raise UserError(f"--from {first} needs {', '.join(missing)}, which is not there yet; leave out --from")
    return list(planned[start:end])


def run(
    recipe: Recipe, runs: Path, *, first: str | None = None, last: str | None = None, force: bool = False
) -> RunResult:
    """Run the recipe's stages that are not cached (with `force`, all that are selected) and write the report.

    Raises UserError for mistakes in the recipe or its inputs; a failed stage leaves its inputs, its last whole artefact
    and its own unfinished work as they were.
    """
    planned = plan(recipe, runs)
    chosen = select(planned, first, last)
    for item in chosen:
        if force or not item.cached:
            item.stage.check()
    folder = runs / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", to_yaml(recipe))
    record: dict[str, Any] = {
        "name": recipe.name,
        "recipe": redact(recipe.model_dump(mode="json", exclude_unset=True)),
        "status": "running",
        "started": now(),
        "pid": os.getpid(),
        "stages": [],
        "metrics": {},
        "versions": versions(),
    }
    session = _Session(recipe, runs, record)
    try:
        for item in planned[: planned.index(chosen[-1]) + 1]:
            session.step(item, force=force and item in chosen)
        record["status"] = "finished"
    except BaseException as error:
        record["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        record["error"] = str(error) or type(error).__name__
        raise
    finally:
        session.close()
    return RunResult(folder, session.artefacts, record, session.link_to_model(), session.report)


class _Session:
    """One execution of a recipe: makes stages in turn and keeps the record on disk up to date."""

    def __init__(self, recipe: Recipe, runs: Path, record: dict[str, Any]) -> None:
        self.recipe, self.runs, self.record = recipe, runs, record
        self.folder = runs / recipe.name
        self.artefacts: dict[str, Path] = {}
        self.report: Path | None = None
        self.held = ExitStack()
        self.held.enter_context(hold(runs, recipe.name))
        self.tracking = Tracking(recipe, runs)

    def step(self, item: Planned, *, force: bool) -> None:
        """Make one stage, or use its artefact; either way it is held until the run ends, so that no prune takes it."""
        name = item.stage.name
        lock = self.held.enter_context(hold(self.runs, item.path.name))
        cached = (item.path / "run.json").exists() and not force
        entry: dict[str, Any] = {"stage": name, "key": item.key, "cached": cached}
        progress.current().event("stage", **entry)
        if cached:
            progress.current().note(f"{name}: cached ({item.path.name})")
        else:
            progress.current().note(f"{name}: {'; '.join(item.reasons) or 'asked for with --force'}")
            make(item, self.artefacts, self.runs, self.tracking)
        lock.share()
        self.artefacts[name] = item.path
        made = read_json(item.path / "run.json")
        entry |= {
            key: made[key]
            for key in ("seconds", "peak_memory_bytes", "bytes", "content_hash", "reproducible", "inputs")
        }
        self.record["stages"].append(entry)
        figures = item.stage.metrics(item.path)
        self.record["metrics"] |= figures
        if not cached:
            self.tracking.record(figures)
        self._link(name, item.path)
        write_json(self.folder / "run.json", self.record)
        progress.current().event("stage_end", **entry)

    def _link(self, name: str, artefact: Path) -> None:
        """`RUNS/NAME/STAGE` points at the artefact in use."""
        link, temporary = self.folder / name, self.folder / f".{name}.{os.getpid()}"
        temporary.symlink_to(os.path.relpath(artefact, self.folder), target_is_directory=True)
        os.replace(temporary, link)

    def link_to_model(self) -> Path | None:
        """The model's folder by the run's own link to it, the path that a person types."""
        made = [self.folder / name / "model" for name, path in self.artefacts.items() if (path / "model").is_dir()]
        return made[-1] if made else None

    def close(self) -> None:
        """Write down how it ended: the report, the model in the registry, the record."""
        self.record["finished"] = now()
        if self.record["status"] == "finished":
            write_json(self.folder / "run.json", self.record)
            self.report = write_report(self.folder, self.artefacts)
        lineage = {entry["stage"]: entry["key"] for entry in self.record["stages"]}
        registered = self.tracking.finish(self.record["status"], self.link_to_model(), lineage, self.report)
        if registered:
            self.record["registered"] = registered
        self.held.close()
        write_json(self.folder / "run.json", self.record)
        with open(self.folder / "history.jsonl", "a", encoding="utf-8") as history:
            history.write(json.dumps(self.record, default=str) + "\n")


def build_until(
    recipe: Recipe, runs: Path, is_enough: Callable[[dict[str, float]], bool], tracking: Trackers
) -> dict[str, float]:  # fmt: skip
    """Make a recipe's stages in order until their figures are enough; the figures. No named run is written."""
    figures: dict[str, float] = {}
    with ExitStack() as held:
        artefacts: dict[str, Path] = {}
        for item in plan(recipe, runs):
            lock = held.enter_context(hold(runs, item.path.name))
            if not (item.path / "run.json").exists():
                make(item, artefacts, runs, tracking)
            lock.share()
            artefacts[item.stage.name] = item.path
            figures |= item.stage.metrics(item.path)
            if is_enough(figures):
                break
    return figures


def make(item: Planned, artefacts: Mapping[str, Path], runs: Path, tracking: Trackers) -> None:
    """Make a stage's artefact from those of the stages before it. The caller holds its lock.

    Raises UserError where its inputs are at fault, and OSError with the folder where the disk is full.
    """
    enforce_quota(runs)
    inputs = {role: artefacts[upstream] for role, upstream in item.stage.inputs.items()}
    try:
        _build(item, inputs, tracking)
    except UserError as error:
        raise _blamed(error, inputs) from None
    except Exception as error:
        if (said := full(error)) is None or getattr(said, "filename", None):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(item.work)) from error


def _blamed(error: UserError, inputs: Mapping[str, Path]) -> UserError:
    """The error of a stage, with what to do where one of its inputs is not what it was when it was made."""
    for path in inputs.values():
        if content_hash(path) != read_json(path / "run.json")["content_hash"]:
            return UserError(f"{error}\n{path} was changed after it was made: remove that folder and run this again")
    return error


def _build(item: Planned, inputs: Mapping[str, Path], tracking: Trackers) -> None:
    """Fill the stage's work folder, then publish it by one rename."""
    stage = item.stage
    out = item.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started, clock = now(), time.monotonic()
    with PeakMemory() as memory:
        reproducible = stage.build(Build(out, item.work / "state", inputs, tracking)) or True
    record = {
        **redact(item.identity),
        "key": item.key,
        "content_hash": content_hash(out),
        "versions": versions(),
        "started": started,
        "seconds": round(time.monotonic() - clock, 3),
        "peak_memory_bytes": memory.bytes,
        "bytes": directory_bytes(out),
        "reproducible": reproducible,
    }
    write_json(out / "run.json", record)
    publish(out, item.path)
    shutil.rmtree(item.work, ignore_errors=True)


def now() -> str:
    """UTC time to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions that can change an artefact's bytes."""
    found = {"soma": soma.__version__, "python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
