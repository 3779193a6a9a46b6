"""The ledger as a gate: nothing runs that is not written down, and whatever runs is settled.

The order of things for one call: a slot in the journal with its row, then the engine. The engine's tokens raise the
slot's count. At the end the slot gets what was used, and a moment later the database has the row and its end, and the
slot is free. A call under a budget has its row in the database before it runs, with what it may use at most held
against the budget. Killed at any point, the next start finds the row in the database or in the slot, and the count in
the slot: `soma.serve.ledger.recover`.

What is written has to outlive is a setting. `process`: kill -9 of the service, which takes a store to mapped memory.
`power`: the machine's loss of power too, so every call waits for a sync of the journal, shared by all that wait.
"""

import secrets
import socket
import time
from typing import Any

from soma.base.errors import UserError
from soma.serve.calls import Call, Usage
from soma.serve.database import Database
from soma.serve.errors import ApiError
from soma.serve.keys.keyring import Keyring
from soma.serve.ledger.book import Book, Settlement, new_row, owners_of, unavailable
from soma.serve.ledger.journal import Journal, Slot
from soma.serve.ledger.prices import Prices
from soma.serve.ledger.recover import as_bytes, journals_of, recover
from soma.serve.ledger.sync import Syncer

MOST_TOKENS = 2**40  # that one call can have
DURABILITY = ("process", "power")


class LedgerHold:
    """A call that is written down and runs."""

    def __init__(self, ledger: "Ledger", call: Call, slot: Slot) -> None:
        self.ledger, self.call, self.slot = ledger, call, slot
        self.headers: dict[str, str] = {}
        self.started = time.time()

    async def leave(self, usage: Usage) -> None:
        """Settle it. The slot keeps the numbers until the database has them."""
        self.ledger.running.pop(self.call.id, None)
        usage = believable(usage)
        self.slot.end(usage)
        self.ledger.settle(self.call, usage, self.slot)


def believable(usage: Usage) -> Usage:
    """The usage, or what of it can be if an upstream told something that cannot; that is then an estimate."""
    prompt, made = (min(max(0, number), MOST_TOKENS) for number in (usage.prompt_tokens, usage.completion_tokens))
    cached = min(max(0, usage.cached_tokens), prompt)
    if (prompt, made, cached) == (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens):
        return usage
    return Usage(prompt, made, cached, usage.outcome, estimated=True)


class Ledger:
    """The gate. At its start it settles what services left open that are no more.

    prices None: tokens are counted, money is not. durability: what a call's row has outlived before the call runs, see
    above. Raises UserError.
    """

    def __init__(
        self, database: Database, keyring: Keyring | None, prices: Prices | None, durability: str = "process"
    ) -> None:  # fmt: skip
        if durability not in DURABILITY:
            raise UserError(f"durability {durability!r}: expected {' or '.join(DURABILITY)}")
        self.keyring, self.prices = keyring, prices
        self.recovered = recover(database, journals_of(database), prices)
        self.instance = f"{socket.gethostname()}-{secrets.token_hex(6)}"
        try:
            self.journal = Journal(journals_of(database), self.instance)
        except OSError as error:
            words = (error.strerror or "").lower()
            raise UserError(f"{error.filename}: {words}; the ledger's journal belongs there") from None
        self.book = Book(database, relaxed=durability == "process")
        self.syncer = Syncer(self.journal) if durability == "power" else None
        self.running: dict[str, LedgerHold] = {}

    def cost(self, model: str, usage: Usage) -> int | None:
        """Billionths; None without prices."""
        if self.prices is None:
            return None
        return self.prices.cost(model, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    async def enter(self, call: Call) -> LedgerHold:
        """Raises ApiError: 429 a budget is used up; 503 the model has no price, or the ledger cannot be written."""
        most = None
        if self.prices is not None:
            if call.model not in self.prices.models:
                raise ApiError(503, f"the model `{call.model}` has no price", "model", "no_price")
            most = self.prices.most(call.model, call.prompt_tokens, call.max_tokens)
        self.book.check()
        row = new_row(call, self.instance, most, self.prices.currency if self.prices else None)
        try:
            slot = self.journal.open(call.id, call.prompt_tokens, estimated=call.is_foreign)
        except OSError:  # no room for more slots
            raise unavailable() from None
        try:
            await self._write_down(row, slot)
        except ApiError:
            slot.forget()
            slot.free()
            raise
        except BaseException:  # the client left while the row was on its way to the disk
            slot.end(refused := Usage(outcome="refused"))
            self.settle(call, refused, slot)
            raise
        call.meter = slot
        self.running[call.id] = hold = LedgerHold(self, call, slot)
        return hold

    async def _write_down(self, row: dict[str, Any], slot: Slot) -> None:
        """Returns when the row is where it outlives what it has to. Raises ApiError; then the row is nowhere."""
        budgets = self._budgets(row)
        if budgets or not slot.write(as_bytes(row)):
            await self.book.open(row, budgets)
            return
        if self.syncer is not None:
            await self.syncer.written()
        self.book.note(row)

    def _budgets(self, row: dict[str, Any]) -> list[Any]:
        if self.keyring is None:
            return []
        owners = owners_of(row["key_id"], row["team"])
        return [budget for owner in owners for budget in self.keyring.budgets.get(owner, ())]

    def settle(self, call: Call, usage: Usage, slot: Slot) -> None:
        nano = 0 if usage.outcome == "refused" and self.prices else self.cost(call.model, usage)
        self.book.settle(Settlement(call.id, usage, nano, slot.free))

    def close(self) -> None:
        """Write what waits. What cannot be written stays in the journal for the next start."""
        if self.syncer is not None:
            self.syncer.close()
        self.journal.close(remove=self.book.close() and not self.running)
