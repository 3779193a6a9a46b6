"""The ledger: every call written down before it runs and settled once, whatever happens; budgets that hold."""

import asyncio
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
from gateway_tools import Scripted, running_gateway
from http_tools import JSON, wait_for
from postgres import new_database

from soma.base.errors import UserError
from soma.serve.calls import Call, Caller, Gates, Passage, Usage
from soma.serve.database import Database, balances, ledger
from soma.serve.errors import ApiError
from soma.serve.gateway import Gateway
from soma.serve.keys.store import KeyStore
from soma.serve.ledger import book as book_module
from soma.serve.ledger import journal as journal_module
from soma.serve.ledger.book import Book, seconds_left
from soma.serve.ledger.journal import DeadJournal, Journal
from soma.serve.ledger.prices import load_prices
from soma.serve.ledger.recover import journals_of, recover
from soma.serve.ledger.report import as_csv, as_json, as_table, report

PRICES = "currency: usd\nmodels:\n  tiny: {prompt: 0.15, cached: 0.075, completion: 0.6}\n"


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "keys.db")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return new_database(request.getfixturevalue("postgres_url"))


@pytest.fixture
def prices(tmp_path: Path) -> str:
    path = tmp_path / "prices.yaml"
    path.write_text(PRICES)
    return str(path)


@pytest.fixture
def gateway(where: str, prices: str) -> Iterator[Gateway]:
    Database(where).close()
    made = Gateway(where, prices)
    yield made
    made.close()


@pytest.fixture
def local(tmp_path: Path, prices: str) -> Iterator[Gateway]:
    """One on SQLite."""
    where = str(tmp_path / "keys.db")
    Database(where).close()
    made = Gateway(where, prices)
    yield made
    made.close()


def a_call(prompt: int = 10, most: int = 20, caller: Caller | None = None, model: str = "tiny") -> Call:
    return Call("/v1/completions", model, "127.0.0.1", caller, prompt, most)


def rows_of(database: Database) -> dict[str, Any]:
    with database.read() as connection:
        return {row.id: row for row in connection.execute(sa.select(ledger))}


def settled(database: Database, number: int) -> bool:
    return wait_for(lambda: sum(row.settled_at is not None for row in rows_of(database).values()) == number)


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


def test_written_before_it_runs_and_settled_after(gateway: Gateway) -> None:
    call = a_call(caller=Caller("k1", "red"))
    call.tags["prompt"] = "greet@3"

    async def run() -> None:
        passage = await Gates(gateway.gates()).enter(call)
        row = rows_of(gateway.database)[call.id]
        assert (row.settled_at, row.reserved_prompt, row.reserved_completion) == (None, 10, 20)
        assert row.reserved_nano == 10 * 150 + 20 * 600
        check_balances(gateway.database)
        await passage.leave(Usage(10, 5, cached_tokens=4))

    asyncio.run(run())
    assert settled(gateway.database, 1)
    row = rows_of(gateway.database)[call.id]
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens, row.outcome) == (10, 4, 5, "ok")
    assert (row.nano, row.currency) == (6 * 150 + 4 * 75 + 5 * 600, "USD")
    assert (json.loads(row.tags), row.prompt) == ({"prompt": "greet@3"}, "greet@3")
    check_balances(gateway.database)


def test_many_calls_by_many_gateways(gateway: Gateway, where: str, prices: str) -> None:
    """Two services on one database, 200 calls at once under a budget for 60: 60 run, never more, and the sums agree."""
    other = Gateway(where, prices)
    store = KeyStore(gateway.database)
    key, _ = store.create("alice", team="red")
    store.set_budget("team:red", "month", 60 * 30, None)
    for each in (gateway, other):
        each.keyring.refresh()
    caller = Caller(key.id, "red")

    async def run() -> None:
        services = [Gates(each.gates()) for each in (gateway, other)]
        entering = [services[number % 2].enter(a_call(caller=caller)) for number in range(200)]
        ends = await asyncio.gather(*entering, return_exceptions=True)
        admitted = [end for end in ends if isinstance(end, Passage)]
        assert len(admitted) == 60
        refused = [(end.status, end.code) for end in ends if isinstance(end, ApiError)]
        assert refused == [(429, "budget_exceeded")] * 140
        check_balances(gateway.database)
        await asyncio.gather(*(passage.leave(Usage(10, 5)) for passage in admitted))

    asyncio.run(run())
    assert settled(gateway.database, 60)
    check_balances(gateway.database)
    other.close()
    line = report(gateway.database, ["team"])[0]
    assert (line.calls, line.prompt_tokens, line.completion_tokens) == (60, 600, 300)
    assert line.money == Decimal(60 * (10 * 150 + 5 * 600)) / 10**9


