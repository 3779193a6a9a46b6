"""The ledger: every call written down before it runs and settled once, whatever happens; budgets that hold."""

import asyncio
import http.client
import json
import os
import resource
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
from gateway_tools import Scripted, running_gateway
from http_tools import JSON, wait_for
from ledger_tools import CRASHING, check_against, check_balances, kill_at_random, rows_of, start_python, with_budget
from postgres import new_database

from soma.base.errors import UserError
from soma.serve.calls import Call, Caller, Gates, Passage, Usage
from soma.serve.database import Database, ledger
from soma.serve.errors import ApiError
from soma.serve.gateway import Gateway
from soma.serve.keys.store import KeyStore
from soma.serve.ledger import book as book_module
from soma.serve.ledger import journal as journal_module
from soma.serve.ledger.book import Book, new_row, seconds_left
from soma.serve.ledger.journal import CHUNK, HEAD, ID_BYTES, SLOT, DeadJournal, Journal
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


def settled(database: Database, number: int) -> bool:
    return wait_for(lambda: sum(row.settled_at is not None for row in rows_of(database).values()) == number)


def test_written_before_it_runs_and_settled_after(gateway: Gateway) -> None:
    call = a_call(caller=Caller("k1", "red"))
    call.tags["prompt"] = "greet@3"

    async def run() -> None:
        passage = await Gates(gateway.gates()).enter(call)
        assert [path.suffix for path in journals_of(gateway.database).iterdir()] == [".slots"]
        assert call.id.encode() in next(journals_of(gateway.database).iterdir()).read_bytes()
        assert await asyncio.to_thread(wait_for, lambda: rows_of(gateway.database))
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


def test_who_leaves_while_the_row_is_written(tmp_path: Path, prices: str) -> None:
    call = a_call(caller=Caller("k0"))
    with_budget(where := str(tmp_path / "keys.db")).close()
    local = Gateway(where, prices)

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
    local.close()


