"""The runs folder: what is in it, how two runs differ, what may go.

    runs/store/<stage>-<key16>/        finished artefacts, run.json in each
    runs/store/.work/<stage>-<key16>/  unfinished work, which the next run of the same stage takes up
    runs/store/.locks/, .pins/, .trash/
    runs/<name>/                       one folder per named run: run.json, history.jsonl, report.html

Who makes or reads an artefact holds its lock (`hold`), and who executes a run holds the lock of the run's name; the
kernel drops a dead process's locks, so a lock never lies. A removal renames into `.trash` first: a prune that is killed
halfway leaves either the whole artefact or none of it under its name.
"""

import difflib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soma.base import progress
from soma.base.artefact import directory_bytes, read_json
from soma.base.errors import UserError
from soma.base.locks import Busy, Lock, is_alive, lock
from soma.base.units import human_bytes, parse_bytes

QUOTA_VARIABLE = "SOMA_RUNS_QUOTA"
STALE_WORK_SECONDS = 24 * 3600.0  # unfinished work older than this will hardly be taken up again
TEMPORARY = re.compile(r"^\..+\.(?:tmp|old)-(\d+)$")  # what artefact.building leaves when it is killed
TRASH = re.compile(r"^.+-(\d+)-\d+$")  # name-pid-time


@dataclass(frozen=True)
class Run:
    """One named run as its run.json tells it."""

    name: str
    path: Path
    status: str
    started: str
    finished: str | None
    stages: list[dict[str, Any]]
    metrics: dict[str, Any]
    recipe: dict[str, Any]
    bytes: int  # of the artefacts it refers to, together with its own folder

    @property
    def entries(self) -> list[str]:
        """Names of its artefacts in the store."""
        return [entry_name(stage["stage"], stage["key"]) for stage in self.stages]

    @property
    def seconds(self) -> float:
        """Seconds its stages took; what came from the cache counts nothing."""
        return float(sum(stage.get("seconds") or 0.0 for stage in self.stages if not stage.get("cached")))


@dataclass(frozen=True)
class Difference:
    """One key that differs; a side that lacks it has None and `missing` names that side."""

    key: str
    a: Any
    b: Any
    missing: str = ""


@dataclass(frozen=True)
class StageDifference:
    """A stage of two runs: the same key means the same work was asked for, the same content that the same came out."""

    stage: str
    key_a: str | None
    key_b: str | None
    same_content: bool | None  # None: one side has no such artefact any more, or never had
    config: list[Difference]
    seconds_a: float | None
    seconds_b: float | None


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` found."""

    a: str
    b: str
    recipe: list[Difference]
    metrics: dict[str, tuple[Any, Any]]
    stages: list[StageDifference]


@dataclass(frozen=True)
class Removal:
    """Something that was removed (or would be, in a dry run)."""

    path: Path
    bytes: int
    why: str


@dataclass
class Pruned:
    """What a prune did."""

    removed: list[Removal] = field(default_factory=list)
    kept: list[tuple[Path, str]] = field(default_factory=list)  # would have gone, but is in use: path and reason

    @property
    def bytes(self) -> int:
        """Bytes freed."""
        return sum(removal.bytes for removal in self.removed)


def entry_name(stage: str, key: str) -> str:
    """The store's folder name of a stage's artefact."""
    return f"{stage}-{key[:16]}"


def hold(runs: Path, entry: str, *, shared: bool = False, wait: bool = True) -> AbstractContextManager[Lock]:
    """Hold an artefact (and its unfinished work) so that no prune takes it and no second process makes it too.

    Exclusive while it is made (`.share()` once it is whole), shared while it is read.
    """
    return lock(runs / "store" / ".locks" / f"{entry}.lock", shared=shared, wait=wait)


def list_runs(runs: Path) -> list[Run]:
    """All named runs, newest first. A run.json that cannot be read is noted and left out."""
    found = []
    sizes: dict[Path, int] = {}
    for path in sorted(runs.glob("*/run.json")):
        try:
            found.append(_load(runs, path.parent, sizes))
        except UserError as error:
            progress.current().note(f"left out: {error}")
    return sorted(found, key=lambda run: (run.started, run.name), reverse=True)


def read_run(runs: Path, name: str) -> Run:
    """One named run; an unknown name is answered with the nearest one."""
    if not (runs / name / "run.json").is_file() or Path(name).name != name:
        names = [path.parent.name for path in runs.glob("*/run.json")]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f"; runs here: {', '.join(sorted(names)) or 'none'}"
        raise UserError(f"{runs}: no run named {name!r}{hint}")
    return _load(runs, runs / name, {})


def _load(runs: Path, path: Path, sizes: dict[Path, int]) -> Run:
    record = read_json(path / "run.json")
    try:
        stages = [stage for stage in record["stages"] if stage.get("key")]
        folders = {runs / "store" / entry_name(stage["stage"], stage["key"]) for stage in stages} | {path}
        for folder in folders - sizes.keys():
            sizes[folder] = directory_bytes(folder) if folder.is_dir() else 0
        return Run(
            name=path.name,
            path=path,
            status=str(record["status"]),
            started=str(record["started"]),
            finished=record.get("finished"),
            stages=stages,
            metrics=record.get("metrics") or {},
            recipe=record.get("recipe") or {},
            bytes=sum(sizes[folder] for folder in folders),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / 'run.json'}: not the record of a run ({type(error).__name__}: {error})") from None


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`; lists stay whole."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Dotted keys whose values differ, in order."""
    flat_a, flat_b = (flatten(side) if side else {} for side in (a, b))
    found = []
    for key in sorted(flat_a.keys() | flat_b.keys()):
        missing = "a" if key not in flat_a else "b" if key not in flat_b else ""
        if missing or flat_a[key] != flat_b[key]:
            found.append(Difference(key, flat_a.get(key), flat_b.get(key), missing))
    return found


