"""What it costs that every call is written down before it runs, and that every token is counted where a kill leaves it.

    python benchmarks/ledger.py --json

Calls enter and leave the ledger's gate, so many at once. A row in mapped memory (ours) against one that a shared sync
has put on the disk (durability `power`), and against a row in the database, committed for all that wait (what calls
under a budget have); and the count of a token against nothing.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import compare, finish, parser

from soma.serve.calls import Call, Caller, Usage
from soma.serve.database import Database
from soma.serve.keys.keyring import Keyring
from soma.serve.keys.store import KeyStore
from soma.serve.ledger.gate import Ledger
from soma.serve.ledger.journal import Journal

CALLS = {1: 200, 64: 2000}
TOKENS = 200_000


def gate_run(folder: Path, at_once: int, durability: str = "process", has_budget: bool = False) -> float:
    """Calls per second through the gate, entered and left."""
    where = folder / f"{time.monotonic_ns()}.db"
    database = Database(str(where))
    if has_budget:
        KeyStore(database).create("benchmark", team="team")
        KeyStore(database).set_budget("team:team", "day", 2**50, None)
    keyring = Keyring(database)
    ledger = Ledger(database, keyring, None, durability)
    total = CALLS[at_once]

    async def worker(number: int) -> None:
        for _ in range(number):
            hold = await ledger.enter(Call("/v1/completions", "m", "", Caller("key", "team"), 10, 20))
            await hold.leave(Usage(10, 5))

    async def everybody() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(worker(total // at_once) for _ in range(at_once)))
        return total // at_once * at_once / (time.perf_counter() - began)

    try:
        return asyncio.run(everybody())
    finally:
        ledger.close()
        keyring.close()
        database.close()


def count_run(folder: Path) -> float:
    """Nanoseconds for each token that is counted."""
    slot = Journal(folder / "slots", str(time.monotonic_ns())).open("req-0", 10)
    slot.sent()
    return loop(slot.made)


def loop(work: Callable[[int], object]) -> float:
    began = time.perf_counter_ns()
    for _ in range(TOKENS):
        work(1)
    return (time.perf_counter_ns() - began) / TOKENS


def main() -> None:
    arguments = parser("ledger", "durability of the ledger").parse_args()
    options = {"rounds": arguments.rounds, "warmup": arguments.warmup}
    cases = []
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        for at_once in CALLS:
            run = partial(gate_run, folder, at_once)
            peers = {"on the disk first": partial(run, "power"), "in the database first": partial(run, has_budget=True)}
            cases += compare(f"{at_once} at once", "calls/s", run, peers, **options)
        nothing = {"an empty function": lambda: loop(lambda tokens: None)}
        cases += compare("a token", "ns", partial(count_run, folder), nothing, higher_is_better=False, **options)
    finish("ledger", arguments, cases, ["SQLAlchemy"])


if __name__ == "__main__":
    main()
