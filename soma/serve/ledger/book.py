"""The ledger's writer: one thread that puts what waits into one transaction, and so one fsync for all of it.

While a commit is on its way to the disk the next batch gathers; nobody waits for a timer. Budgets are held within the
same transaction, so several services on one database admit exactly what the budget has.
"""

import asyncio
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from soma.serve.calls import Call, Usage
from soma.serve.database import Database, balances, ledger, now_ms
from soma.serve.errors import ApiError
from soma.serve.keys.store import NANO, Budget

GATHER = 256  # beginnings and ends of calls in one commit, at most
BATCH = 256  # rows that one statement names
RETRY = 0.5  # seconds between attempts at a database that is away

log = logging.getLogger("soma.serve")


def day_of(milliseconds: int) -> str:
    """The UTC day, as 2026-11-26."""
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d}"


def owners_of(key_id: str | None, team: str | None) -> list[str]:
    """Whose budgets a call uses up."""
    return ([f"key:{key_id}"] if key_id else []) + ([f"team:{team}"] if team else [])


@dataclass
class Intent:
    """A call that asks to be written down. The future is done when it is on the disk."""

    row: dict[str, Any]
    budgets: Sequence[Budget]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[None]"
    verdict: ApiError | None = None


@dataclass
class Settlement:
    """The end of a call."""

    call_id: str
    usage: Usage
    nano: int | None
    done: Callable[[], None] = field(default=lambda: None)


class Balances:
    """The rows of `balances` that a transaction needs, locked in it, changed here, and written back at its end."""

    def __init__(self, connection: sa.Connection, wanted: Iterable[tuple[str, str]]) -> None:
        self.connection, names = connection, sorted(set(wanted))
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        if not names:
            return
        zero = dict.fromkeys(("tokens", "nano", "held_tokens", "held_nano"), 0)
        connection.execute(
            sa.text("INSERT INTO balances (owner, period, tokens, nano, held_tokens, held_nano) "
                    "VALUES (:owner, :period, :tokens, :nano, :held_tokens, :held_nano) ON CONFLICT DO NOTHING"),
            [{"owner": owner, "period": period, **zero} for owner, period in names],
        )  # fmt: skip
        for start in range(0, len(names), BATCH):
            some = sa.tuple_(balances.c.owner, balances.c.period).in_(names[start : start + BATCH])
            order = sa.select(balances).where(some).order_by(balances.c.owner, balances.c.period).with_for_update()
            for row in connection.execute(order):
                self.rows[row.owner, row.period] = dict(row._mapping)

    def add(self, row: dict[str, Any], **changes: int) -> None:
        """Change all balances that a call counts for."""
        for name in names_of(row):
            for what, amount in changes.items():
                self.rows[name][what] += amount

    def write(self) -> None:
        if self.rows:
            change = balances.update().where(
                balances.c.owner == sa.bindparam("o"), balances.c.period == sa.bindparam("p")
            )
            rows = [{"o": row.pop("owner"), "p": row.pop("period"), **row} for row in self.rows.values()]
            self.connection.execute(change, rows)


def balances_of(database: Database) -> dict[tuple[str, str], Any]:
    """All balances, by owner and period."""
    with database.read() as connection:
        return {(row.owner, row.period): row for row in connection.execute(sa.select(balances))}


def names_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The balances that a ledger row counts for: of its key and team, for the day and the month it began in."""
    return [
        (owner, period) for owner in owners_of(row["key_id"], row["team"]) for period in (row["day"], row["day"][:7])
    ]


def new_row(call: Call, instance: str, nano: int | None, currency: str | None) -> dict[str, Any]:
    """The ledger's row of a call that is about to run. nano: the most that it can cost."""
    opened = now_ms()
    caller = call.caller
    return {
        "id": call.id, "instance": instance, "key_id": caller and caller.key_id, "team": caller and caller.team,
        "model": call.model, "route": call.route, "tags": json.dumps(call.tags), "day": day_of(opened),
        "opened_at": opened, "settled_at": None, "outcome": None, "estimated": 0, "reserved_prompt": call.prompt_tokens,
        "reserved_completion": call.max_tokens, "reserved_nano": nano, "prompt_tokens": 0, "cached_tokens": 0,
        "completion_tokens": 0, "nano": None, "currency": currency, "prompt": call.tags.get("prompt"),
    }  # fmt: skip


def write_batch(connection: sa.Connection, intents: Sequence[Intent], settlements: Sequence[Settlement]) -> None:
    """Open and settle calls. What a budget refuses has a verdict afterwards; what is settled already stays."""
    ends: dict[str, Settlement] = {}
    for settlement in settlements:
        ends.setdefault(settlement.call_id, settlement)
    rows: dict[str, dict[str, Any]] = {}
    names = list(ends)
    for start in range(0, len(names), BATCH):
        some = ledger.c.id.in_(names[start : start + BATCH])
        open_rows = sa.select(ledger).where(some, ledger.c.settled_at.is_(None)).with_for_update()
        rows |= {row.id: dict(row._mapping) for row in connection.execute(open_rows)}
    new = [intent.row for intent in intents]
    held = Balances(connection, [name for row in (*new, *rows.values()) for name in names_of(row)])
    for intent in intents:
        intent.verdict = refusal(intent, held)
        if intent.verdict is None:
            held.add(intent.row, held_tokens=reserved(intent.row), held_nano=intent.row["reserved_nano"] or 0)
            if intent.row["id"] in ends:  # it ended before it was written: the client left
                rows[intent.row["id"]] = intent.row
    if admitted := [intent.row for intent in intents if intent.verdict is None]:
        connection.execute(ledger.insert(), admitted)
    now = now_ms()
    changes = []
    for call_id, row in rows.items():
        end = ends[call_id]
        usage = end.usage
        held.add(row, held_tokens=-reserved(row), held_nano=-(row["reserved_nano"] or 0), nano=end.nano or 0,
                 tokens=usage.prompt_tokens + usage.completion_tokens)  # fmt: skip
        changes.append({
            "call": call_id, "settled_at": now, "outcome": usage.outcome, "estimated": int(usage.estimated),
            "prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens, "nano": end.nano,
        })  # fmt: skip
    if changes:
        connection.execute(ledger.update().where(ledger.c.id == sa.bindparam("call")), changes)
    held.write()


