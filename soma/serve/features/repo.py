"""A feature repository: Feast's files in a folder, applied, read, joined and written to the online store."""

import json
import runpy
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from soma.base.errors import UserError
from soma.serve.features import environment

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    raise UserError("the feature store needs pyarrow: pip install 'somacube[data]'") from error

from soma.serve.features.join import View, join, known_as, latest

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

SETTINGS = "feature_store.yaml"


@dataclass(frozen=True)
class Source:
    """A view and where its rows are. path: a Parquet file or folder of them; None for what is none."""

    view: View
    path: Path | None
    online: bool


def init(folder: Path, online: str = "sqlite") -> None:
    """Make a repository with the example of answers that change, and Feast's environment if it is not there.

    online: sqlite, or redis://HOST:PORT/DB. Raises UserError: the folder has one already; no such store.
    """
    if (folder / SETTINGS).exists():
        raise UserError(f"{folder / SETTINGS}: is there already")
    store = online_store(online)
    environment.python()
    folder.mkdir(parents=True, exist_ok=True)
    starter: Traversable = files("soma.serve.features").joinpath("starter")
    for file in starter.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    settings = {
        "project": "answers", "provider": "local", "registry": "data/registry.db", "online_store": store,
        "offline_store": {"type": "file"}, "entity_key_serialization_version": 3,
    }  # fmt: skip
    (folder / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False))
    runpy.run_path(str(folder / "make_data.py"), run_name="__main__")


def online_store(online: str) -> dict[str, Any]:
    """Feast's block `online_store`. Raises UserError."""
    if online == "sqlite":
        return {"type": "sqlite", "path": "data/online.db"}
    parts = urlsplit(online)
    if parts.scheme != "redis" or not parts.hostname:
        raise UserError("online: expected sqlite or redis://HOST:PORT/DB")
    if parts.password or parts.username:
        raise UserError(f"online: no password here; write password=${{VARIABLE}} into connection_string of {SETTINGS}")
    place = f"{parts.hostname}:{parts.port or 6379}"
    more = [f"db={parts.path.strip('/')}"] if parts.path.strip("/") else []
    # Feast's own write leaves a row alone whose event_time it has already: a correction of it would be lost.
    return {"type": "redis", "connection_string": ",".join([place, *more]), "skip_dedup": True}


def checked(folder: Path) -> Path:
    """The folder. Raises UserError if it is no repository."""
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: there is no {SETTINGS}; `soma features init {folder}` makes a repository")
    return folder


def ask_feast(command: str, folder: Path, *more: str) -> str:
    """What the program in Feast's environment says. Raises UserError with its last words."""
    call = [*environment.program(), command, str(folder), *more]
    done = subprocess.run(
        call, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment.variables()
    )
    if done.returncode:
        words = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise UserError(f"feast {command}: {' '.join(words[-3:])[-800:] or 'no reason given'}")
    return done.stdout


def apply(folder: Path) -> list[str]:
    """Register what the repository's Python files define; the names of all views. Raises UserError."""
    ask_feast("apply", checked(folder))
    return [source.view.name for source in sources(folder)]


def sources(folder: Path) -> list[Source]:
    """The registered views. Raises UserError for one that a join cannot read."""
    found = []
    for each in json.loads(ask_feast("describe", checked(folder))):
        if each["mapped"] or not each["keys"]:
            what = "field_mapping" if each["mapped"] else "a view without entities"
            raise UserError(f"view {each['name']}: {what} is not supported; rename the columns, name an entity")
        view = View(each["name"], tuple(each["keys"]), tuple(each["features"]), each["event_time"],
                    each["created_time"], each["ttl"])  # fmt: skip
        found.append(Source(view, folder / each["path"] if each["path"] else None, each["online"]))
    return found


def read(source: Source) -> pa.Table:
    """The rows of a view. Raises UserError."""
    if source.path is None or not source.path.exists():
        raise UserError(f"view {source.view.name}: {source.path or 'its source'} is no Parquet file that is here")
    try:
        table = pq.read_table(source.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{source.path}: {error}") from None
    if lacking := [name for name in source.view.columns if name not in table.column_names]:
        raise UserError(f"{source.path}: there is no column {lacking[0]}, which view {source.view.name} has")
    return table


def materialize(folder: Path, at: float | None = None, views: Sequence[str] = ()) -> dict[str, int]:
    """Write into the online store what a question at that time would get, all of it anew; rows by view.

    at: seconds since 1970; now, if it is left out. A correction that came late replaces what was there, which Feast's
    own incremental materialization does not see. Raises UserError.
    """
    at_ns = int((time.time() if at is None else at) * 1e9)
    known = [source for source in sources(folder) if source.online]
    if strange := set(views) - {source.view.name for source in known}:
        raise UserError(f"{sorted(strange)[0]}: there is no such view that goes online")
    made = {}
    with tempfile.TemporaryDirectory() as temporary:
        for source in known:
            if views and source.view.name not in views:
                continue
            rows = latest(read(source), source.view, at_ns)
            pq.write_table(rows, Path(temporary) / f"{source.view.name}.parquet")
            made[source.view.name] = rows.num_rows
        ask_feast("write", folder, temporary)
    return made


def historical(
    folder: Path, features: Sequence[str], questions: pa.Table, at: str = "event_timestamp", *, full_names: bool = False
) -> pa.Table:
    """`questions` with features (VIEW:FEATURE) as they were known at the time in column `at`. Raises UserError."""
    known = {source.view.name: source for source in sources(folder)}
    wanted: dict[str, list[str]] = {}
    for reference in features:
        view, feature = known_as([source.view for source in known.values()], reference)
        wanted.setdefault(view.name, []).append(feature)
    for name, chosen in wanted.items():
        source = known[name]
        view = View(name, source.view.keys, tuple(chosen), source.view.event_time, source.view.created_time,
                    source.view.ttl)  # fmt: skip
        questions = join(questions, read(source), view, at, prefix=full_names)
    return questions


def historical_file(
    folder: Path, features: Sequence[str], entities: Path, out: Path, at: str = "event_timestamp", *,
    full_names: bool = False,
) -> int:  # fmt: skip
    """`historical` from a Parquet file into another; the number of rows. `out` appears whole or not at all."""
    if not entities.is_file():
        raise UserError(f"{entities}: no such file")
    try:
        questions = pq.read_table(entities)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{entities}: {error}") from None
    made = historical(folder, features, questions, at, full_names=full_names)
    unfinished = out.with_name(out.name + ".partial")
    pq.write_table(made, unfinished)
    shutil.move(unfinished, out)
    return int(made.num_rows)
