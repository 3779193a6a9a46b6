"""Settling the calls of services that were killed, from the counts that they left."""

import hashlib
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from soma.serve.calls import Usage
from soma.serve.database import Database, ledger
from soma.serve.ledger.book import BATCH, Settlement, write_batch
from soma.serve.ledger.journal import MAGIC, SUFFIX, Counts, DeadJournal
from soma.serve.ledger.prices import Prices

log = logging.getLogger("soma.serve")

IN_SLOT = (
    "id", "instance", "key_id", "team", "model", "route", "tags", "day", "opened_at", "reserved_prompt",
    "reserved_completion", "reserved_nano", "currency",
)  # fmt: skip
assert MAGIC == b"SOMASLT2"  # other columns in a slot's row are another format


def as_bytes(row: dict[str, Any]) -> bytes:
    """What a slot keeps of a row: all that is known of a call before it runs."""
    return json.dumps([row[name] for name in IN_SLOT], ensure_ascii=False, separators=(",", ":")).encode()


def row_of(text: bytes) -> dict[str, Any]:
    """The open row again."""
    nothing = dict.fromkeys(("estimated", "prompt_tokens", "cached_tokens", "completion_tokens"), 0)
    return {**dict(zip(IN_SLOT, json.loads(text), strict=True)), **nothing, "settled_at": None, "outcome": None,
            "nano": None}  # fmt: skip


def journals_of(database: Database) -> Path:
    """The folder of a database's journals: beside a file; for a server on another machine, with this user's state."""
    if database.path is not None:
        return database.path.with_name(database.path.name + ".journal")
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    url = database.engine.url
    which = hashlib.sha256(f"{url.host}:{url.port}/{url.database}".encode()).hexdigest()[:16]
    return Path(state) / "soma" / "ledger" / which


def recover(database: Database, folder: Path, prices: Prices | None) -> int:
    """Settle what dead services of this machine left open; the number of calls.

    A call that a journal has is settled exactly. One that it has not (the file was lost, the machine lost power) is
    settled with the most that it can have used, or what the journal has, and marked as estimated.
    """
    count = 0
    ours = instances(database, socket.gethostname())  # asked first: who starts meanwhile has a journal before a row
    paths = sorted(folder.glob("*" + SUFFIX))
    for path in paths:
        journal = DeadJournal.take(path)
        if journal is None:
            continue
        try:
            count += settle_all(database, [journal.instance], journal.counts, prices)
        except BaseException:
            journal.close(remove=False)
            raise
        journal.close(remove=True)
    have = {path.name.removesuffix(SUFFIX) for path in paths}
    lost = [name for name in ours if name not in have]
    return count + settle_all(database, lost, {}, prices)


def instances(database: Database, host: str) -> list[str]:
    """The services of a machine that have open calls."""
    with database.read() as connection:
        found = connection.execute(sa.select(ledger.c.instance).where(ledger.c.settled_at.is_(None)).distinct())
        return sorted(name for name in found.scalars() if name.rpartition("-")[0] == host)


def settle_all(database: Database, names: list[str], counts: dict[str, Counts], prices: Prices | None) -> int:
    """Settle every open call of these services by what is known of it, in one transaction; their number. Rows that
    only a slot has are written first."""
    if not names:
        return 0
    with database.write() as connection:
        kept = [row_of(each.row) for each in counts.values() if each.row is not None]
        write_batch(connection, (), (), kept, again=True)
        open_rows = connection.execute(
            sa.select(ledger).where(ledger.c.instance.in_(names), ledger.c.settled_at.is_(None))
        ).all()
        ends = []
        for row in open_rows:
            known = counts.get(row.id)
            usage = Usage(row.reserved_prompt, row.reserved_completion, 0, "killed", estimated=True)
            usage = usage if known is None else known.usage
            priced = prices is not None and row.model in prices.models
            nano = row.reserved_nano if usage.estimated else None
            if priced and prices is not None:
                nano = prices.cost(row.model, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
            ends.append(Settlement(row.id, usage, nano))
        for start in range(0, len(ends), BATCH):
            write_batch(connection, (), ends[start : start + BATCH])
    if open_rows:
        guessed = sum(end.usage.estimated for end in ends)
        log.warning("%d calls of a service that is no more are settled, %d of them by estimate", len(ends), guessed)
    return len(open_rows)