def test_budgets(local: Gateway) -> None:
    """Worst cases are held, what was used is kept: 100 tokens a day are one call of 30 that may run beside two that
    used 35 of them."""
    store = KeyStore(local.database)
    key, _ = store.create("alice", team="red")
    caller = Caller(key.id, "red")
    gates = Gates(local.gates())

    def bound(owner: str, period: str, tokens: int | None, money: str | None) -> None:
        store.set_budget(owner, period, tokens, None if money is None else Decimal(money))
        local.keyring.refresh()

    async def run() -> None:
        bound(f"key:{key.id}", "day", 95, None)
        first, second = await gates.enter(a_call(caller=caller)), await gates.enter(a_call(caller=caller))
        third = await gates.enter(a_call(caller=caller))
        with pytest.raises(ApiError, match=r"day's budget of this key .* 30 tokens, 5 left") as caught:
            await gates.enter(a_call(caller=caller))
        assert caught.value.retry_after is not None
        assert 0 < caught.value.retry_after <= 86_400
        await first.leave(Usage(10, 0))
        await second.leave(Usage(0, 0, outcome="refused"))
        assert await asyncio.to_thread(settled, local.database, 2)
        fourth = await gates.enter(a_call(caller=caller))
        await gates.enter(a_call(most=10))  # who has no key has no budget
        bound(f"key:{key.id}", "day", None, None)
        bound("team:red", "month", None, "0.000029")  # 29,000 billionths: the third and fourth hold 27,000
        with pytest.raises(ApiError, match=r"month's budget of this team .* 0.013500 USD, 0.000000 left|team"):
            await gates.enter(a_call(caller=caller))
        await third.leave(Usage(10, 0))
        await fourth.leave(Usage(10, 0))
        assert await asyncio.to_thread(settled, local.database, 4)
        last = await gates.enter(a_call(caller=caller))
        await last.leave(Usage())

    asyncio.run(run())
    assert settled(local.database, 5)
    check_balances(local.database)


def test_money_without_prices(tmp_path: Path) -> None:
    """Tokens are counted, money is nothing that is known; a budget in it lets nobody pass."""
    where = str(tmp_path / "keys.db")
    Database(where).close()
    gateway = Gateway(where)
    store = KeyStore(gateway.database)
    key, _ = store.create("alice")

    async def run() -> None:
        passage = await Gates(gateway.gates()).enter(a_call(caller=Caller(key.id)))
        await passage.leave(Usage(10, 5))
        store.set_budget(f"key:{key.id}", "day", None, Decimal(5))
        gateway.keyring.refresh()
        with pytest.raises(ApiError, match="no prices"):
            await Gates(gateway.gates()).enter(a_call(caller=Caller(key.id)))

    asyncio.run(run())
    assert settled(gateway.database, 1)
    (row,) = rows_of(gateway.database).values()
    assert (row.nano, row.currency, row.completion_tokens) == (None, None, 5)
    assert report(gateway.database)[0].unpriced == 1
    gateway.close()


def test_a_model_without_a_price(local: Gateway) -> None:
    with pytest.raises(ApiError, match="no price"):
        asyncio.run(Gates(local.gates()).enter(a_call(model="other")))
    assert rows_of(local.database) == {}
    with pytest.raises(UserError, match="no price for 'other'"):
        local.check_models(["tiny", "other"])


@pytest.mark.parametrize("told", [Usage(-5, 3), Usage(10, -1), Usage(10, 5, 11), Usage(10, 2**70), Usage(10, 5, -2)])
def test_an_upstream_that_lies(local: Gateway, told: Usage) -> None:
    """What cannot be is made to what can, and marked; nobody is credited by it."""
    call = a_call(caller=Caller("k"))

    async def run() -> None:
        passage = await Gates(local.gates()).enter(call)
        await passage.leave(told)

    asyncio.run(run())
    assert settled(local.database, 1)
    row = rows_of(local.database)[call.id]
    assert row.estimated == 1
    assert row.nano >= 0
    assert 0 <= row.cached_tokens <= row.prompt_tokens
    check_balances(local.database)


