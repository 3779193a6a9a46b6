"""The whole service behind keys: kill -9 of front and engine, and what comes in that should not."""

import asyncio
import json
import signal
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import sqlalchemy as sa
from http_tools import LONG, call, wait_for
from starlette.requests import Request

from soma.base.errors import UserError
from soma.serve import protocol
from soma.serve.database import Database, ledger
from soma.serve.errors import ApiError
from soma.serve.gateway import Gateway
from soma.serve.keys.store import KeyStore
from soma.serve.ledger.recover import journals_of
from soma.serve.options import ServeOptions
from soma.serve.protocol import CompletionRequest, read_body
from soma.serve.running import running_service
from soma.serve.server import serve

PRICES = "currency: USD\nmodels: {tiny: {prompt: 1, cached: 0.25, completion: 2}}\n"
CANARY = "canary-7391-of-a-prompt"


@dataclass
class Kept:
    """A service that asks for keys."""

    url: str
    where: str
    prices: str
    log: Path
    key: str
    database: Database

    def post(self, path: str, body: Any, key: str | None = None) -> tuple[int, dict[str, str], bytes]:
        text = body if isinstance(body, str | bytes) else json.dumps(body)
        return call(self.url, "POST", path, text, self.headers(key))

    def headers(self, key: str | None = None) -> dict[str, str]:
        return {"Content-Type": "application/json", "Authorization": f"Bearer {key or self.key}"}

    def rows(self) -> dict[str, Any]:
        with self.database.read() as connection:
            return {row.id: row for row in connection.execute(sa.select(ledger))}


def start(folder: Path, model: Path) -> Iterator[Kept]:
    where, prices, log = str(folder / "keys.db"), folder / "prices.yaml", folder / "log"
    prices.write_text(PRICES)
    database = Database(where)
    key = KeyStore(database).create("someone", team="red")[1].text
    with running_service(model, keys=where, prices=str(prices), max_running=8, admin_port=0, log=log) as url:
        yield Kept(url, where, str(prices), log, key, database)
    database.close()