def compare_runs(runs: Path, a: str, b: str) -> Comparison:
    """What differs between two named runs: recipe, metrics side by side, and which stages made something else."""
    run_a, run_b = read_run(runs, a), read_run(runs, b)
    by_stage_a, by_stage_b = ({stage["stage"]: stage for stage in run.stages} for run in (run_a, run_b))
    stages = [
        _compare_stage(runs, stage, by_stage_a.get(stage), by_stage_b.get(stage))
        for stage in dict.fromkeys([*by_stage_a, *by_stage_b])
    ]
    flat_a, flat_b = (flatten(run.metrics) if run.metrics else {} for run in (run_a, run_b))
    metrics = {key: (flat_a.get(key), flat_b.get(key)) for key in dict.fromkeys([*flat_a, *flat_b])}
    return Comparison(a, b, differences(run_a.recipe, run_b.recipe), metrics, stages)


def _compare_stage(runs: Path, stage: str, a: dict[str, Any] | None, b: dict[str, Any] | None) -> StageDifference:
    record_a, record_b = (_artefact_record(runs, side) for side in (a, b))
    hash_a, hash_b = record_a.get("content_hash"), record_b.get("content_hash")
    return StageDifference(
        stage,
        a["key"] if a else None,
        b["key"] if b else None,
        None if hash_a is None or hash_b is None else hash_a == hash_b,
        differences(record_a.get("config") or {}, record_b.get("config") or {}),
        record_a.get("seconds"),
        record_b.get("seconds"),
    )


def _artefact_record(runs: Path, stage: dict[str, Any] | None) -> dict[str, Any]:
    path = runs / "store" / entry_name(stage["stage"], stage["key"]) / "run.json" if stage else None
    return read_json(path) if path and path.is_file() else {}


def references(runs: Path, without: frozenset[str] = frozenset()) -> set[str]:
    """Names in the store that a named run (other than `without`) or a registered model refers to."""
    wanted = set(pinned(runs))
    for path in runs.glob("*/run.json"):
        if path.parent.name not in without:
            stages = read_json(path).get("stages", [])
            wanted |= {entry_name(stage["stage"], stage["key"]) for stage in stages if stage.get("key")}
    return wanted


def prune(runs: Path, keep: int | None = None, dry_run: bool = False) -> Pruned:
    """Remove artefacts that no run refers to, and stale unfinished work.

    keep: how many of the newest named runs stay; the folders of older ones go first, and with them what only they
    referred to. None keeps all of them. What is in use or registered as a model stays.
    """
    if keep is not None and keep < 0:
        raise UserError(f"keep: expected a number of runs from 0 up, got {keep}")
    result = Pruned()
    for run in list_runs(runs)[keep:] if keep is not None else []:
        _remove(runs, run.path, f"older than the newest {keep} runs", dry_run, result)
    gone = frozenset(removal.path.name for removal in result.removed)
    for path in _unreferenced(runs, gone):
        _remove(runs, path, "no run refers to it", dry_run, result, lambda name: name in references(runs, gone))
    for path, why in _stale_work(runs / "store"):
        _remove(runs, path, why, dry_run, result)
    for path in _leftovers(runs / "store"):
        result.removed.append(Removal(path, directory_bytes(path), "left over from a killed process"))
        if not dry_run:
            shutil.rmtree(path)
    return result


