"""Services that are killed, and what they leave held against what a witness saw."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from http_tools import wait_for

from soma.serve.database import Database, balances, budgets, ledger

# What a service does that will be killed: calls that make tokens, each of which it also writes to a witness first.
# Calls of k0 are under a budget, so their rows go to the database at once; the others' go to the journal.
DOOMED = """
import asyncio, os, random, sys
from soma.serve.calls import Call, Caller, Gates, Usage
from soma.serve.gateway import Gateway
where, prices, witness, seed = sys.argv[1:]
dice = random.Random(int(seed))
out = os.open(witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
gateway = Gateway(where, prices, ("process", "power")[int(seed) % 2])
gates = Gates(gateway.gates())
async def one(number):
    call = Call("/v1/completions", "tiny", "", Caller(f"k{number % 3}", "red"), 10, 1000)
    os.write(out, f"begins {call.id}\\n".encode())
    passage = await gates.enter(call)
    os.write(out, f"runs {call.id}\\n".encode())
    call.meter.sent()
    made = 0
    for _ in range(dice.randrange(200)):
        os.write(out, f"makes {call.id}\\n".encode())
        call.meter.made(1)
        os.write(out, f"made {call.id}\\n".encode())
        made += 1
        if dice.random() < 0.2:
            await asyncio.sleep(0.002)
    await passage.leave(Usage(10, made))
    os.write(out, f"ends {call.id}\\n".encode())
async def main():
    running = set()
    for number in range(10**6):
        running.add(asyncio.ensure_future(one(number)))
        if len(running) >= 8:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
print("ready", flush=True)
asyncio.run(main())
"""

# The same at a chosen line: children of one process that die when the ledger's modules have run so many lines.
CRASHING = """
import asyncio, os, signal, sys, threading, traceback
from soma.serve.calls import Call, Caller, Gates, Usage
from soma.serve.gateway import Gateway
from soma.serve.ledger import book
book.FLUSH = 0.001
folder, prices, first, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def traced(last):
    lines = 0
    def line(frame, event, _):
        nonlocal lines
        if event == "line":
            lines += 1
            if lines >= last:
                os.kill(os.getpid(), signal.SIGKILL)
        return line
    def scope(frame, event, _):
        name = frame.f_code.co_filename
        return line if "/serve/ledger/" in name or name.endswith("/serve/database.py") else None
    return scope

async def calls(gates, say):
    for number in range(3):  # k0 has a budget
        call = Call("/v1/completions", "tiny", "", Caller(f"k{number % 2}", "red"), 10, 1000)
        say("begins", call)
        passage = await gates.enter(call)
        say("runs", call)
        call.meter.sent()
        for _ in range(2):
            say("makes", call)
            call.meter.made(1)
            say("made", call)
        await passage.leave(Usage(10, 2))
        say("ends", call)
        await asyncio.sleep(0.004)

def child(last):
    out = os.open(f"{folder}/{last}.witness", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    gateway = Gateway(f"{folder}/{last}.db", prices, ("process", "power")[last // step % 2])
    scope = traced(last)
    threading.settrace(scope)
    book_thread = gateway.ledger.book
    gateway.ledger.book = book.Book(gateway.database, relaxed=book_thread.relaxed)  # one whose thread is traced
    book_thread.close()
    sys.settrace(scope)
    asyncio.run(calls(Gates(gateway.gates()), lambda what, call: os.write(out, f"{what} {call.id}\\n".encode())))
    gateway.close()

last = first
while True:
    pid = os.fork()
    if pid == 0:
        try:
            child(last)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(os.waitstatus_to_exitcode(status))  # it came to its end
    last += step
"""


def start_python(code: str, *arguments: object) -> "subprocess.Popen[bytes]":
    """A Python that imports what this one does."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip


def with_budget(where: str, owner: str = "key:k0") -> Database:
    """A database in which somebody has a budget that holds nobody back."""
    database = Database(where)
    with database.write() as connection:
        connection.execute(budgets.insert().values(owner=owner, period="day", tokens=2**50, nano=None))
    return database


def kill_at_random(where: str, prices: str, witness: Path, seed: int, services: int = 1) -> None:
    """Start services on one database, and kill them one after the other while they run."""
    processes = [start_python(DOOMED, where, prices, witness, seed + number) for number in range(services)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    dice = random.Random(seed)
    for process in processes:
        enough = lines_in(witness) + dice.randrange(50, 2000)
        assert wait_for(lambda enough=enough: lines_in(witness) > enough)
        process.send_signal(signal.SIGKILL)
        process.wait()


def lines_in(witness: Path) -> int:
    return witness.read_bytes().count(b"\n") if witness.exists() else 0


def rows_of(database: Database) -> dict[str, Any]:
    with database.read() as connection:
        return {row.id: row for row in connection.execute(sa.select(ledger))}


def check_balances(database: Database) -> None:
    """The balances are the ledger's own sums."""
    expected: dict[tuple[str, str], list[int]] = {}
    for row in rows_of(database).values():
        owners = [f"key:{row.key_id}"] * (row.key_id is not None) + [f"team:{row.team}"] * (row.team is not None)
        for name in [(owner, period) for owner in owners for period in (row.day, row.day[:7])]:
            sums = expected.setdefault(name, [0, 0, 0, 0])
            if row.settled_at is None:
                sums[2] += row.reserved_prompt + row.reserved_completion
                sums[3] += row.reserved_nano or 0
            else:
                sums[0] += row.prompt_tokens + row.completion_tokens
                sums[1] += row.nano or 0
    with database.read() as connection:
        found = {(row.owner, row.period): list(row[2:]) for row in connection.execute(sa.select(balances))}
    assert {name: sums for name, sums in found.items() if any(sums)} == {k: v for k, v in expected.items() if any(v)}


def check_against(witness: Path, database: Database) -> int:
    """The ledger has every call that ran, once, with every token: exactly, but for one that was being made at the
    moment of the kill. Returns how many calls the kills cut off."""
    seen: dict[str, dict[str, int]] = {}
    for line in witness.read_text().splitlines():
        what, _, call_id = line.partition(" ")
        counts = seen.setdefault(call_id, {"begins": 0, "runs": 0, "makes": 0, "made": 0, "ends": 0})
        counts[what] += 1
    rows = rows_of(database)
    assert set(rows) <= set(seen)
    cut = 0
    for call_id, counts in seen.items():
        if call_id not in rows:
            assert not counts["runs"]
            continue
        row = rows[call_id]
        assert row.settled_at is not None
        assert not row.estimated
        assert counts["made"] <= row.completion_tokens <= counts["makes"] <= counts["made"] + 1
        if counts["ends"]:
            assert (row.completion_tokens, row.prompt_tokens, row.outcome) == (counts["made"], 10, "ok")
        else:
            cut += 1
            assert row.prompt_tokens in ((10,) if counts["makes"] else (0, 10))
            assert row.outcome in ("killed", "ok")
    check_balances(database)
    return cut