@pytest.fixture(scope="module")
def kept(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    yield from start(tmp_path_factory.mktemp("kept"), tiny_folder)


@dataclass
class Client:
    """One stream, and what it has got of it."""

    call_id: str = ""
    events: int = 0
    data: bytes = b""
    task: "asyncio.Task[None] | None" = None
    started: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self, kept: Kept, leave_after: int | None = None) -> None:
        parts = urlsplit(kept.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        body = json.dumps({**LONG, "stream": True, "logprobs": 0, "temperature": 0}).encode()
        head = (f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-API-Key: {kept.key}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        self.call_id = answer.partition("x-request-id: ")[2].partition("\r\n")[0]
        try:
            while line := await reader.readline():
                if line.startswith(b'data: {"id'):
                    value = json.loads(line[6:])["choices"][0]
                    self.events += len((value.get("logprobs") or {}).get("tokens", ()))
                    if self.events >= 3:
                        self.started.set()
                    if leave_after is not None and self.events >= leave_after:
                        return
        except ConnectionError:
            pass
        finally:
            writer.close()


async def streams(kept: Kept, number: int, kill: Any) -> list[Client]:
    """So many streams, and `kill()` when all of them have tokens."""
    clients = [Client() for _ in range(number)]
    tasks = [asyncio.create_task(client.read(kept)) for client in clients]
    for client in clients:
        await asyncio.wait_for(client.started.wait(), 120)
    kill()
    await asyncio.wait_for(asyncio.gather(*tasks), 120)
    return clients


def front_of(url: str) -> psutil.Process:
    """The service's process: the child of this one that listens there."""
    port = urlsplit(url).port
    for process in psutil.Process().children():
        if any(link.status == "LISTEN" and link.laddr.port == port for link in process.net_connections()):
            return process
    raise AssertionError("nobody listens there")


def all_settled(kept: Kept, calls: Iterable[str] = ()) -> bool:
    """Nothing is open, and these calls are among what is not."""
    rows = kept.rows()
    return rows.keys() >= set(calls) and all(row.settled_at is not None for row in rows.values())


def test_what_is_answered_is_what_is_booked(kept: Kept) -> None:
    """Whole answers, streams, several choices, embeddings, and a client that leaves."""
    status, headers, data = kept.post("/v1/completions", {**LONG, "max_tokens": 5, "n": 2})
    assert status == 200
    usage = json.loads(data)["usage"]
    _, embedding, _ = kept.post("/v1/embeddings", {"model": "tiny", "input": "hello"})
    left = Client()
    asyncio.run(left.read(kept, leave_after=4))
    assert wait_for(lambda: all_settled(kept, [headers["x-request-id"], embedding["x-request-id"], left.call_id]))
    rows = kept.rows()
    row = rows[headers["x-request-id"]]
    assert (row.prompt_tokens, row.completion_tokens) == (usage["prompt_tokens"], 10)
    assert row.nano == usage["prompt_tokens"] * 1000 + 10 * 2000
    assert (row.team, row.route, row.model, row.outcome) == ("red", "/v1/completions", "tiny", "ok")
    assert rows[embedding["x-request-id"]].completion_tokens == 0
    assert rows[embedding["x-request-id"]].prompt_tokens > 0
    assert rows[left.call_id].outcome == "abort"
    assert left.events <= rows[left.call_id].completion_tokens < 4000


def told_usage(data: bytes) -> Any:
    """Of an answer, whole or streamed."""
    if not data.startswith((b"data:", b"event:")):
        return json.loads(data)["usage"]
    events = [json.loads(line[5:]) for line in data.splitlines() if line.startswith(b"data: {")]
    return next(found for event in reversed(events) if (found := event.get("response", event).get("usage")))


def admin_url(kept: Kept) -> str:
    """Of the service, by the other port that its process listens on."""
    own = urlsplit(kept.url).port
    for process in psutil.Process().children(recursive=True):
        ports = {each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
        if own in ports:
            (other,) = ports - {own}
            return f"http://127.0.0.1:{other}"
    raise AssertionError("the service's process is not there")


def test_the_playground_of_its_admin_page(kept: Kept) -> None:
    """A chat with the model, counted under the key that was given."""
    admin, url = KeyStore(kept.database).create("root", role="admin")[1].text, admin_url(kept)
    assert wait_for(lambda: call(url, "GET", "/api/service", headers=kept.headers(admin))[0] == 200)
    assert json.loads(call(url, "GET", "/api/service", headers=kept.headers(admin))[2]) == {
        "graphs": False, "chat": True,
    }  # fmt: skip
    before = set(kept.rows())
    body = {"key": kept.key, "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0,
            "max_tokens": 7}  # fmt: skip
    status, _, data = call(url, "POST", "/api/playground/chat", json.dumps(body), kept.headers(admin))
    assert (status, data.endswith(b"data: [DONE]\n\n")) == (200, True)
    usage = next(found for line in data.split(b"\n") if line.startswith(b"data: {")
                 if (found := json.loads(line[6:]).get("usage")))  # fmt: skip
    assert wait_for(lambda: [row.completion_tokens for id, row in kept.rows().items() if id not in before] == [
        usage["completion_tokens"]
    ])  # fmt: skip
    (row,) = [row for id, row in kept.rows().items() if id not in before]
    assert (row.route, row.team) == ("/v1/chat/completions", "red")


def test_cached_tokens_are_told_and_cost_less(kept: Kept) -> None:
    """A prompt that came before is in the prefix cache but for its last token, in blocks of 16. Every route says so,
    whole and streamed, and the ledger counts it at its price."""
    ids = [3 + (7 * number) % 90 for number in range(80)]
    chat = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 4}]
    usage = {"include_usage": True}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": ids, "max_tokens": 2}),
        ("/v1/completions", {"prompt": [ids, ids], "n": 2, "max_tokens": 2}),
        ("/v1/completions", {"prompt": ids, "max_tokens": 2, "stream": True, "stream_options": usage}),
        ("/v1/chat/completions", {"messages": chat, "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": chat, "max_tokens": 2, "stream": True, "stream_options": usage}),
        ("/v1/responses", {"input": chat, "max_output_tokens": 2}),
        ("/v1/responses", {"input": chat, "max_output_tokens": 2, "stream": True}),
    ]
    seen, told = set(), {}
    for path, body in cases:
        status, headers, data = kept.post(path, {"model": "tiny", **body})
        assert status == 200, data
        found = told_usage(data)
        prompt = found.get("prompt_tokens", found.get("input_tokens"))
        cached = found.get("prompt_tokens_details", found.get("input_tokens_details"))["cached_tokens"]
        what = json.dumps(body.get("prompt") or "chat")[:12]
        each = prompt if len(body.get("prompt", ())) != 2 else prompt // 2
        assert cached == ((each - 1) // 16 * 16) * (prompt // each) if what in seen or prompt > each else cached == 0
        seen |= {what, json.dumps(ids)[:12]}
        told[headers["x-request-id"]] = (prompt, cached, found.get("completion_tokens", found.get("output_tokens")))
    v2 = {"text_input": "x" * 200, "parameters": {"max_tokens": 2, "return_num_cached_tokens": True}}
    answers = [json.loads(kept.post("/v2/models/tiny/generate", v2)[2]) for _ in range(2)]
    assert answers[0]["num_cached_tokens"] == 0 < answers[1]["num_cached_tokens"]
    assert wait_for(lambda: all_settled(kept, told))
    for call_id, (prompt, cached, made) in told.items():
        row = kept.rows()[call_id]
        assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (prompt, cached, made)
        assert row.nano == (prompt - cached) * 1000 + cached * 250 + made * 2000


def test_a_killed_engine(kept: Kept) -> None:
    """The front lives and books what it got; nothing waits for a restart of it."""
    (engine,) = front_of(kept.url).children()
    clients = asyncio.run(streams(kept, 4, lambda: engine.send_signal(signal.SIGKILL)))
    assert wait_for(lambda: all_settled(kept, [client.call_id for client in clients]))
    rows = kept.rows()
    for client in clients:
        row = rows[client.call_id]
        assert (row.outcome, row.estimated) == ("error", 0)
        assert row.completion_tokens == client.events  # every token went out before the error did
    assert wait_for(lambda: call(kept.url, "GET", "/health")[0] == 200, 120)


def test_a_killed_service(tiny_folder: Path, tmp_path: Path) -> None:
    """kill -9 of the front in the middle of 6 streams: the next start books every one of them, exactly once, with at
    least what its client has seen, and those that had ended as they were."""
    service = start(tmp_path, tiny_folder)
    kept = next(service)
    _, headers, data = kept.post("/v1/completions", {**LONG, "max_tokens": 5})
    front = front_of(kept.url)
    clients = asyncio.run(streams(kept, 6, front.kill))
    front.wait(60)
    (journal,) = journals_of(kept.database).iterdir()
    assert journal.suffix == ".slots"
    gateway = Gateway(kept.where, kept.prices)
    assert gateway.ledger.recovered >= 6
    rows = kept.rows()
    assert len(rows) == 7
    assert all_settled(kept)
    assert rows[headers["x-request-id"]].completion_tokens == json.loads(data)["usage"]["completion_tokens"]
    for client in clients:
        row = rows[client.call_id]
        assert (row.outcome, row.estimated) == ("killed", 0)
        assert client.events <= row.completion_tokens < 4000
        assert row.prompt_tokens > 0
        dear = row.prompt_tokens - row.cached_tokens
        assert row.nano == dear * 1000 + row.cached_tokens * 250 + row.completion_tokens * 2000
    gateway.close()
    assert list(journals_of(kept.database).iterdir()) == []
    service.close()  # type: ignore[attr-defined]


LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def raw(kept: Kept, data: bytes) -> bytes:
    """All that comes back for these bytes and a last request after them, with which the connection ends; if it was
    not ended before."""
    parts = urlsplit(kept.url)
    got = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as link, suppress(ConnectionError):
        link.sendall(data + LAST)
        while part := link.recv(65536):
            got += part
    return got


INNER = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-API-Key: KEY\r\n\r\n"
POST, GET = b"POST /health HTTP/1.1\r\nHost: x\r\n", b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
SMUGGLED = {
    "both lengths": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 60\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n",
    "hidden name": POST + b"Content-Length : 60\r\n\r\n",
    "folded": GET + b"X-API-Key: wrong\r\n KEY\r\n\r\n",
    "nul": GET + b"X-API-Key: KEY\0\r\n\r\n",
    "bare feed": b"GET /v1/models HTTP/1.1\nHost: x\nX-API-Key: wrong\n\n",
    "key in the line": b"GET /v1/models?X-API-Key=KEY HTTP/1.1\r\nHost: x\r\n\r\n",
    "underscore": GET + b"X_API_KEY: KEY\r\n\r\n",
}
AMBIGUOUS = ("both lengths", "two lengths", "chunked twice", "hidden name")


@pytest.mark.parametrize("name", SMUGGLED)
def test_nothing_is_smuggled(kept: Kept, name: str) -> None:
    """No key that stands where none belongs lets anybody in; a front server and this one cannot disagree on where a
    request ends, since what is ambiguous is refused and the connection closed."""
    got = raw(kept, SMUGGLED[name].replace(b"KEY", kept.key.encode()))
    assert b'"object":"list"' not in got
    if name in AMBIGUOUS:
        got = raw(kept, SMUGGLED[name] + INNER.replace(b"KEY", kept.key.encode()))
        assert b'"object":"list"' not in got
        assert got.count(b"HTTP/1.1 ") <= 1
    assert call(kept.url, "GET", "/health")[0] == 200


def test_the_control_of_smuggling(kept: Kept) -> None:
    """Two requests that follow each other are two answers: the test above can tell."""
    two = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + INNER.replace(b"KEY", kept.key.encode())
    got = raw(kept, two)
    assert got.count(b"HTTP/1.1 200") == 3
    assert b'"object":"list"' in got


def test_who_has_no_key_sends_no_body(kept: Kept) -> None:
    """The refusal does not wait for a gigabyte, nor for one that never comes."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    parts = urlsplit(kept.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=120) as link:
        link.sendall(head + b"Content-Length: 1000000000\r\n\r\n")
        assert link.recv(65536).startswith((b"HTTP/1.1 401", b"HTTP/1.1 429"))  # as many as came before it


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": "tiny", "prompt": "' + b"x" * (5 << 20) + b'"}', 413),
        (b'{"model": "tiny", "prompt": ' + b"[" * 200_000, 400),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
        (b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 100_000 + b"}", 400),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', 400),
        (b"", 400),
    ],
)
def test_bodies_that_are_too_much(kept: Kept, body: bytes, status: int) -> None:
    assert kept.post("/v1/completions", body)[0] == status
    assert call(kept.url, "GET", "/health")[0] == 200


def test_headers_that_are_too_much(kept: Kept) -> None:
    for data in (b"GET /health HTTP/1.1\r\nX: " + b"y" * 300_000 + b"\r\n\r\n",
                 b"GET /" + b"z" * 300_000 + b" HTTP/1.1\r\n\r\n"):  # fmt: skip
        got = raw(kept, data)
        assert not got.startswith(b"HTTP/1.1 5")
    assert call(kept.url, "GET", "/health")[0] == 200


def test_a_body_that_dawdles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "BODY_SECONDS", 0.05)
    parts = iter([b'{"model"', b": "])

    async def receive() -> dict[str, Any]:
        if (part := next(parts, None)) is None:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": part, "more_body": True}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(ApiError) as caught:
        asyncio.run(read_body(Request(scope, receive), CompletionRequest, 1000))
    assert (caught.value.status, caught.value.code) == (408, "body_too_slow")


def test_no_canary_sings(kept: Kept) -> None:
    """Keys, wrong ones too, and prompts are in no log, no metric, no error and not in the database."""
    secret = kept.key.split("_", 2)[2]
    wrong = "soma_0123456789_" + "Wr0ng-canary-secret-of-43-characters-abcdefg"[:43]
    told = []
    chat = {"model": "tiny", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 3}
    for path, body, key in (
        ("/v1/completions", {**LONG, "prompt": CANARY, "max_tokens": 3}, None), ("/v1/chat/completions", chat, None),
        ("/v1/chat/completions", chat, wrong), ("/v1/embeddings", {"model": "tiny", "input": CANARY}, None),
        ("/v1/completions", {**LONG, "prompt": CANARY * 400}, None), ("/v1/nowhere/" + CANARY, {}, wrong),
        ("/v1/completions", {"model": "no-such", "prompt": CANARY}, None), ("/tokenize", {"prompt": CANARY}, wrong),
    ):  # fmt: skip
        status, headers, data = kept.post(path, body, key)
        if status >= 400:
            told.append(json.dumps(headers) + data.decode())
    assert len(told) >= 5
    assert wait_for(lambda: all_settled(kept))
    metrics = call(kept.url, "GET", "/metrics", headers=kept.headers())[2].decode()
    files = [path for path in Path(kept.where).parent.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for words in (*told, metrics, *(path.read_bytes().decode("latin-1") for path in files)):
        for canary in (CANARY, secret, wrong):
            assert canary not in words
    assert "vllm:generation_tokens_total" in metrics


def test_prices_must_name_what_is_served(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text("currency: USD\nmodels: {other: {prompt: 1, completion: 2}}\n")
    where = str(tmp_path / "keys.db")
    Database(where).close()
    with pytest.raises(UserError, match="no price for 'tiny'"):
        serve(tiny_folder, ServeOptions(port=0, keys=where, prices=str(tmp_path / "prices.yaml"), in_process=True))
    with pytest.raises(UserError, match="go with the database"):
        serve(tiny_folder, ServeOptions(port=0, prices=str(tmp_path / "prices.yaml")))
    with pytest.raises(UserError, match="soma keys create"):
        serve(tiny_folder, ServeOptions(port=0, keys=str(tmp_path / "none.db")))


def test_beyond_loopback_with_keys_alone(tiny_folder: Path, tmp_path: Path) -> None:
    """With keys the host is not refused: what is wrong then is the port."""
    where = str(tmp_path / "keys.db")
    Database(where).close()
    with pytest.raises(UserError, match="keys \\(--keys"):
        serve(tiny_folder, ServeOptions(host="0.0.0.0", port=70_000))
    with pytest.raises(UserError, match="port 70000"):
        serve(tiny_folder, ServeOptions(host="0.0.0.0", port=70_000, keys=where))
