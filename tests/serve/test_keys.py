"""Who is let in: every route without a key, with keys that are no more, with keys of a lower scope."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from http_tools import wait_for

from soma.base.errors import UserError
from soma.serve.calls import Call, Caller
from soma.serve.database import Database, keys
from soma.serve.errors import ApiError
from soma.serve.gateway import Gateway
from soma.serve.keys import keyring as keyring_module
from soma.serve.keys.door import FAILURES, PUBLIC, Failures, ModelScope, credentials, may_reach
from soma.serve.keys.secret import hash_of, is_same, new_secret, prefix_of
from soma.serve.keys.store import KeyStore

BODY = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2}


@pytest.fixture(autouse=True)
def _forget_failures(key_gateway: Gateway) -> None:
    key_gateway.guard.failures = Failures()


@pytest.fixture
def store(key_gateway: Gateway) -> KeyStore:
    return KeyStore(key_gateway.database)


@pytest.fixture(scope="module")
def client(keyed_app: Any) -> Iterator[TestClient]:
    with TestClient(keyed_app, follow_redirects=False) as made:
        yield made


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def made(key_gateway: Gateway, **options: Any) -> tuple[str, str]:
    """A new key that the service knows: id and text."""
    key, secret = KeyStore(key_gateway.database).create("someone", **options)
    key_gateway.keyring.refresh()
    return key.id, secret.text


def routes_of(app: Any) -> list[tuple[str, str]]:
    """Every method and path that the application answers, parameters filled in."""
    return [
        (method, re.sub(r"\{[^}]*\}", "tiny", route.path))
        for route in app.routes for method in sorted(route.methods)
    ]  # fmt: skip


def test_every_route_is_shut(keyed_app: Any, client: TestClient, key_gateway: Gateway, store: KeyStore) -> None:
    """Without a key, with a wrong, a revoked, an expired one, with an admin's: 401 or 403, never the route itself."""
    revoked_id, revoked = made(key_gateway)
    store.revoke(revoked_id)
    expired_id, expired = made(key_gateway)
    store.expire(expired_id, 0)
    narrow = made(key_gateway, routes=["/nothing"])[1]
    admin = made(key_gateway, role="admin")[1]
    key_gateway.keyring.refresh()
    walked = 0
    for method, path in routes_of(keyed_app):
        for text, status in ((None, 401), ("nonsense", 401), (new_secret().text, 401), (revoked, 401), (expired, 401),
                             (narrow, 403), (admin, 403)):  # fmt: skip
            key_gateway.guard.failures = Failures()
            answer = client.request(method, path, headers=bearer(text) if text else {})
            if path in PUBLIC:
                assert answer.status_code not in (401, 403), path
                continue
            assert answer.status_code == status, (method, path, text)
            assert ("www-authenticate" in answer.headers) == (status == 401)
            walked += 1
    assert walked >= 7 * 8
    assert {path for _, path in routes_of(keyed_app) if path in PUBLIC} >= {"/", "/health"}


def test_no_way_around_by_spelling(client: TestClient) -> None:
    for path in ("/v1/models/", "//v1/models", "/V1/models", "/health/../v1/models", "/%76%31/models", "/v1//models",
                 "/health%2f..%2fv1/models", "/nowhere", "/health?x=/v1/models/../..", "/./v1/models"):  # fmt: skip
        answer = client.get(path)
        assert answer.status_code == 401 or path.startswith("/health?"), path
    answer = client.request("GET", "/v1/models", headers={"X-Original-URL": "/health", "X-Rewrite-URL": "/health"})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    ("headers", "admitted"),
    [
        ([("Authorization", "Bearer KEY")], True),
        ([("authorization", "bearer  KEY ")], True),
        ([("X-API-Key", "KEY")], True),
        ([("Authorization", "KEY")], False),
        ([("Authorization", "Basic KEY")], False),
        ([("Authorization", "Bearer KEYx")], False),
        ([("Authorization", "Bearer ")], False),
        ([("Cookie", "api_key=KEY")], False),
        ([("Authorization", "Bearer KEY"), ("Authorization", "Bearer KEY")], False),
        ([("Authorization", "Bearer KEY"), ("X-API-Key", "KEY")], False),
        ([("X-API-Key", "other"), ("X-API-Key", "KEY")], False),
        ([("Proxy-Authorization", "Bearer KEY")], False),
    ],
)
def test_how_a_key_is_given(
    client: TestClient, key_gateway: Gateway, headers: list[tuple[str, str]], admitted: bool
) -> None:
    text = made(key_gateway)[1]
    answer = client.get("/v1/models", headers=[(name, value.replace("KEY", text)) for name, value in headers])
    assert answer.status_code == (200 if admitted else 401)
    assert client.get(f"/v1/models?api_key={text}").status_code == 401
    if not admitted:
        assert answer.json()["error"]["type"] == "authentication_error"
        assert text not in answer.text


