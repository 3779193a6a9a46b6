"""The database of keys and ledger: its schema, step by step, in SQLite and in PostgreSQL; backup."""

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from postgres import new_database

from soma.base.errors import UserError
from soma.serve import database as tables
from soma.serve.database import Database
from soma.serve.keys.store import KeyStore
from soma.serve.migrations import MIGRATIONS


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "sqlite":
        return str(tmp_path_factory.mktemp("database") / "keys.db")
    return new_database(request.getfixturevalue("postgres_url"))


def test_the_steps_end_at_the_tables(where: str) -> None:
    """From a database of the first version with a key in it."""
    full = Database.migrate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "migrate", lambda self: full(self, 1))
        old = Database(where)
    _, secret = KeyStore(old).create("alice", team="red", models=["a*"])
    assert "ledger" not in sa.inspect(old.engine).get_table_names()
    old.close()
    new = Database(where)
    (key,) = KeyStore(new).all()
    assert (key.name, key.team, key.models, key.routes, key.state) == ("alice", "red", ("a*",), None, "active")
    found = sa.inspect(new.engine)
    assert set(found.get_table_names()) == {*tables.metadata.tables, "schema_version"}
    for table in tables.metadata.tables.values():
        columns = {column["name"]: column for column in found.get_columns(table.name)}
        assert list(columns) == [column.name for column in table.columns]
        for column in table.columns:
            assert isinstance(columns[column.name]["type"], type(column.type)), column
            assert columns[column.name]["nullable"] == column.nullable or column.primary_key, column
        assert found.get_pk_constraint(table.name)["constrained_columns"] == [c.name for c in table.primary_key]
    with new.read() as connection:
        everything = str(connection.execute(sa.select(tables.secrets)).all())
    assert secret.hash in everything
    assert secret.text.split("_", 2)[2] not in everything
    new.migrate()  # once more changes nothing
    with new.read() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM schema_version")).scalar() == len(MIGRATIONS)
    new.close()


def test_a_database_from_the_future(where: str) -> None:
    ours = Database(where)
    with ours.write() as connection:
        connection.execute(sa.text("INSERT INTO schema_version (n) VALUES (99)"))
    with pytest.raises(UserError, match="version 99"):
        Database(where)
    with ours.write() as connection:
        connection.execute(sa.text("DELETE FROM schema_version WHERE n = 99"))
    ours.close()


def test_sqlite_is_durable_and_private(tmp_path: Path) -> None:
    ours = Database(str(tmp_path / "keys.db"))
    with ours.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    assert (tmp_path / "keys.db").stat().st_mode & 0o077 == 0
    ours.close()


def test_backup(tmp_path: Path) -> None:
    """A copy made while a transaction is open has what was committed, and opens by itself."""
    ours = Database(str(tmp_path / "keys.db"))
    store = KeyStore(ours)
    store.create("one")
    with ours.write() as connection:
        connection.execute(tables.teams.insert().values(name="half", created_at=0))
        ours.backup(tmp_path / "copy.db")
    with sqlite3.connect(tmp_path / "copy.db") as copy:
        assert copy.execute("SELECT name FROM keys").fetchall() == [("one",)]
        assert copy.execute("SELECT name FROM teams").fetchall() == []
    assert sorted(path.name for path in tmp_path.glob("copy*")) == ["copy.db"]
    assert (tmp_path / "copy.db").stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="is there already"):
        ours.backup(tmp_path / "copy.db")
    ours.close()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("mysql://x/y", "expected a path"),
        ("postgresql://me:hunter2@127.0.0.1:1/no", "refused"),
        ("/dev/null/keys.db", "directory|exists"),
    ],
)
def test_what_cannot_be_opened(where: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Database(where)
    assert "hunter2" not in str(caught.value)


def test_no_database_is_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Database(str(tmp_path / "keys.db"), create=False)
    assert list(tmp_path.iterdir()) == []
