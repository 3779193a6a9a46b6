"""The model registry: MLflow's, in SQLite by default or on a server. `registry:NAME@VERSION` names a model in it.

A version's source is the absolute path of the model's folder; its tags hold the hash of the folder's content and the
keys of the artefacts that it came from. `resolve` checks the hash, so what is served is what was registered.
"""

import difflib
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from soma.base.artefact import content_hash
from soma.base.disk import full
from soma.base.errors import UserError
from soma.base.locks import is_alive
from soma.base.runs import pin, unpin
from soma.base.secrets import redact_url, scrub

HASH_TAG = "soma.content_hash"
LINEAGE_TAG = "soma.lineage."
QUIET = {  # no telemetry, and no minutes of retries where the server is away
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
NAME = re.compile(r"(?P<name>[\w. -]+)(?:@(?P<version>\d+|latest))?")


def default_uri(runs: Path | None = None) -> str:
    """Where the registry is: SOMA_REGISTRY, MLFLOW_TRACKING_URI, or `mlflow.db` in the runs folder."""
    folder = runs or Path(os.environ.get("SOMA_RUNS") or "runs")
    return (
        os.environ.get("SOMA_REGISTRY")
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{(folder / 'mlflow.db').absolute()}"
    )


def mlflow_client(uri: str) -> Any:
    """An `mlflow.MlflowClient` for the tracking and registry server at `uri`, quiet and without telemetry.

    A database that is not there is made. Raises UserError where MLflow is not installed, and for a database that cannot
    be used.
    """
    for setting, value in QUIET.items():
        os.environ.setdefault(setting, value)
    try:
        import mlflow
    except ImportError:
        raise UserError("tracking and registry need MLflow: pip install somacube[train]") from None
    for name in ("mlflow", "alembic"):  # their errors come as exceptions too, and a log line would add a traceback
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not uri.startswith("sqlite:///"):
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    path = Path(uri.removeprefix("sqlite:///"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _make_database(path)
        with closing(sqlite3.connect(path)) as database:
            database.execute("select count(*) from sqlite_master")  # MLflow would try to open it for hours
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
        reason = "the disk is full" if full(error) else str(getattr(error, "orig", None) or error).splitlines()[0]
        raise UserError(
            f"{path}: MLflow's database cannot be used ({reason}). Make it writable and free some space; if it is "
            "broken, move it away: it is made anew, without what was registered in it"
        ) from None


def _make_database(path: Path) -> None:
    """MLflow's empty tables, under another name first: it makes them in some fifty steps that take seconds, and what a
    full disk or kill -9 leaves of them it can neither use nor finish."""
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    for old in path.parent.glob(f".{path.name}.*.tmp*"):
        if not is_alive(int(old.name.removeprefix(f".{path.name}.").split(".")[0])):
            old.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    engine = create_sqlalchemy_engine(f"sqlite:///{temporary}")
    try:
        _initialize_tables(engine)
        engine.dispose()
        with suppress(FileExistsError):  # another process was quicker
            os.link(temporary, path)
    finally:
        engine.dispose()
        temporary.unlink(missing_ok=True)


@contextmanager
def _answering(uri: str) -> Iterator[Any]:
    """The client; what goes wrong on the way to the server becomes an error that says so."""
    client = mlflow_client(uri)
    from mlflow.exceptions import MlflowException

    try:
        yield client
    except MlflowException as error:
        raise UserError(f"registry {redact_url(uri)}: {scrub(str(error), uri).splitlines()[0]}") from None


def _parse(ref: str) -> tuple[str, str]:
    match = NAME.fullmatch(ref)
    if match is None:
        raise UserError(f"registry:{ref}: expected registry:NAME, registry:NAME@VERSION or registry:NAME@latest")
    return match["name"], match["version"] or "latest"


def register_model(uri: str, name: str, model_dir: Path, lineage: Mapping[str, str], run_id: str | None = None) -> int:
    """Register a model's folder under `name`; the version that it got.

    lineage: stage → artefact key, kept as tags. A folder whose content is that of the newest version is not registered
    again. An artefact of the runs folder is pinned, so that no prune takes it while it is registered.
    """
    if _parse(name) != (name, "latest"):
        raise UserError(f"registry: {name!r} is not a name; use letters, digits, spaces and ._-")
    source = str(model_dir.resolve())
    digest = content_hash(model_dir)
    with _answering(uri) as client:
        versions = _versions(client, name)
        if versions and versions[-1].tags.get(HASH_TAG) == digest and versions[-1].source == source:
            return int(versions[-1].version)
        if not versions:
            _create_name(client, name)
        tags = {HASH_TAG: digest} | {LINEAGE_TAG + stage: key for stage, key in lineage.items()}
        version = int(client.create_model_version(name, source, run_id=run_id, tags=tags).version)
    if place := _store_entry(Path(source)):
        pin(*place, f"{name}@{version}")
    return version


def _create_name(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(client: Any, name: str) -> list[Any]:
    """All versions of a model, oldest first."""
    return sorted(client.search_model_versions(f"name='{name}'"), key=lambda version: int(version.version))


def _store_entry(path: Path) -> tuple[Path, str] | None:
    """The runs folder and artefact name of a path in an artefact store (RUNS/store/ENTRY/…)."""
    for folder in [path, *path.parents]:
        if folder.parent.name == "store" and (folder / "run.json").is_file():
            return folder.parent.parent, folder.name
    return None


def resolve(ref: str, uri: str | None = None) -> Path:
    """The folder of a registered model: `NAME@3`, `NAME@latest` or `NAME` (the newest version).

    Raises UserError where there is no such name, version or folder, or where the folder's content has changed.
    """
    name, wanted = _parse(ref)
    uri = uri or default_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UserError(
            f"registry:{ref}: there is no registry at {uri}. Run this where your runs folder is; or, if the "
            "model was made with `--runs DIR`, set SOMA_RUNS=DIR; if with `tracking.uri`, set SOMA_REGISTRY to the "
            "same address (sqlite:////path/to/mlflow.db, or an MLflow server)"
        )
    with _answering(uri) as client:
        versions = _versions(client, name)
        if not versions:
            names = [model.name for model in client.search_registered_models(max_results=1000)]
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"registered are: {', '.join(names) or 'none'}"
            raise UserError(f"registry:{ref}: no model {name!r} in {redact_url(uri)}; {hint}")
    found = {str(version.version): version for version in versions}
    version = versions[-1] if wanted == "latest" else found.get(wanted)
    if version is None:
        raise UserError(f"registry:{ref}: {name!r} has no version {wanted}; it has {', '.join(found)}")
    return _checked(f"registry:{name}@{version.version}", version)


def _checked(label: str, version: Any) -> Path:
    folder = Path(version.source)
    if not folder.is_dir():
        raise UserError(f"{label}: its folder {folder} is not on this machine, or was removed; register it again")
    digest = version.tags.get(HASH_TAG)
    if digest and content_hash(folder) != digest:
        raise UserError(f"{label}: the content of {folder} is not what was registered; register it as a new version")
    return folder


def unregister(ref: str, uri: str | None = None) -> None:
    """Take one version (`NAME@3`) out of the registry; its artefact may be pruned after that."""
    name, wanted = _parse(ref)
    if wanted == "latest":
        raise UserError(f"registry:{ref}: say which version to remove, as NAME@VERSION")
    uri = uri or default_uri()
    with _answering(uri) as client:
        version = client.get_model_version(name, wanted)
        client.delete_model_version(name, wanted)
    if place := _store_entry(Path(version.source)):
        unpin(*place, f"{name}@{wanted}")