def test_models_and_routes_that_a_key_may_use(client: TestClient, key_gateway: Gateway) -> None:
    other = bearer(made(key_gateway, models=["llama-*"])[1])
    assert client.get("/v1/models", headers=other).json()["data"] == []
    refused = [
        client.post("/v1/completions", json=BODY, headers=other),
        client.post("/tokenize", json={"prompt": "x"}, headers=other),
        client.post("/detokenize", json={"tokens": [5]}, headers=other),
        client.get("/v1/models/tiny", headers=other),
    ]
    assert [answer.status_code for answer in refused] == [403] * 4
    assert refused[0].json()["error"] == {
        "message": "this key may not use the model `tiny`", "type": "permission_error", "param": "model",
        "code": "model_not_allowed",
    }  # fmt: skip
    fitting = bearer(made(key_gateway, models=["llama-*", "ti?y"], routes=["/v1/comp*"])[1])
    assert client.post("/v1/completions", json=BODY, headers=fitting).status_code == 200
    assert client.post("/v1/chat/completions", json=BODY, headers=fitting).status_code == 403
    assert client.get("/v1/models", headers=fitting).status_code == 403


def test_managing_must_be_granted_by_name(client: TestClient, key_gateway: Gateway) -> None:
    body = {"lora_name": "a", "lora_path": "/x"}
    plain, named = bearer(made(key_gateway)[1]), bearer(made(key_gateway, routes=["*"])[1])
    assert client.post("/v1/load_lora_adapter", json=body, headers=plain).json()["error"]["code"] == "route_not_allowed"
    assert (
        client.post("/v1/load_lora_adapter", json=body, headers=named).json()["error"]["code"] == "adapter_loading_off"
    )
    assert may_reach("/v2/repository/index", None)
    assert not may_reach("/v2/repository/models/m/load", None)
    assert not may_reach("/inference.GRPCInferenceService/RepositoryModelUnload", None)


def test_a_revoked_key_dies_by_itself(client: TestClient, key_gateway: Gateway, store: KeyStore) -> None:
    """Nobody tells the service; it looks."""
    key_id, text = made(key_gateway)
    assert client.get("/v1/models", headers=bearer(text)).status_code == 200
    store.revoke(key_id)
    assert wait_for(lambda: client.get("/v1/models", headers=bearer(text)).status_code == 401)


def test_rotation_and_its_grace(client: TestClient, key_gateway: Gateway, store: KeyStore) -> None:
    key_id, old = made(key_gateway)
    new = store.rotate(key_id, grace=3600).text
    key_gateway.keyring.refresh()
    assert [client.get("/v1/models", headers=bearer(text)).status_code for text in (old, new)] == [200, 200]
    newest = store.rotate(key_id).text
    key_gateway.keyring.refresh()
    answers = [client.get("/v1/models", headers=bearer(text)).status_code for text in (old, new, newest)]
    assert answers == [401, 401, 200]
    store.revoke(key_id)
    with pytest.raises(UserError, match="revoked"):
        store.rotate(key_id)


def test_failures_are_limited_and_lock_nobody_out(client: TestClient, key_gateway: Gateway) -> None:
    good = bearer(made(key_gateway)[1])
    key_gateway.guard.failures = Failures(lambda: 0.0)  # a clock that stands, however slow this machine is
    answers = [client.get("/v1/models", headers=bearer("x")) for _ in range(FAILURES + 3)]
    assert [answer.status_code for answer in answers] == [401] * FAILURES + [429] * 3
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60 / FAILURES
    assert client.get("/v1/models", headers=good).status_code == 200
    assert client.get("/health").status_code == 200


def test_the_bucket_of_failures() -> None:
    now = 0.0
    failures = Failures(lambda: now)
    assert [failures.count("10.0.0.1") for _ in range(FAILURES)] == [0.0] * FAILURES
    assert failures.count("10.0.0.1") == pytest.approx(60 / FAILURES)
    assert failures.count("10.0.0.2") == 0
    now = 60 / FAILURES
    assert failures.count("10.0.0.1") == 0
    assert failures.count("10.0.0.1") > 0
    for _ in range(FAILURES):
        assert failures.count("2001:db8::1") == 0
    assert failures.count("2001:db8::ffff:1") > 0  # the same /64
    assert failures.count("2001:db8:0:1::1") == 0


