"""Keys, teams and budgets in the database: what the command line and the admin API do."""

import json
import re
import secrets as random
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from soma.base.errors import UserError
from soma.serve.database import Database, budgets, keys, now_ms, revision, secrets, teams
from soma.serve.keys.secret import Secret, new_secret

ROLES = ("use", "admin")  # use: the service's routes; admin: the admin API, and nothing else
PERIODS = ("day", "month")
NAME = re.compile(r"[\w .@-]{1,100}")
MAX_GRACE = 30 * 86_400
NANO = 1_000_000_000
LARGEST = 2**62


@dataclass(frozen=True)
class Key:
    """A key as it may be shown: everything but the secret."""

    id: str
    name: str
    team: str | None
    role: str
    priority: int
    models: tuple[str, ...] | None
    routes: tuple[str, ...] | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None

    @property
    def state(self) -> str:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now_ms() else "active"


@dataclass(frozen=True)
class Budget:
    """What an owner (`key:ID`, `team:NAME`) may use in a period (UTC days and months). None: no bound."""

    owner: str
    period: str
    tokens: int | None
    nano: int | None


class KeyStore:
    """Reads and changes keys. Every change raises the revision that running services watch."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(
        self, name: str, *, team: str | None = None, role: str = "use", models: Sequence[str] | None = None,
        routes: Sequence[str] | None = None, priority: int = 0, days: float | None = None,
    ) -> tuple[Key, Secret]:  # fmt: skip
        """A new key and its secret, which is not to be had again. A team that is not there is made.

        models, routes: patterns (`*`, `?`) it may use, left out: all; routes that manage the service must be named.
        days: until it expires. Raises UserError.
        """
        check_name(name, "name")
        if role not in ROLES:
            raise UserError(f"role {role!r}: expected one of {', '.join(ROLES)}")
        if days is not None and not 0 < days <= 36_500:
            raise UserError(f"days {days:g}: expected more than 0, at most 36500")
        if not -100 <= priority <= 100:
            raise UserError(f"priority {priority}: expected -100 to 100")
        for pattern in (*(models or ()), *(routes or ())):
            if not 0 < len(pattern) <= 200:
                raise UserError("a pattern of models or routes has 1 to 200 characters")
        made, now = new_secret(), now_ms()
        end = now + int(days * 86_400_000) if days else None
        key = Key(f"key-{random.token_hex(6)}", name, team, role, priority, tuple(models) if models else None,
                  tuple(routes) if routes else None, now, end, None)  # fmt: skip
        with self.database.write() as connection:
            if team is not None:
                _make_team(connection, team)
            row = {**vars(key), "models": _json(key.models), "routes": _json(key.routes)}
            connection.execute(keys.insert().values(**row))
            _add_secret(connection, key.id, made)
            _changed(connection)
        return key, made

    def all(self) -> list[Key]:
        """All keys, the newest last."""
        with self.database.read() as connection:
            return [key_of(row) for row in connection.execute(sa.select(keys).order_by(keys.c.created_at, keys.c.id))]

    def get(self, key_id: str) -> Key:
        """Raises UserError where there is none."""
        with self.database.read() as connection:
            return _find(connection, key_id)

    def rotate(self, key_id: str, grace: float = 0.0) -> Secret:
        """A new secret for a key; the old one is good for another `grace` seconds. Raises UserError."""
        if not 0 <= grace <= MAX_GRACE:
            raise UserError(f"grace {grace:g}: expected 0 to {MAX_GRACE} seconds")
        made, end = new_secret(), now_ms() + int(grace * 1000)
        with self.database.write() as connection:
            key = _find(connection, key_id)
            if key.state != "active":
                raise UserError(f"key {key_id}: it is {key.state}; create a new one")
            old = sa.or_(secrets.c.expires_at.is_(None), secrets.c.expires_at > end)
            connection.execute(secrets.update().where(secrets.c.key_id == key_id, old).values(expires_at=end))
            _add_secret(connection, key_id, made)
            _changed(connection)
        return made

    def revoke(self, key_id: str) -> None:
        """End a key for good; the ledger keeps its id. Raises UserError."""
        with self.database.write() as connection:
            _find(connection, key_id)
            still = keys.c.revoked_at.is_(None)
            connection.execute(keys.update().where(keys.c.id == key_id, still).values(revoked_at=now_ms()))
            _changed(connection)

    def expire(self, key_id: str, days: float) -> None:
        """Let a key expire in so many days; 0: now. Raises UserError."""
        if not 0 <= days <= 36_500:
            raise UserError(f"days {days:g}: expected 0 to 36500")
        with self.database.write() as connection:
            _find(connection, key_id)
            end = now_ms() + int(days * 86_400_000)
            connection.execute(keys.update().where(keys.c.id == key_id).values(expires_at=end))
            _changed(connection)

    def teams(self) -> list[str]:
        with self.database.read() as connection:
            return list(connection.execute(sa.select(teams.c.name).order_by(teams.c.name)).scalars())

    def create_team(self, name: str) -> None:
        """Raises UserError for a name that is none."""
        with self.database.write() as connection:
            _make_team(connection, name)

    def budgets(self) -> list[Budget]:
        with self.database.read() as connection:
            return [Budget(*row) for row in connection.execute(sa.select(budgets).order_by(*budgets.c))]

    def set_budget(self, owner: str, period: str, tokens: int | None, money: Decimal | None) -> Budget:
        """Bound what a key or team uses per UTC day or month; both None takes the bound away. Raises UserError.

        money: in the price file's currency, to a billionth.
        """
        kind, _, name = owner.partition(":")
        if kind not in ("key", "team") or not name:
            raise UserError(f"owner {owner!r}: expected key:ID or team:NAME")
        if period not in PERIODS:
            raise UserError(f"period {period!r}: expected day or month")
        if tokens is not None and not 0 <= tokens < LARGEST:
            raise UserError(f"tokens {tokens}: expected 0 or more")
        if money is not None and not (money.is_finite() and 0 <= money < LARGEST // NANO):
            raise UserError(f"money {money}: expected 0 or more")
        budget = Budget(owner, period, tokens, None if money is None else int(money * NANO))
        with self.database.write() as connection:
            if kind == "key":
                _find(connection, name)
            else:
                _make_team(connection, name)
            which = sa.and_(budgets.c.owner == owner, budgets.c.period == period)
            connection.execute(budgets.delete().where(which))
            if tokens is not None or money is not None:
                connection.execute(budgets.insert().values(**vars(budget)))
            _changed(connection)
        return budget


def check_name(name: str, field: str) -> None:
    """Raises UserError for what cannot be the name of a key or team."""
    if not NAME.fullmatch(name):
        raise UserError(f"{field} {name!r}: expected 1 to 100 letters, digits, spaces, or any of _.@-")


def _make_team(connection: sa.Connection, name: str) -> None:
    check_name(name, "team")
    statement = sa.text("INSERT INTO teams (name, created_at) VALUES (:name, :now) ON CONFLICT (name) DO NOTHING")
    connection.execute(statement, {"name": name, "now": now_ms()})


def _add_secret(connection: sa.Connection, key_id: str, made: Secret) -> None:
    row = {"prefix": made.prefix, "key_id": key_id, "hash": made.hash, "created_at": now_ms(), "expires_at": None}
    connection.execute(secrets.insert().values(**row))


def _changed(connection: sa.Connection) -> None:
    connection.execute(revision.update().values(n=revision.c.n + 1))


def _find(connection: sa.Connection, key_id: str) -> Key:
    row = connection.execute(sa.select(keys).where(keys.c.id == key_id)).first()
    if row is None:
        raise UserError(f"key {key_id!r}: there is none; `soma keys list` has their ids")
    return key_of(row)


def key_of(row: Any) -> Key:
    """A row of the table of keys."""
    values = dict(row._mapping)
    return Key(**{**values, "models": _patterns(values["models"]), "routes": _patterns(values["routes"])})


def _json(patterns: tuple[str, ...] | None) -> str | None:
    return None if patterns is None else json.dumps(patterns)


def _patterns(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(json.loads(text))
