"""All keys and budgets in memory, watched for changes: a request is checked without asking the database.

A thread reads the database's revision number twice a second and, when it has moved, everything. So a key that was
revoked, expired, created or rotated anywhere is known here within `POLL` seconds and what the reading takes (100,000
keys: half a second); calls that run are not cut off. When the database cannot be read for `STALE` seconds, nobody is
let in: what was revoked meanwhile could not be known.
"""

import logging
import threading
import time
from dataclasses import dataclass

import sqlalchemy as sa

from soma.serve.calls import Caller
from soma.serve.database import Database, budgets, keys, now_ms, revision, secrets
from soma.serve.keys.secret import is_same, prefix_of
from soma.serve.keys.store import Budget, Key, key_of

POLL = 0.5
STALE = 30.0

log = logging.getLogger("soma.serve")


@dataclass(frozen=True, slots=True)
class Entry:
    """One secret and the key that it opens."""

    hash: str
    expires_at: int | None
    key: Key
    caller: Caller


class Keyring:
    """The keys as of a moment ago. Raises what the database raises if it cannot be read at the start."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.entries: dict[str, Entry] = {}
        self.budgets: dict[str, list[Budget]] = {}
        self.revision = -1
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.refresh()
        self.thread = threading.Thread(target=self._watch, name="soma-keys", daemon=True)
        self.thread.start()

    def find(self, text: str) -> tuple[str, Entry | None]:
        """What a key is: `active`, `expired`, `revoked` with its entry; `unknown` for all other texts."""
        prefix = prefix_of(text)
        entry = None if prefix is None else self.entries.get(prefix)
        if entry is None or not is_same(text, entry.hash):
            return "unknown", None
        if entry.expires_at is not None and entry.expires_at <= now_ms():
            return "expired", entry
        return entry.key.state, entry

    @property
    def is_stale(self) -> bool:
        """Whether the database has been away for too long to let anybody in."""
        return time.monotonic() - self.read_at > STALE

    def refresh(self) -> None:
        """Read what has changed, now."""
        with self.lock, self.database.read() as connection:
            number = connection.execute(sa.select(revision.c.n)).scalar_one()
            if number != self.revision:
                found = {row.id: key_of(row) for row in connection.execute(sa.select(keys))}
                self.entries = {
                    row.prefix: Entry(row.hash, row.expires_at, found[row.key_id], _caller(found[row.key_id]))
                    for row in connection.execute(sa.select(secrets))
                }
                limits: dict[str, list[Budget]] = {}
                for row in connection.execute(sa.select(budgets)):
                    limits.setdefault(row.owner, []).append(Budget(*row))
                self.budgets, self.revision = limits, number
            self.read_at = time.monotonic()

    def _watch(self) -> None:
        failing = False
        while not self.closed.wait(POLL):
            try:
                self.refresh()
                failing = False
            except Exception as error:  # noqa: BLE001  (whatever it is: go on asking; `is_stale` shuts the door)
                if not failing:
                    log.error("keys cannot be read: %s", type(error).__name__)
                failing = True

    def close(self) -> None:
        self.closed.set()
        self.thread.join()


def _caller(key: Key) -> Caller:
    return Caller(key.id, key.team, key.priority, key.models)