def test_a_database_that_is_away_shuts_the_door(
    client: TestClient, key_gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = bearer(made(key_gateway)[1])
    monkeypatch.setattr(keyring_module, "STALE", -1.0)
    answer = client.get("/v1/models", headers=good)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "keys_unavailable")
    assert client.get("/health").status_code == 200


def test_the_watch_goes_on_after_trouble(key_gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fails() -> None:
        tried.append(1)
        raise OSError("away")

    monkeypatch.setattr(key_gateway.keyring, "refresh", fails)
    assert wait_for(lambda: len(tried) >= 2)
    monkeypatch.undo()
    key, secret = KeyStore(key_gateway.database).create("later")
    assert wait_for(lambda: key_gateway.keyring.find(secret.text)[0] == "active")
    assert key.id


def test_refusals_are_counted(client: TestClient, key_gateway: Gateway) -> None:
    good = bearer(made(key_gateway)[1])
    client.get("/v1/models")
    text = client.get("/metrics", headers=good).text
    assert re.search(r'soma:requests_refused_total\{reason="missing"\} [1-9]', text)


def test_what_is_stored_opens_nothing(key_gateway: Gateway, client: TestClient) -> None:
    secret = new_secret()
    assert re.fullmatch(r"soma_[0-9a-f]{10}_[\w-]{43}", secret.text)
    assert prefix_of(secret.text) == secret.prefix
    assert secret.text not in repr(secret)
    assert is_same(secret.text, secret.hash)
    assert not is_same(secret.text[:-1] + ("A" if secret.text[-1] != "A" else "B"), secret.hash)
    text = made(key_gateway)[1]
    assert client.get("/v1/models", headers=bearer(hash_of(text))).status_code == 401
    database = key_gateway.database.path
    assert database is not None
    for path in database.parent.glob("keys.db*"):
        if path.is_dir():
            continue
        assert text.split("_", 2)[2].encode() not in path.read_bytes()


def test_credentials() -> None:
    assert credentials([(b"x-api-key", b"a"), (b"accept", b"*"), (b"authorization", b"Bearer b")]) == ["a", "b"]
    assert credentials([(b"authorization", "Bearer ü".encode())]) == ["Ã¼"]


def test_websockets_are_shut(client: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect("/"):
        pass
    assert caught.value.code == 1008


def test_model_scope_is_a_gate() -> None:
    call = Call("/x", "a", "", Caller("k", models=("b",)))
    with pytest.raises(ApiError) as caught:
        asyncio.run(ModelScope().enter(call))
    assert caught.value.status == 403
    assert asyncio.run(ModelScope().enter(Call("/x", "a", ""))) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"role": "root"}, "role 'root'"), ({"days": 0}, "days 0"), ({"priority": 101}, "priority 101"),
        ({"models": [""]}, "1 to 200"), ({"team": "a\n"}, "team"),
    ],
)  # fmt: skip
def test_mistakes(store: KeyStore, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        store.create("x", **options)
    with pytest.raises(UserError, match="there is none"):
        store.revoke("key-none")


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from soma.cli import app as command

    where = str(tmp_path / "k.db")

    def run(*words: str) -> str:
        result = CliRunner().invoke(command, ["keys", *words, "--database", where], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    first = run("create", "alice", "--team", "red", "--model", "a*", "--route", "/v1/*", "--days", "2")
    assert prefix_of(first.strip())
    (key,) = KeyStore(Database(where)).all()
    assert key.expires_at is not None
    assert key.expires_at - key.created_at == 2 * 86_400_000
    listed = run("list")
    assert key.id in listed
    assert "red" in listed
    assert first.strip() not in listed + run("list", "--json")
    assert prefix_of(run("rotate", key.id, "--grace", "5").strip()) != prefix_of(first.strip())
    assert "500 tokens and 2.5 in money" in run("budget", "team:red", "--tokens", "500", "--money", "2.5")
    assert "no bound" in run("budget", "team:red")
    assert "expires" in run("expire", key.id, "--days", "0")
    assert "revoked" in run("revoke", key.id)
    assert "revoked" in run("list")
    with Database(where).read() as connection:
        assert connection.execute(keys.select()).one().revoked_at is not None
