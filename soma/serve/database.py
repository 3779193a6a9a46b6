"""The gateway's one database: keys, teams, budgets and the ledger, in SQLite (a path) or PostgreSQL (a URL).

SQLite runs in WAL mode with synchronous=FULL: a commit that has returned is on the disk. Times are milliseconds since
1970 in UTC, money is in billionths of the price file's currency, both as integers.
"""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from soma.base.errors import UserError
from soma.base.secrets import redact_url, scrub
from soma.serve.migrations import MIGRATIONS

try:
    import sqlalchemy as sa
except ModuleNotFoundError as error:
    raise UserError("keys and the ledger need SQLAlchemy: pip install 'somacube[gateway]'") from error

metadata = sa.MetaData()
teams = sa.Table(
    "teams", metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("created_at", sa.BigInteger, nullable=False),
)  # fmt: skip
keys = sa.Table(
    "keys", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("team", sa.Text),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("models", sa.Text),  # JSON list of patterns; NULL: all
    sa.Column("routes", sa.Text),  # JSON list of patterns; NULL: all that do not manage the service
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("revoked_at", sa.BigInteger),
)  # fmt: skip
secrets = sa.Table(
    "secrets", metadata,
    sa.Column("prefix", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger),  # of a secret that was rotated out
)  # fmt: skip
budgets = sa.Table(
    "budgets", metadata,
    sa.Column("owner", sa.Text, primary_key=True),  # key:ID or team:NAME
    sa.Column("period", sa.Text, primary_key=True),  # day or month
    sa.Column("tokens", sa.BigInteger),
    sa.Column("nano", sa.BigInteger),
)  # fmt: skip
revision = sa.Table("revision", metadata, sa.Column("n", sa.BigInteger, nullable=False))
ledger = sa.Table(
    "ledger", metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("instance", sa.Text, nullable=False),  # the service process that took the call
    sa.Column("key_id", sa.Text),
    sa.Column("team", sa.Text),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("route", sa.Text, nullable=False),
    sa.Column("tags", sa.Text, nullable=False),
    sa.Column("day", sa.Text, nullable=False),
    sa.Column("opened_at", sa.BigInteger, nullable=False),
    sa.Column("settled_at", sa.BigInteger),  # NULL: the call runs, or its service died
    sa.Column("outcome", sa.Text),
    sa.Column("estimated", sa.Integer, nullable=False),
    sa.Column("reserved_prompt", sa.BigInteger, nullable=False),
    sa.Column("reserved_completion", sa.BigInteger, nullable=False),
    sa.Column("reserved_nano", sa.BigInteger),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("nano", sa.BigInteger),  # NULL: this service has no price file
    sa.Column("currency", sa.Text),
    sa.Column("prompt", sa.Text),  # NAME@VERSION+HASH where the request named a prompt of the service
)  # fmt: skip
balances = sa.Table(
    "balances", metadata,
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("period", sa.Text, primary_key=True),  # 2026-11-26 or 2026-11
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("nano", sa.BigInteger, nullable=False),
    sa.Column("held_tokens", sa.BigInteger, nullable=False),  # reserved by calls that run
    sa.Column("held_nano", sa.BigInteger, nullable=False),
)  # fmt: skip

MIGRATION_LOCK = 0x50_4F_4D_41  # PostgreSQL's advisory lock while a schema changes


def now_ms() -> int:
    """Milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


class Database:
    """Connections to the database, its schema brought up to date.

    where: a path (SQLite), or postgresql://…. Raises UserError: it cannot be opened; a newer Soma made it.
    """

    def __init__(self, where: str, *, create: bool = True) -> None:
        self.shown = redact_url(where) if "://" in where else where
        self.path = None if "://" in where else Path(where)
        if self.path is None and not where.startswith(("postgresql://", "postgresql+psycopg://", "postgres://")):
            raise UserError(f"database {self.shown}: expected a path (SQLite) or postgresql://…")
        if self.path is not None and not create and not self.path.exists():
            raise UserError(f"database {self.shown}: there is no such file; `soma keys create` makes one")
        try:
            self.engine = self._sqlite() if self.path is not None else self._postgresql(where)
            self.migrate()
        except (sa.exc.SQLAlchemyError, OSError) as error:
            words = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise UserError(f"database {self.shown}: {scrub(words, where)}") from None

    def _sqlite(self) -> sa.Engine:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(self.path)), connect_args={"timeout": 10, "check_same_thread": False}
        )

        @sa.event.listens_for(engine, "connect")
        def opened(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # else the driver begins transactions when it sees fit
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")

        @sa.event.listens_for(engine, "begin")
        def begun(connection: sa.Connection) -> None:
            options = connection.get_execution_options()
            if options.get("writes"):
                connection.exec_driver_sql(f"PRAGMA synchronous={'NORMAL' if options['relaxed'] else 'FULL'}")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writes") else "BEGIN")

        return engine

    @staticmethod
    def _postgresql(where: str) -> sa.Engine:
        try:
            return sa.create_engine("postgresql+psycopg://" + where.partition("://")[2], pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise UserError("a PostgreSQL database needs its driver: pip install 'psycopg[binary]'") from error

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """One transaction that reads."""
        with self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self, *, relaxed: bool = False) -> Iterator[sa.Connection]:
        """One transaction that writes: whole or not at all. SQLite takes its write lock at the beginning.

        relaxed: the commit does not wait for the disk. Everybody sees it and no killed process undoes it; a loss of
        power does (PostgreSQL: also a crash of its server), unless a commit that is not relaxed came after it.
        """
        options = {"writes": True, "relaxed": relaxed}
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            if relaxed and self.path is None:
                connection.execute(sa.text("SET LOCAL synchronous_commit = off"))
            yield connection

    def migrate(self, last: int = len(MIGRATIONS)) -> None:
        """Bring the schema to version `last`, step by step, in one transaction. Raises UserError."""
        with self.write() as connection:
            if self.path is None:
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:n)"), {"n": MIGRATION_LOCK})
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS schema_version (n INTEGER NOT NULL)")
            version = connection.execute(sa.text("SELECT max(n) FROM schema_version")).scalar() or 0
            if version > len(MIGRATIONS):
                raise UserError(
                    f"database {self.shown}: its schema has version {version}, this Soma knows {len(MIGRATIONS)}; "
                    "use the newer Soma that made it"
                )
            for number in range(version + 1, last + 1):
                for statement in MIGRATIONS[number - 1]:
                    connection.exec_driver_sql(statement)
                connection.execute(sa.text("INSERT INTO schema_version (n) VALUES (:n)"), {"n": number})

    def backup(self, target: Path) -> None:
        """A consistent copy of a SQLite database while others use it. Raises UserError."""
        if self.path is None:
            raise UserError(f"database {self.shown}: PostgreSQL has its own backup: pg_dump")
        if target.exists():
            raise UserError(f"{target}: is there already; choose another name")
        unfinished = target.with_name(target.name + ".partial")
        unfinished.unlink(missing_ok=True)
        os.close(os.open(unfinished, os.O_CREAT | os.O_RDWR, 0o600))
        with closing(sqlite3.connect(self.path)) as ours, closing(sqlite3.connect(unfinished)) as copy:
            ours.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(target)

    def close(self) -> None:
        self.engine.dispose()