def test_a_database_that_fails(local: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing new runs; what ran is settled when it is back. A commit that broke off leaves nothing held."""
    gates = Gates(local.gates())
    real = book_module.write_batch
    broken = threading.Event()

    def fails(connection: sa.Connection, *arguments: Any, **options: Any) -> None:
        if broken.is_set():
            raise sa.exc.OperationalError("", {}, Exception("disk"))
        real(connection, *arguments, **options)

    monkeypatch.setattr(book_module, "write_batch", fails)
    call = a_call()

    async def run() -> None:
        passage = await gates.enter(call)
        broken.set()
        await passage.leave(Usage(10, 7))
        assert await asyncio.to_thread(wait_for, lambda: local.ledger.book.is_away)
        with pytest.raises(ApiError) as caught:
            await gates.enter(a_call())
        assert (caught.value.status, caught.value.code) == (503, "ledger_unavailable")
        broken.clear()

    asyncio.run(run())
    assert settled(local.database, 1)
    assert rows_of(local.database)[call.id].completion_tokens == 7
    assert wait_for(lambda: not local.ledger.book.waiting)


def test_a_commit_that_came_through_and_said_it_failed(local: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again, and nothing counts twice."""
    real, failures = local.database.write, [True]

    @contextmanager
    def breaks(**options: Any) -> Iterator[sa.Connection]:
        with real(**options) as connection:
            yield connection
        if failures and failures.pop():
            raise ConnectionError

    monkeypatch.setattr(local.database, "write", breaks)
    calls = [a_call(caller=Caller("k")) for _ in range(3)]

    async def run() -> None:
        passages = [await Gates(local.gates()).enter(call) for call in calls]
        await passages[0].leave(Usage(10, 7))
        assert await asyncio.to_thread(wait_for, lambda: not failures and len(rows_of(local.database)) == 3)
        await passages[1].leave(Usage(10, 8))

    asyncio.run(run())
    assert settled(local.database, 2)
    assert [rows_of(local.database)[call.id].completion_tokens for call in calls] == [7, 8, 0]
    check_balances(local.database)


def test_far_behind(local: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that does not keep up is not owed more than so many rows."""
    monkeypatch.setattr(book_module, "MOST_BEHIND", 5)

    async def run() -> None:
        gates = Gates(local.gates())
        with local.database.write():  # nobody else can write meanwhile
            for _ in range(6):
                await gates.enter(a_call())
            with pytest.raises(ApiError, match="cannot be written"):
                await gates.enter(a_call())

    asyncio.run(run())
    assert wait_for(lambda: len(rows_of(local.database)) == 6)


def test_a_full_disk(local: Gateway) -> None:
    """No slot, no call; those that run go on, and new ones come when there is room again. A limit on the size of files
    stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def run() -> None:
        gates = Gates(local.gates())
        first = [await gates.enter(a_call()) for _ in range(CHUNK // SLOT)]
        assert await asyncio.to_thread(wait_for, lambda: len(rows_of(local.database)) == len(first))
        resource.setrlimit(resource.RLIMIT_FSIZE, (HEAD + CHUNK, before[1]))
        try:
            with pytest.raises(ApiError, match="cannot be written") as caught:
                await gates.enter(a_call())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.status == 503
        last = await gates.enter(a_call())
        for passage in (*first, last):
            await passage.leave(Usage(1, 1))
        assert await asyncio.to_thread(settled, local.database, len(first) + 1)

    asyncio.run(run())


def test_a_journal_that_cannot_be_synced(tmp_path: Path, prices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With durability `power` every call waits for the disk, and none runs whose row is not on it."""
    Database(where := str(tmp_path / "keys.db")).close()
    gateway = Gateway(where, prices, "power")
    syncs = []

    def fails() -> None:
        syncs.append(1)
        raise OSError(5, "Input/output error")

    async def run() -> None:
        gates = Gates(gateway.gates())
        passage = await gates.enter(a_call())
        await passage.leave(Usage(1, 1))
        monkeypatch.setattr(gateway.ledger.journal, "sync", fails)
        with pytest.raises(ApiError, match="cannot be written"):
            await gates.enter(a_call())
        assert syncs
        monkeypatch.undo()
        passages = await asyncio.gather(*(gates.enter(a_call()) for _ in range(20)))
        for each in passages:
            await each.leave(Usage(1, 1))

    asyncio.run(run())
    assert settled(gateway.database, 21)
    assert len(rows_of(gateway.database)) == 21
    gateway.close()
    with pytest.raises(UserError, match="durability 'disk': expected process or power"):
        Gateway(where, prices, "disk")


def test_a_row_too_long_for_its_slot(local: Gateway) -> None:
    """It goes to the database before its call runs."""
    call = a_call()
    call.tags["graph"] = "x" * 2000

    async def run() -> None:
        passage = await Gates(local.gates()).enter(call)
        assert call.id in rows_of(local.database)
        await passage.leave(Usage(1, 1))

    asyncio.run(run())
    assert settled(local.database, 1)


def test_a_torn_row_is_none(tmp_path: Path) -> None:
    """Half a row, a row of another call, a byte that turned: the checksum sees it."""
    journal = Journal(tmp_path, "host-1")
    slots = [journal.open(f"call-{number}", 1) for number in range(4)]
    for slot in slots:
        assert slot.write(b"a row of the ledger")
    slots[1].text[ID_BYTES + 12] ^= 1
    slots[2].text[:6] = b"call-9"
    slots[3].forget()
    journal.close(remove=False)
    dead = DeadJournal.take(journal.path)
    assert dead is not None
    whole = {"call-0": b"a row of the ledger", "call-1": None, "call-9": None, "call-3": None}
    assert {name: counts.row for name, counts in dead.counts.items()} == whole
    dead.close(remove=True)


def test_a_journal_of_the_first_format(tmp_path: Path, prices: str) -> None:
    """A service from before rows stood in slots was killed: its counts settle its rows all the same."""
    database = Database(str(tmp_path / "keys.db"))
    row = new_row(a_call(), "host-old", 100, "USD")
    with database.write() as connection:
        connection.execute(ledger.insert().values(**row))
    folder = journals_of(database)
    folder.mkdir()
    words = struct.pack("<6Q", 2, 10, 3, 0, 0, 0)  # sent: 10 tokens in, 3 out so far
    head = (b"SOMASLT1" + journal_module.boot_id()).ljust(HEAD, b"\0")
    (folder / "host-old.slots").write_bytes(head + words + row["id"].encode().ljust(80, b"\0"))
    assert recover(database, folder, load_prices(prices)) == 1
    after = rows_of(database)[row["id"]]
    assert (after.prompt_tokens, after.completion_tokens, after.outcome, after.estimated) == (10, 3, "killed", 0)


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


def test_killed_at_random_the_ledger_equals_truth(where: str, prices: str, tmp_path: Path) -> None:
    """Twice one service, then two on one database, of which the first is killed and settled while the other runs."""
    with_budget(where).close()
    witness = tmp_path / "witness"
    for seed, services in ((0, 1), (1, 1), (2, 2)):
        kill_at_random(where, prices, witness, seed, services)
    gateway = Gateway(where, prices)
    assert check_against(witness, gateway.database) >= 1
    line = report(gateway.database, ["team"])[0]
    assert line.open == line.estimated == 0
    gateway.close()
    assert list(journals_of(Database(where)).iterdir()) == []


def crash_at_lines(tmp_path: Path, prices: str, first: int, step: int) -> tuple[int, int]:
    """Kill a service when it has run `first`, `first + step`… lines of the ledger's code, until it comes to its end;
    after each the next start makes the ledger equal to what a witness saw. The kills, and the calls they cut off."""
    template = tmp_path / "template.db"
    with_budget(str(template)).close()
    for number in range(first, 4000, step):  # children open copies: no schema is made under the tracer's eyes
        (tmp_path / f"{number}.db").write_bytes(template.read_bytes())
    process = start_python(CRASHING, tmp_path, prices, first, step)
    assert process.wait(600) == 0
    cut = kills = 0
    for witness in tmp_path.glob("*.witness"):
        gateway = Gateway(str(witness.with_suffix(".db")), prices)
        cut += check_against(witness, gateway.database)
        gateway.close()
        assert list(journals_of(gateway.database).iterdir()) == []
        kills += 1
    return kills - 1, cut


def test_killed_at_any_line(tmp_path: Path, prices: str) -> None:
    """At a few places, which differ from run to run; other ones where none of them cut off a call."""
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        kills, cut = crash_at_lines(folder, prices, first=150 + (os.getpid() + 83 * attempt) % 301, step=301)
        assert kills >= 2
        if cut:
            return
    raise AssertionError("no call was under way at any of the kills")


@pytest.mark.slow
def test_killed_at_every_line(tmp_path: Path, prices: str) -> None:
    kills, cut = crash_at_lines(tmp_path, prices, first=1, step=7)
    assert kills >= 50
    assert cut >= 1  # calls that were under way when it died


def test_without_the_journal_it_is_an_estimate(prices: str, tmp_path: Path) -> None:
    """The control of the test before: no counts, no truth. Nothing is dropped all the same."""
    where = str(tmp_path / "keys.db")
    with_budget(where, "team:red").close()  # all rows are in the database before their calls run
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
    with_budget(where).close()
    kill_at_random(where, prices, tmp_path / "witness", 8)
    monkeypatch.setattr(journal_module, "boot_id", lambda: b"x" * 36)
    database = Database(where)
    opened = [row.id for row in rows_of(database).values() if row.settled_at is None]
    before = set(rows_of(database))
    assert recover(database, journals_of(database), load_prices(prices)) >= max(1, len(opened))
    rows = rows_of(database)
    assert all(row.settled_at is not None for row in rows.values())
    assert all(rows[call_id].estimated for call_id in {*opened, *(set(rows) - before)})
    check_balances(database)


def test_a_service_that_lives_is_left_alone(local: Gateway, tmp_path: Path, prices: str) -> None:
    """Another one that starts settles nothing of it, and has its own journal."""
    call = a_call()

    async def run() -> None:
        passage = await Gates(local.gates()).enter(call)
        other = Gateway(str(tmp_path / "keys.db"), prices)
        assert other.ledger.recovered == 0
        assert await asyncio.to_thread(wait_for, lambda: rows_of(local.database))
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
