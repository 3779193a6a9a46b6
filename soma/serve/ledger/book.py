"""The ledger's writer: one thread that puts what waits into one transaction, and so one fsync for all of it.

A call whose row is in the journal is noted here and waits for nothing; its row and its end are in the database `FLUSH`
seconds later. A call under a budget waits for its transaction: budgets are held within it, so several services on one
database admit exactly what the budget has. While a commit is on its way the next batch gathers, and no timer holds up
whoever waits.
"""

import asyncio
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from soma.serve.calls import Call, Usage
from soma.serve.database import Database, balances, ledger, now_ms
from soma.serve.errors import ApiError
from soma.serve.keys.store import NANO, Budget

GATHER = 256  # ends of calls in one commit, at most
FLUSH = 0.05  # seconds between what is noted and its commit
MOST_BEHIND = 20_000  # calls that are noted and not in the database; more are refused
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
class Waiting:
    """Somebody who waits in an event loop. The future is done when there is a verdict, or None."""

    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[None]"
    verdict: ApiError | None = field(default=None, kw_only=True)


@dataclass
class Intent(Waiting):
    """A call that asks to be written down; the verdict is there when it is committed."""

    row: dict[str, Any]
    budgets: Sequence[Budget]


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

    def hold(self, row: dict[str, Any], sign: int = 1) -> None:
        """Reserve the most that a call can use; -1: no longer."""
        self._add(row, held_tokens=sign * reserved(row), held_nano=sign * (row["reserved_nano"] or 0))

    def use(self, row: dict[str, Any], end: "Settlement") -> None:
        """Count what a call has used."""
        self._add(row, tokens=end.usage.prompt_tokens + end.usage.completion_tokens, nano=end.nano or 0)

    def _add(self, row: dict[str, Any], **changes: int) -> None:
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


def write_batch(
    connection: sa.Connection, intents: Sequence[Intent], settlements: Sequence[Settlement],
    noted: Sequence[dict[str, Any]] = (), *, again: bool = False,
) -> None:  # fmt: skip
    """Open and settle calls. What a budget refuses has a verdict afterwards; what is settled already stays.

    noted: rows of calls that run already. again: some of them may be in the database.
    """
    ends: dict[str, Settlement] = {}
    for settlement in settlements:
        ends.setdefault(settlement.call_id, settlement)
    if again:
        there = known(connection, [row["id"] for row in noted])
        noted = [row for row in noted if row["id"] not in there]
    fresh = {row["id"]: row for row in noted}
    rows = open_rows(connection, [name for name in ends if name not in fresh])
    now = now_ms()
    named = [name for row in (*fresh.values(), *(i.row for i in intents), *rows.values()) for name in names_of(row)]
    held = Balances(connection, named)
    for row in fresh.values():
        if (end := ends.get(row["id"])) is None:
            held.hold(row)
        else:  # begun and ended since the last commit
            row |= settled(end, now)
            held.use(row, end)
    for call_id, row in rows.items():
        held.hold(row, -1)
        held.use(row, ends[call_id])
    admitted = []
    for intent in intents:
        intent.verdict = refusal(intent, held)
        if intent.verdict is not None:
            continue
        admitted.append(intent.row)
        if (end := ends.get(intent.row["id"])) is None:
            held.hold(intent.row)
        else:  # it ended before it was written: the client left
            intent.row |= settled(end, now)
            held.use(intent.row, end)
    if new := [*fresh.values(), *admitted]:
        connection.execute(ledger.insert(), new)
    if rows:
        changes = [{"call": call_id, **settled(ends[call_id], now)} for call_id in rows]
        connection.execute(ledger.update().where(ledger.c.id == sa.bindparam("call")), changes)
    held.write()


def settled(end: Settlement, now: int) -> dict[str, Any]:
    """What a row has of its call's end."""
    usage = end.usage
    return {
        "settled_at": now, "outcome": usage.outcome, "estimated": int(usage.estimated), "nano": end.nano,
        "prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
    }  # fmt: skip