def _unreferenced(runs: Path, without: frozenset[str] = frozenset()) -> list[Path]:
    """Artefacts in the store that nothing refers to, oldest first."""
    wanted = references(runs, without)
    paths = [path for path in (runs / "store").glob("[!.]*") if path.is_dir() and path.name not in wanted]
    return sorted(paths, key=lambda path: path.stat().st_mtime)


def _stale_work(store: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted((store / ".work").glob("*")):
        age = time.time() - max((inner.lstat().st_mtime for inner in path.rglob("*")), default=path.stat().st_mtime)
        if (store / path.name).is_dir():
            yield path, "its artefact is finished"
        elif age > STALE_WORK_SECONDS:
            yield path, "unfinished and untouched for a day"


def _leftovers(store: Path) -> list[Path]:
    """Trash of a killed prune, and temporary folders whose maker is dead."""
    found = []
    for path in [*store.glob(".trash/*"), *store.glob(".*")]:
        match = (TRASH if path.parent.name == ".trash" else TEMPORARY).match(path.name)
        if match and not is_alive(int(match[1])):
            found.append(path)
    return found


def _remove(
    runs: Path,
    path: Path,
    why: str,
    dry_run: bool,
    result: Pruned,
    spare: Callable[[str], bool] = lambda name: False,
) -> None:
    """Rename into the trash, then delete, under the lock; what is in use is kept and said so.

    spare: asked again under the lock, since a run may have come to refer to it while others were being removed.
    """
    try:
        with hold(runs, path.name, wait=False):
            if not path.exists() or spare(path.name):
                return
            result.removed.append(Removal(path, directory_bytes(path), why))
            if dry_run:
                return
            trash = runs / "store" / ".trash" / f"{path.name}-{os.getpid()}-{time.monotonic_ns()}"
            trash.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, trash)
            shutil.rmtree(trash)
            (runs / "store" / ".locks" / f"{path.name}.lock").unlink()
    except Busy as busy:
        result.kept.append((path, str(busy)))


def pin(runs: Path, entry: str, name: str) -> None:
    """Keep an artefact from being pruned because `name` (such as `model@3` in a registry) refers to it."""
    with _pins(runs, entry) as names:
        names.add(name)


def unpin(runs: Path, entry: str, name: str) -> None:
    """`name` no longer refers to the artefact."""
    with _pins(runs, entry) as names:
        names.discard(name)


def pinned(runs: Path) -> dict[str, list[str]]:
    """Pinned artefacts and the names that pin them."""
    return {path.name: path.read_text().split("\n")[:-1] for path in (runs / "store" / ".pins").glob("[!.]*")}


@contextmanager
def _pins(runs: Path, entry: str) -> Iterator[set[str]]:
    path = runs / "store" / ".pins" / entry
    with lock(runs / "store" / ".locks" / "pins.lock"):
        names = set(path.read_text().split("\n")[:-1]) if path.is_file() else set()
        yield names
        if not names:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{entry}")
        temporary.write_text("".join(f"{name}\n" for name in sorted(names)))
        os.replace(temporary, path)


def quota_bytes() -> int | None:
    """The quota that `SOMA_RUNS_QUOTA` (such as 20GB) sets, None without one."""
    text = os.environ.get(QUOTA_VARIABLE, "").strip()
    return parse_bytes(text, QUOTA_VARIABLE) if text else None


def enforce_quota(runs: Path, quota: int | None = None) -> Pruned:
    """Bring the runs folder under its quota: what no run refers to goes, oldest first, until it fits.

    quota: bytes; None reads SOMA_RUNS_QUOTA, and without that nothing is done. Raises UserError that names the biggest
    artefacts when what remains is still too much.
    """
    quota = quota_bytes() if quota is None else quota
    result = Pruned()
    if quota is None or not runs.is_dir():
        return result
    used = directory_bytes(runs)
    for path in _unreferenced(runs) if used > quota else []:
        if used - result.bytes <= quota:
            break
        _remove(runs, path, "over the quota, unused", False, result, lambda name: name in references(runs))
    if result.removed:
        freed = human_bytes(result.bytes)
        progress.current().note(f"{runs}: over its quota, removed {len(result.removed)} unused artefacts ({freed})")
    if used - result.bytes > quota:
        folders = [path for path in [*runs.glob("*/"), *runs.glob("store/[!.]*/")] if path.name != "store"]
        sizes = sorted(((directory_bytes(path), path.name) for path in folders), reverse=True)[:3]
        biggest = ", ".join(f"{name} {human_bytes(size)}" for size, name in sizes)
        raise UserError(
            f"{runs}: {human_bytes(used - result.bytes)} in use, over the quota of {human_bytes(quota)}; the biggest: "
            f"{biggest}. Run `soma runs prune --keep N`, remove a run, or raise {QUOTA_VARIABLE}"
        )
    return result
