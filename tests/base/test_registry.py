"""The model registry: what is registered is what `registry:` resolves to, and MLflow's own client reads it."""

import builtins
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from soma.base.artefact import content_hash
from soma.base.errors import UserError
from soma.base.fetch import fetch
from soma.base.registry import default_uri, mlflow_client, register_model, resolve, unregister
from soma.base.runs import pinned, prune
from tests.mlflow_db import empty_database


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("SOMA_REGISTRY", empty_database(tmp_path / "runs" / "mlflow.db"))
    return tmp_path / "runs"


def model(runs: Path, name: str, weights: bytes = b"weights") -> Path:
    artefact = runs / "store" / f"train-{name}"
    (artefact / "model").mkdir(parents=True)
    (artefact / "run.json").write_text("{}")
    (artefact / "model" / "model.safetensors").write_bytes(weights)
    return artefact / "model"


def test_register_and_resolve(runs: Path) -> None:
    one, two = model(runs, "1"), model(runs, "2", b"other")
    assert register_model(default_uri(), "quickstart", one, {"corpus": "abc", "train": "def"}) == 1
    assert register_model(default_uri(), "quickstart", two, {}) == 2
    assert resolve("quickstart@1") == one
    assert resolve("quickstart") == resolve("quickstart@latest") == two
    assert fetch("registry:quickstart@1") == one


def test_mlflows_own_client_reads_it(runs: Path) -> None:
    folder = model(runs, "1")
    register_model(default_uri(), "quickstart", folder, {"corpus": "abc"})
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=default_uri(), registry_uri=default_uri())
    version = client.get_model_version("quickstart", "1")
    assert version.source == str(folder)
    assert version.tags == {"soma.content_hash": content_hash(folder), "soma.lineage.corpus": "abc"}


def test_the_same_model_is_not_registered_twice(runs: Path) -> None:
    folder = model(runs, "1")
    assert [register_model(default_uri(), "quickstart", folder, {}) for _ in range(3)] == [1, 1, 1]
    (folder / "model.safetensors").write_bytes(b"changed")
    assert register_model(default_uri(), "quickstart", folder, {}) == 2


def test_a_changed_or_removed_model_is_refused(runs: Path) -> None:
    folder = model(runs, "1")
    register_model(default_uri(), "quickstart", folder, {})
    (folder / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(UserError, match=r"registry:quickstart@1: the content of .* is not what was registered"):
        resolve("quickstart")
    (folder / "model.safetensors").unlink()
    folder.rmdir()
    with pytest.raises(UserError, match="is not on this machine, or was removed"):
        resolve("quickstart@1")


def test_mistakes_are_named(runs: Path) -> None:
    with pytest.raises(UserError, match=r"there is no registry at .*SOMA_REGISTRY"):
        resolve("quickstart", f"sqlite:///{runs}/none.db")
    assert not (runs / "none.db").exists(), "asking makes no registry"
    register_model(default_uri(), "quickstart", model(runs, "1"), {})
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        resolve("quikstart")
    with pytest.raises(UserError, match="has no version 7; it has 1"):
        resolve("quickstart@7")
    for bad in ("", "a@", "a@b", "a/b", "a:b", "it's"):
        with pytest.raises(UserError, match="expected registry:NAME"):
            resolve(bad)
    with pytest.raises(UserError):
        register_model(default_uri(), "a@1", model(runs, "2"), {})


def test_a_server_that_is_away_is_an_error_without_its_password() -> None:
    with pytest.raises(UserError, match=r"registry http://127\.0\.0\.1:9") as raised:
        resolve("quickstart", "http://bob:hunter22@127.0.0.1:9")
    assert "hunter22" not in str(raised.value)


def test_registered_models_are_not_pruned(runs: Path) -> None:
    folder = model(runs, "1")
    register_model(default_uri(), "quickstart", folder, {})
    assert pinned(runs) == {"train-1": ["quickstart@1"]}
    assert prune(runs).removed == []
    unregister("quickstart@1")
    assert pinned(runs) == {}
    with pytest.raises(UserError, match="no model 'quickstart'"):
        resolve("quickstart")
    assert [removal.path for removal in prune(runs).removed] == [folder.parent]
    with pytest.raises(UserError, match="say which version"):
        unregister("quickstart")


def test_where_the_registry_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SOMA_REGISTRY", "MLFLOW_TRACKING_URI", "SOMA_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert default_uri() == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("SOMA_RUNS", "elsewhere")
    assert default_uri() == f"sqlite:///{tmp_path}/elsewhere/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert default_uri() == "http://tracking:5000"
    monkeypatch.setenv("SOMA_REGISTRY", "http://registry:5000")
    assert default_uri(tmp_path) == "http://registry:5000"


def test_without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "mlflow":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install somacube\[train\]"):
        mlflow_client("sqlite:///x.db")


def test_mlflow_is_quiet(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from soma.base.registry import register_model; "
        f"print(register_model('sqlite:///{tmp_path}/m.db', 'm', Path({str(tmp_path)!r}), {{}}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("1\n", "")


def test_a_database_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables are made in fifty steps: what is left of a process that ends among them is no database."""
    from mlflow.store.db import utils
    from sqlalchemy.exc import OperationalError

    path = tmp_path / "mlflow.db"

    def breaks(engine: Any) -> None:
        utils.InitialBase.metadata.create_all(engine)
        raise OperationalError("alter table", {}, sqlite3.OperationalError("database or disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", breaks)
        with pytest.raises(UserError, match=r"mlflow.db: .*the disk is full"):
            mlflow_client(f"sqlite:///{path}")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".mlflow.db.4194999.tmp-journal").touch()  # of a process that is no more: no number is so high
    assert mlflow_client(f"sqlite:///{path}").search_experiments(max_results=1)
    assert [one.name for one in tmp_path.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize("content", ["no database", "torn"])
def test_a_database_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mlflow.db"
    if content == "torn":
        with closing(sqlite3.connect(path)) as database:
            database.execute("create table experiments (experiment_id integer)")
    else:
        path.write_text("This is a text. " * 100)
    with pytest.raises(UserError, match=r"mlflow\.db: MLflow's database cannot be used.*move it away"):
        mlflow_client(f"sqlite:///{path}")