def open_rows(connection: sa.Connection, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Those of these calls that are in the database and not settled, locked."""
    rows: dict[str, dict[str, Any]] = {}
    for start in range(0, len(names), BATCH):
        some = ledger.c.id.in_(names[start : start + BATCH])
        found = sa.select(ledger).where(some, ledger.c.settled_at.is_(None)).with_for_update()
        rows |= {row.id: dict(row._mapping) for row in connection.execute(found)}
    return rows


def known(connection: sa.Connection, names: Sequence[str]) -> set[str]:
    """Those of these calls that are in the database."""
    found: set[str] = set()
    for start in range(0, len(names), BATCH):
        found.update(
            connection.execute(sa.select(ledger.c.id).where(ledger.c.id.in_(names[start : start + BATCH]))).scalars()
        )
    return found


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
    """The writer's thread and what waits for it. `relaxed`: whoever waits does so for a commit that no killed process
    undoes, and not for the disk."""

    def __init__(self, database: Database, *, relaxed: bool = False) -> None:
        self.database, self.relaxed = database, relaxed
        self.queue: queue.SimpleQueue[Intent | None] = queue.SimpleQueue()  # None: there is something else
        self.noted: deque[dict[str, Any]] = deque()
        self.ended: deque[Settlement] = deque()
        self.rows: list[dict[str, Any]] = []  # taken from `noted`, not yet written
        self.waiting: list[Settlement] = []  # taken from `ended`, not yet written
        self.is_away = self.is_unsure = False  # the last commit failed; it may have come through all the same
        self.is_awake = self.closing = False
        self.thread = threading.Thread(target=self._run, name="soma-ledger", daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Raises ApiError 503 while the database cannot be written, or is too far behind."""
        if self.is_away or len(self.noted) + len(self.rows) > MOST_BEHIND:
            raise unavailable()

    def note(self, row: dict[str, Any]) -> None:
        """A call whose row is in the journal: it will be in the database, soon; tried again until it is."""
        self.noted.append(row)
        self._wake()

    async def open(self, row: dict[str, Any], budgets: Sequence[Budget]) -> None:
        """Returns when the row is committed. Raises ApiError: a budget is used up; the ledger cannot be written."""
        loop = asyncio.get_running_loop()
        intent = Intent(loop, loop.create_future(), row, budgets)
        self.queue.put(intent)
        await intent.future
        if intent.verdict is not None:
            raise intent.verdict

    def settle(self, settlement: Settlement) -> None:
        """Write the end of a call, soon; tried again until it is written."""
        self.ended.append(settlement)
        self._wake()

    def _wake(self) -> None:
        if not self.is_awake:
            self.is_awake = True
            self.queue.put(None)

    def close(self) -> bool:
        """Write what waits; whether all of it is written."""
        self.closing = True
        self.queue.put(None)
        self.thread.join(30)
        return not self.thread.is_alive() and not self.rows and not self.waiting

    def _run(self) -> None:
        while True:
            first = None
            if not (self.noted or self.ended or self.rows or self.waiting) and self.queue.empty():
                if self.closing:
                    return
                self.is_awake = False
                if not self.noted and not self.ended:  # else it came before the flag was down, and woke nobody
                    first = self.queue.get()
                self.is_awake = True
            if first is None and not self.closing and len(self.ended) < GATHER:
                with suppress(queue.Empty):
                    first = self.queue.get(timeout=RETRY if self.is_away else FLUSH)
            # Ends first: the row of whatever has ended was noted or asked for before that, and is taken after it.
            while self.ended and len(self.waiting) < GATHER:
                self.waiting.append(self.ended.popleft())
            intents = self._asked(first)
            while self.noted:
                self.rows.append(self.noted.popleft())
            self._write(intents)
            if self.closing and self.is_away:
                return

    def _asked(self, first: Intent | None) -> list[Intent]:
        found = [] if first is None else [first]
        with suppress(queue.Empty):
            while True:
                if (each := self.queue.get_nowait()) is not None:
                    found.append(each)
        return found

    def _write(self, intents: list[Intent]) -> None:
        if not intents and not self.rows and not self.waiting:
            return
        try:
            with self.database.write(relaxed=self.relaxed and bool(intents)) as connection:
                write_batch(connection, intents, self.waiting, self.rows, again=self.is_unsure)
        except Exception as error:  # noqa: BLE001  (of the driver, the disk: none of it may end this thread)
            if not self.is_away:
                log.error("the ledger cannot be written: %s", type(error).__name__)
            self.is_away = self.is_unsure = True
            for intent in intents:
                intent.verdict = unavailable()
                # The commit may have reached the database before the connection broke.
                self.waiting.append(Settlement(intent.row["id"], Usage(outcome="refused"), None))
            time.sleep(0.05)
        else:
            self.is_away = self.is_unsure = False
            self.rows = []
            ended, self.waiting = self.waiting, []
            for settlement in ended:
                settlement.done()
        tell(intents)


def unavailable() -> ApiError:
    return ApiError(503, "the ledger cannot be written at the moment; try again soon", code="ledger_unavailable",
                    retry_after=5)  # fmt: skip


def tell(waiting: Sequence[Waiting]) -> None:
    """Wake who waits: one call for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for each in waiting:
        by_loop.setdefault(each.loop, []).append(each.future)

    def wake(futures: "list[asyncio.Future[None]]") -> None:
        for future in futures:
            if not future.done():
                future.set_result(None)

    for loop, futures in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(wake, futures)