def reserved(row: dict[str, Any]) -> int:
    """The most tokens that a call can use."""
    return int(row["reserved_prompt"] + row["reserved_completion"])


def refusal(intent: Intent, held: Balances) -> ApiError | None:
    """What a call is told that a budget has no room for."""
    row = intent.row
    for budget in intent.budgets:
        balance = held.rows[budget.owner, row["day"] if budget.period == "day" else row["day"][:7]]
        what = "team" if budget.owner.startswith("team:") else "key"
        if budget.nano is not None and row["reserved_nano"] is None:
            return ApiError(503, f"this {what} has a budget in money, and the service has no prices", code="no_prices")
        for kind, bound, need in (
            ("tokens", budget.tokens, reserved(row)),
            ("nano", budget.nano, row["reserved_nano"]),
        ):
            if bound is not None and balance[kind] + balance["held_" + kind] + need > bound:
                left = max(0, bound - balance[kind] - balance["held_" + kind])
                amount = (f"{need} tokens, {left}" if kind == "tokens"
                          else f"{need / NANO:.6f} {row['currency']}, {left / NANO:.6f}")  # fmt: skip
                return ApiError(
                    429, f"the {budget.period}'s budget of this {what} is used up: this call may need {amount} left",
                    code="budget_exceeded", retry_after=seconds_left(budget.period, row["opened_at"]),
                )  # fmt: skip
    return None


def seconds_left(period: str, milliseconds: int) -> int:
    """Until the UTC day or month is over."""
    now = datetime.fromtimestamp(milliseconds / 1000, UTC)
    year, month = (now.year + now.month // 12, now.month % 12 + 1)
    end = datetime(year, month, 1, tzinfo=UTC)
    if period == "day":
        return 86_400 - (milliseconds // 1000) % 86_400
    return max(1, int((end - now).total_seconds()) + 1)


class Book:
    """The writer's thread and its queue."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.queue: queue.SimpleQueue[Intent | Settlement | None] = queue.SimpleQueue()
        self.waiting: list[Settlement] = []  # settled, not yet written
        self.is_away = False
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="soma-ledger", daemon=True)
        self.thread.start()

    async def open(self, row: dict[str, Any], budgets: Sequence[Budget]) -> None:
        """Returns when the row is on the disk. Raises ApiError: a budget is used up; the ledger cannot be written."""
        loop = asyncio.get_running_loop()
        intent = Intent(row, budgets, loop, loop.create_future())
        self.queue.put(intent)
        await intent.future
        if intent.verdict is not None:
            raise intent.verdict

    def settle(self, settlement: Settlement) -> None:
        """Write the end of a call, soon; tried again until it is written."""
        self.queue.put(settlement)

    def close(self) -> bool:
        """Write what waits; whether all of it is written."""
        self.closing = True
        self.queue.put(None)
        self.thread.join(30)
        return not self.thread.is_alive() and not self.waiting

    def _run(self) -> None:
        while True:
            try:
                first = self.queue.get(timeout=RETRY if self.waiting else None)
            except queue.Empty:
                first = None
            intents: list[Intent] = []
            for each in (first, *self._more()):
                if isinstance(each, Intent):
                    intents.append(each)
                elif each is not None:
                    self.waiting.append(each)
            self._write(intents)
            if self.closing and self.queue.empty():
                return

    def _more(self) -> "list[Intent | Settlement | None]":
        found: list[Intent | Settlement | None] = []
        while len(found) < GATHER - 1:
            try:
                found.append(self.queue.get_nowait())
            except queue.Empty:
                break
        return found

    def _write(self, intents: list[Intent]) -> None:
        if not intents and not self.waiting:
            return
        try:
            with self.database.write() as connection:
                write_batch(connection, intents, self.waiting)
        except Exception as error:  # noqa: BLE001  (of the driver, the disk: none of it may end this thread)
            if not self.is_away:
                log.error("the ledger cannot be written: %s", type(error).__name__)
            self.is_away = True
            for intent in intents:
                intent.verdict = ApiError(503, "the ledger cannot be written at the moment; try again soon",
                                          code="ledger_unavailable", retry_after=5)  # fmt: skip
                # The commit may have reached the database before the connection broke.
                self.waiting.append(Settlement(intent.row["id"], Usage(outcome="refused"), None))
            time.sleep(0.05)
        else:
            self.is_away = False
            settled, self.waiting = self.waiting, []
            for settlement in settled:
                settlement.done()
        tell(intents)


def tell(intents: Sequence[Intent]) -> None:
    """Wake who waits: one call for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for intent in intents:
        by_loop.setdefault(intent.loop, []).append(intent.future)

    def wake(futures: "list[asyncio.Future[None]]") -> None:
        for future in futures:
            if not future.done():
                future.set_result(None)

    for loop, futures in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(wake, futures)