def test_a_killed_gateway_before_an_upstream(tmp_path: Path, prices: str) -> None:
    """What came back by then was counted in events, not in tokens: it is booked, and marked."""
    where = str(tmp_path / "keys.db")
    database = Database(where)
    key = KeyStore(database).create("someone")[1].text
    with Scripted(tokens=500, pause=0.02) as upstream:
        config = {"models": {"tiny": {"upstreams": [{"url": upstream.url}]}}, "keys": where, "prices": prices}
        with running_gateway(tmp_path, config) as gateway:
            parts = urlsplit(gateway.url)
            link = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
            body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 900}
            link.request("POST", "/v1/chat/completions", json.dumps(body), {**JSON, "X-API-Key": key})
            answer = link.getresponse()
            assert answer.status == 200
            for _ in range(10):
                answer.readline()
            gateway.process.kill()
            gateway.process.wait()
    again = Gateway(where, prices)
    assert again.ledger.recovered == 1
    (row,) = rows_of(database).values()
    assert (row.outcome, row.estimated, row.settled_at is not None) == ("killed", 1, True)
    assert 3 <= row.completion_tokens < 500
    assert row.prompt_tokens > 0
    again.close()


def test_who_leaves_while_the_row_is_written(local: Gateway) -> None:
    call = a_call(caller=Caller("k"))

    async def run() -> None:
        with local.database.write():  # nobody else can write meanwhile
            task = asyncio.create_task(Gates(local.gates()).enter(call))
            await asyncio.sleep(0.05)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert settled(local.database, 1)
    row = rows_of(local.database)[call.id]
    assert (row.outcome, row.prompt_tokens, row.nano) == ("refused", 0, 0)
    assert report(local.database) == []
    check_balances(local.database)


def test_a_database_that_fails(local: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing new runs; what ran is settled when it is back. A commit that broke off leaves nothing held."""
    gates = Gates(local.gates())
    real = book_module.write_batch
    broken = threading.Event()

    def fails(connection: sa.Connection, *arguments: Any) -> None:
        if broken.is_set():
            raise sa.exc.OperationalError("", {}, Exception("disk"))
        real(connection, *arguments)

    monkeypatch.setattr(book_module, "write_batch", fails)
    call = a_call()

    async def run() -> None:
        passage = await gates.enter(call)
        broken.set()
        await passage.leave(Usage(10, 7))
        with pytest.raises(ApiError) as caught:
            await gates.enter(a_call())
        assert (caught.value.status, caught.value.code) == (503, "ledger_unavailable")
        broken.clear()

    asyncio.run(run())
    assert settled(local.database, 1)
    assert rows_of(local.database)[call.id].completion_tokens == 7
    assert wait_for(lambda: not local.ledger.book.waiting)


def test_settling_twice_counts_once(local: Gateway) -> None:
    call = a_call(caller=Caller("k"))

    async def run() -> None:
        passage = await Gates(local.gates()).enter(call)
        await passage.leave(Usage(10, 5))
        passage.has_left = False
        await passage.leave(Usage(10, 9))

    asyncio.run(run())
    assert settled(local.database, 1)
    assert rows_of(local.database)[call.id].completion_tokens == 5
    check_balances(local.database)


# What a service does that will be killed: calls that make tokens, each of which it also writes to a witness first.
DOOMED = """
import asyncio, os, random, sys
from soma.serve.calls import Call, Caller, Gates, Usage
from soma.serve.gateway import Gateway
where, prices, witness, seed = sys.argv[1:]
dice = random.Random(int(seed))
out = os.open(witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
gateway = Gateway(where, prices)
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


def kill_at_random(where: str, prices: str, witness: Path, seed: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DOOMED, where, prices, str(witness), str(seed)], stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    count = witness.read_bytes().count(b"\n") if witness.exists() else 0
    more = random.Random(seed).randrange(50, 2000)
    assert wait_for(lambda: witness.exists() and witness.read_bytes().count(b"\n") > count + more)
    process.send_signal(signal.SIGKILL)
    process.wait()


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


def test_killed_at_random_the_ledger_equals_truth(where: str, prices: str, tmp_path: Path) -> None:
    Database(where).close()
    witness = tmp_path / "witness"
    for seed in range(3):
        kill_at_random(where, prices, witness, seed)
    gateway = Gateway(where, prices)
    assert check_against(witness, gateway.database) >= 1
    line = report(gateway.database, ["team"])[0]
    assert line.open == line.estimated == 0
    gateway.close()
    assert list(journals_of(Database(where)).iterdir()) == []


def test_without_the_journal_it_is_an_estimate(prices: str, tmp_path: Path) -> None:
    """The control of the test before: no counts, no truth. Nothing is dropped all the same."""
    where = str(tmp_path / "keys.db")
    Database(where).close()
    kill_at_random(where, prices, tmp_path / "witness", 7)
    database = Database(where)
    opened = [row.id for row in rows_of(database).values() if row.settled_at is None]
    assert opened
    for path in journals_of(database).iterdir():
        path.unlink()
    gateway = Gateway(where, prices)
    rows = rows_of(database)
    assert all(rows[call_id].estimated and rows[call_id].completion_tokens == 1000 for call_id in opened)
    with pytest.raises(AssertionError):
        check_against(tmp_path / "witness", database)
    check_balances(database)
    gateway.close()


def test_another_boot_makes_counts_estimates(tmp_path: Path, prices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = str(tmp_path / "keys.db")
    Database(where).close()
    kill_at_random(where, prices, tmp_path / "witness", 8)
    monkeypatch.setattr(journal_module, "boot_id", lambda: b"x" * 36)
    database = Database(where)
    opened = [row.id for row in rows_of(database).values() if row.settled_at is None]
    assert recover(database, journals_of(database), load_prices(prices)) == len(opened) > 0
    rows = rows_of(database)
    assert all(rows[call_id].estimated for call_id in opened)


def test_a_service_that_lives_is_left_alone(local: Gateway, tmp_path: Path, prices: str) -> None:
    """Another one that starts settles nothing of it, and has its own journal."""
    call = a_call()

    async def run() -> None:
        passage = await Gates(local.gates()).enter(call)
        other = Gateway(str(tmp_path / "keys.db"), prices)
        assert other.ledger.recovered == 0
        assert rows_of(local.database)[call.id].settled_at is None
        other.close()
        await passage.leave(Usage(1, 2))

    asyncio.run(run())
    assert settled(local.database, 1)


def test_the_journal_grows_and_forgets(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "host-1")
    slots = [journal.open(f"req-{number:024x}", number) for number in range(700)]
    for number, slot in enumerate(slots):
        slot.made(5)
        if number % 2:
            slot.sent()
    assert DeadJournal.take(journal.path) is None  # it lives
    for slot in slots[:600]:
        slot.end(Usage(1, 2, 3))
        slot.free()
        slot.free()  # the second time is nothing
        slot.made(100)  # what comes late counts for nobody
    again = journal.open("again", 0)
    assert again.completion_tokens == 0
    journal.close(remove=False)
    dead = DeadJournal.take(journal.path)
    assert dead is not None
    assert set(dead.counts) == {f"req-{number:024x}" for number in range(600, 700)} | {"again"}
    unsent, sent = dead.counts[f"req-{600:024x}"].usage, dead.counts[f"req-{601:024x}"].usage
    assert (unsent.prompt_tokens, sent.prompt_tokens, sent.completion_tokens) == (0, 601, 5)
    dead.close(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_meters_of_several_threads(tmp_path: Path) -> None:
    """n choices over several engines count into one slot."""
    journal = Journal(tmp_path, "host-1")
    slot = journal.open("a", 1)
    slot.sent()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: [slot.made(1) for _ in range(3000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert slot.completion_tokens == 12_000


def test_a_closing_book_writes_what_waits(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "keys.db"))
    book = Book(database)
    started = time.monotonic()
    assert book.close()
    assert time.monotonic() - started < 20
    assert not book.thread.is_alive()


@pytest.mark.parametrize(
    ("period", "now", "seconds"),
    [
        ("day", "2026-11-26T23:59:00", 60),
        ("month", "2026-11-30T23:00:00", 3601),
        ("month", "2026-12-31T23:59:59", 2),
    ],
)
def test_when_a_budget_is_new(period: str, now: str, seconds: int) -> None:
    from datetime import datetime

    assert seconds_left(period, int(datetime.fromisoformat(now + "+00:00").timestamp() * 1000)) == seconds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: {}", "expected `currency`"),
        ("currency: dollars\nmodels: {}", "three letters"),
        ("currency: USD\nmodels: {a: {prompt: 1}}", r"models\.a: expected prompt and completion"),
        ("currency: USD\nmodels: {a: {prompt: 1, completion: -1}}", r"models\.a\.completion: expected a number"),
        ("currency: USD\nmodels: {a: {prompt: 1, completion: free}}", r"models\.a\.completion"),
        ("currency: USD\nmodels: {a: {prompt: 1, completion: .nan}}", "no decimal|a number"),
        ("currency: USD\nmodels: {a: {prompt: 1, completion: 1, image: 1}}", "expected prompt"),
        ("currency: [", "not valid YAML"),
    ],
)
def test_price_files_that_are_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_prices(str(path))


def test_prices_are_exact(prices: str) -> None:
    found = load_prices(prices)
    assert found.cost("tiny", 1000, 0, 200) == 150_000 + 120_000  # the docstring's figures
    assert found.cost("tiny", 3, 2, 0) == 150 + 150
    assert found.most("tiny", 10, 1) == 10 * 150 + 600


def test_reports(local: Gateway) -> None:
    store = KeyStore(local.database)
    key, _ = store.create("alice", team="red")

    async def run() -> None:
        gates = Gates(local.gates())
        for number in range(4):
            passage = await gates.enter(a_call(caller=Caller(key.id, "red") if number else None))
            await passage.leave(Usage(10, number, outcome="abort" if number == 3 else "ok", estimated=number == 3))
        await gates.enter(a_call())

    asyncio.run(run())
    assert settled(local.database, 4)
    lines = report(local.database, ["name", "team"])
    assert [(line.by["name"], line.calls, line.open, line.estimated) for line in lines] == [
        (None, 2, 1, 0),
        ("alice", 3, 0, 1),
    ]
    assert lines[1].money == Decimal(30 * 150 + 6 * 600) / 10**9
    head, *rows = as_csv(lines, ["name", "team"]).splitlines()
    assert head.startswith("name,team,calls,open,estimated,unpriced,prompt_tokens")
    assert rows[1] == "alice,red,3,0,1,0,30,0,6,0.0000081,USD"
    assert json.loads(as_json(lines))[1]["money"] == "0.0000081"
    assert as_table(lines, ["name", "team"]).splitlines()[2].startswith("alice  red")
    day = report(local.database, ["day"])[0].by["day"]
    assert report(local.database, ["day"], since=day, until=day)
    assert report(local.database, ["day"], until="2000-01-01") == []
    with pytest.raises(UserError, match="expected some of"):
        report(local.database, ["words"])
    with pytest.raises(UserError, match="since"):
        report(local.database, since="yesterday")


def test_commands(local: Gateway, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from soma.cli import app as command

    async def run() -> None:
        passage = await Gates(local.gates()).enter(a_call())
        await passage.leave(Usage(10, 5))

    asyncio.run(run())
    assert settled(local.database, 1)
    where = ["--database", str(tmp_path / "keys.db")]

    def say(*words: str) -> str:
        result = CliRunner().invoke(command, ["ledger", *words, *where], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert say("report", "--by", "model").split()[-3:] == ["5", "0.0000045", "USD"]
    assert say("report", "--by", "model", "--format", "csv").splitlines()[1] == "tiny,1,0,0,0,10,0,5,0.0000045,USD"
    assert json.loads(say("report", "--format", "json"))[0]["completion_tokens"] == 5
    assert say("backup", str(tmp_path / "copy.db")).strip() == str(tmp_path / "copy.db")
    copy = Database(str(tmp_path / "copy.db"))
    assert len(rows_of(copy)) == 1
    with copy.write() as connection:  # a machine that went away with a call
        row = dict(rows_of(local.database)).popitem()[1]._mapping
        lost = {**row, "id": "x", "instance": "gone-host-abc", "settled_at": None}
        connection.execute(ledger.insert().values(**lost))
    where[1] = str(tmp_path / "copy.db")
    assert say("estimate", "gone-host").startswith("1 calls")
    assert rows_of(copy)["x"].estimated == 1
