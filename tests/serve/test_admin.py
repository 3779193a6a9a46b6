"""The admin API on its own listener, and its page in a real browser."""

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from browser import open_browser
from gateway_tools import Scripted
from http_tools import JSON, call, connection, wait_for

from soma.base.errors import UserError
from soma.serve.admin.api import AdminServer
from soma.serve.admin.beside import Beside
from soma.serve.calls import Call, Caller, Gates, Usage
from soma.serve.database import Database
from soma.serve.gateway import Gateway
from soma.serve.graphs import serve as graph_service
from soma.serve.graphs.graph import Graph
from soma.serve.keys.door import Failures
from soma.serve.keys.store import KeyStore
from soma.serve.limits.config import LimitsConfig
from soma.serve.limits.gate import LimitsGate
from soma.serve.upstreams.app import create_gateway_app
from soma.serve.upstreams.config import GatewayConfig
from soma.serve.v2.model import Options

LIMITS = {"rules": [{"name": "minute", "limit": 5, "window": "1m", "per": ["key"]}]}


GRAPHS = """
models:
  one: {python: "parts.py:one", inputs: [&x {name: x, datatype: FP32, shape: [-1]}],
        outputs: [&y {name: y, datatype: FP32, shape: [-1]}]}
  broken: {python: "parts.py:broken", inputs: [*x], outputs: [*y]}
graphs:
  split:
    inputs: [*x]
    outputs: [*y]
    nodes:
      main: {splitter: [{node: steady, weight: 3}, {node: next, shadow: true}, {node: both, weight: 1}], by: user}
      steady: {model: one}
      next: {model: broken}
      both: {sequence: [steady, last]}
      last: {model: one, inputs: {x: y}}
"""
PARTS = """
def one(x):
    return x + 1

def broken(x):
    raise RuntimeError("secret")
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Scripted]:
    with Scripted(name="word") as made:
        yield made


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The URL of a gateway's application that runs in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))

    async def run() -> None:
        await app.state.service.start()
        await server.serve([listener])
        await app.state.service.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def graphs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "parts.py").write_text(PARTS)
    (folder / "graphs.yaml").write_text(GRAPHS)
    return folder / "graphs.yaml"


@pytest.fixture(scope="module")
def graph(graphs_file: Path) -> Graph:
    found: Graph = graph_service.graphs_app(graphs_file).state.graphs["split"]
    return found


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: Scripted, graph: Graph) -> Iterator[Gateway]:
    """Beside a service of one model that keeps a log, and, to be shown together with it, a graph."""
    folder = tmp_path_factory.mktemp("admin")
    (folder / "prices.yaml").write_text("currency: EUR\nmodels: {tiny: {prompt: 1, completion: 2}}\n")
    where = str(folder / "keys.db")
    Database(where).close()
    made = Gateway(where, str(folder / "prices.yaml"))
    models = {"tiny": {"upstreams": [{"url": upstream.url}], "health": None}}
    log = {"folder": folder / "log", "rotate": "50ms"}
    app = create_gateway_app(GatewayConfig.model_validate({"models": models, "request_log": log}), made)
    with listening(app) as base:
        limiter = LimitsGate(LimitsConfig.model_validate(LIMITS))
        made.start_admin("127.0.0.1", 0, Beside(limiter, app.state.service.request_log, {"split": graph}, base))
        yield made
    made.close()


def use(graph: Graph, user: str) -> None:
    """One request, and what it does in shadows."""

    async def run() -> None:
        job = await graph.job({"x": np.ones(2, np.float32)}, Options({"user": user}))
        async with aclosing(job.answers()) as answers:
            assert [answer["y"].shape async for answer in answers] == [(2,)]
        await asyncio.gather(*graph.shadows)

    asyncio.run(run())


@pytest.fixture(autouse=True)
def _forget_failures(gateway: Gateway) -> None:
    assert gateway.admin is not None
    app: Any = gateway.admin.server.config.app
    app.state.guard.failures = Failures()


@pytest.fixture(scope="module")
def url(gateway: Gateway) -> str:
    assert gateway.admin is not None
    return gateway.admin.url


@pytest.fixture(scope="module")
def admin(gateway: Gateway) -> str:
    secret = KeyStore(gateway.database).create("root", role="admin")[1].text
    gateway.keyring.refresh()
    return secret


def ask(url: str, key: str | None, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    status, _, data = call(url, method, path, None if body is None else json.dumps(body), headers)
    return status, json.loads(data)


def spend(gateway: Gateway, key_id: str, team: str | None = None, tokens: int = 5) -> None:
    async def run() -> None:
        passage = await Gates(gateway.gates()).enter(Call("/v1/x", "tiny", "", Caller(key_id, team), 10, 20))
        await passage.leave(Usage(10, tokens))

    asyncio.run(run())


def test_every_admin_route_is_shut(gateway: Gateway, url: str, admin: str) -> None:
    """To nobody, and to who has a key of the service."""
    user = KeyStore(gateway.database).create("user", routes=["*"])[1].text
    gateway.keyring.refresh()
    assert gateway.admin is not None
    app: Any = gateway.admin.server.config.app
    walked = 0
    for route in app.routes:
        for method in route.methods:
            path = re.sub(r"\{[^}]*\}", "key-x", route.path)
            expected = {401, 429} if path not in ("/", "/health") else {200, 405}
            assert call(url, method, path)[0] in expected, path
            if path not in ("/", "/health"):
                assert call(url, method, path, headers={"X-API-Key": user})[0] == 403
                walked += 1
    assert walked >= 12
    assert ask(url, admin, "GET", "/api/keys")[0] == 200


def test_a_key_from_cradle_to_grave(gateway: Gateway, url: str, admin: str) -> None:
    status, made = ask(url, admin, "POST", "/api/keys", {"name": "bob", "team": "blue", "models": ["t*"], "days": 1})
    assert status == 201
    assert gateway.keyring.find(made["key"])[0] == "active"  # at once
    assert (made["name"], made["team"], made["models"], made["routes"]) == ("bob", "blue", ["t*"], None)
    listed = ask(url, admin, "GET", "/api/keys")[1]["data"]
    assert made["id"] in [key["id"] for key in listed]
    assert made["key"] not in json.dumps(listed)
    status, turned = ask(url, admin, "POST", f"/api/keys/{made['id']}/rotate", {"grace": 0})
    assert status == 200
    assert [gateway.keyring.find(text)[0] for text in (made["key"], turned["key"])] == ["expired", "active"]
    assert ask(url, admin, "POST", f"/api/keys/{made['id']}/expire", {"days": 0})[1]["state"] == "expired"
    assert ask(url, admin, "POST", f"/api/keys/{made['id']}/revoke", {})[1]["state"] == "revoked"
    assert "blue" in ask(url, admin, "GET", "/api/teams")[1]["data"]
    assert ask(url, admin, "POST", "/api/teams", {"name": "green"})[0] == 201
    assert "green" in ask(url, admin, "GET", "/api/teams")[1]["data"]


def test_budgets_ledger_traffic_limits(gateway: Gateway, url: str, admin: str) -> None:
    key_id = ask(url, admin, "POST", "/api/keys", {"name": "eve", "team": "eves"})[1]["id"]
    budget = {"owner": "team:eves", "period": "month", "tokens": 1000, "money": "0.5"}
    assert ask(url, admin, "PUT", "/api/budgets", budget)[1]["money"] == "0.5"
    assert gateway.keyring.budgets["team:eves"][0].nano == 500_000_000
    spend(gateway, key_id, "eves")
    path = "/api/ledger?by=team"

    def teams() -> dict[str, Any]:
        return {row["team"]: row for row in ask(url, admin, "GET", path)[1]["data"]}

    assert wait_for(lambda: "eves" in teams() and teams()["eves"]["open"] == 0)
    assert (teams()["eves"]["completion_tokens"], teams()["eves"]["money"], teams()["eves"]["currency"]) == (
        5, "0.00002", "EUR",
    )  # fmt: skip
    (row,) = [row for row in ask(url, admin, "GET", "/api/budgets")[1]["data"] if row["owner"] == "team:eves"]
    assert (row["tokens_used"], row["money_used"]) == (15, "0.00002")
    status, headers, data = call(url, "GET", path + "&format=csv", headers={"X-API-Key": admin})
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/csv")
    assert b"eves,1,0,0,0,10,0,5,0.00002,EUR" in data
    (rule,) = ask(url, admin, "GET", "/api/limits")[1]["data"]
    assert (rule["name"], rule["limit"], rule["refused"]) == ("minute", 5, 0)

    async def while_it_runs() -> dict[str, Any]:
        passage = await Gates(gateway.gates()).enter(Call("/v1/x", "tiny", "", Caller(key_id, "eves"), 10, 20))
        meter = passage.call.meter
        assert meter is not None
        meter.sent()
        meter.made(7)
        seen = await asyncio.to_thread(ask, url, admin, "GET", "/api/traffic")
        await passage.leave(Usage(10, 7))
        return seen[1]

    (running,) = asyncio.run(while_it_runs())["running"]
    assert (running["key"], running["completion_tokens"], running["max_tokens"]) == (key_id, 7, 20)
    assert ask(url, admin, "GET", "/api/traffic")[1]["running"] == []


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("POST", "/api/keys", {"name": "x", "role": "god"}, "role 'god'"),
        ("POST", "/api/keys", {"name": "x", "more": 1}, "more"),
        ("POST", "/api/keys", {"name": 5}, "name"),
        ("POST", "/api/keys/key-none/revoke", {}, "there is none"),
        ("POST", "/api/keys/key-none/rotate", {"grace": -1}, "grace"),
        ("PUT", "/api/budgets", {"owner": "me", "period": "day"}, "key:ID or team:NAME"),
        ("PUT", "/api/budgets", {"owner": "team:a", "period": "day", "money": "lots"}, "money"),
        ("PUT", "/api/budgets", {"owner": "team:a", "period": "day", "money": "1e99999"}, "money"),
        ("PUT", "/api/budgets", {"owner": "team:a", "period": "year"}, "day or month"),
        ("GET", "/api/ledger?by=address", None, "expected some of"),
        ("GET", "/api/ledger?format=xml", None, "json or csv"),
        ("GET", "/api/ledger?since=2026-1-1'--", None, "since"),
        ("POST", "/api/teams", {"name": "<script>"}, "team"),
    ],
)
def test_mistakes(url: str, admin: str, method: str, path: str, body: Any, words: str) -> None:
    status, answer = ask(url, admin, method, path, body)
    assert status == 400
    assert words in answer["error"]["message"]


def chat_body(key: str, **changes: Any) -> dict[str, Any]:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    return {"key": key, "model": "tiny", "messages": turns, "temperature": 0.5, "max_tokens": 9} | changes


def new_key(gateway: Gateway, name: str, **scopes: Any) -> tuple[str, str]:
    """Id and secret."""
    key, secret = KeyStore(gateway.database).create(name, **scopes)
    gateway.keyring.refresh()
    return key.id, secret.text


def test_playground_is_a_call_like_any_other(gateway: Gateway, url: str, admin: str, upstream: Scripted) -> None:
    """It streams, the ledger has it under the key that was given, and the log keeps it."""
    key_id, key = new_key(gateway, "player")
    assert ask(url, admin, "POST", "/api/playground/models", {"key": key}) == (200, {"data": ["tiny"]})
    before = ask(url, admin, "GET", "/api/traffic")[1]["request_log"]
    headers = {**JSON, "X-API-Key": admin}
    status, sent, data = call(url, "POST", "/api/playground/chat", json.dumps(chat_body(key)), headers)
    assert (status, sent["content-type"].partition(";")[0]) == (200, "text/event-stream")
    chunks = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks[:3]] == ["word0 ", "word1 ", "word2 "]
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert (upstream.seen[-1]["messages"], upstream.seen[-1]["max_tokens"]) == (chat_body(key)["messages"], 9)

    def spent() -> list[dict[str, Any]]:
        rows = ask(url, admin, "GET", "/api/ledger?by=key")[1]["data"]
        return [row for row in rows if row["key"] == key_id and not row["open"]]

    assert wait_for(spent)
    assert [(row["prompt_tokens"], row["completion_tokens"]) for row in spent()] == [(7, 3)]

    def kept() -> dict[str, int]:
        counts: dict[str, int] = ask(url, admin, "GET", "/api/traffic")[1]["request_log"]
        return counts

    assert wait_for(lambda: kept()["requests"] > before["requests"])
    assert set(kept()) == {"requests", "feedback", "dropped", "errors"}


def test_playground_leads_around_nothing(gateway: Gateway, url: str, admin: str, upstream: Scripted) -> None:
    """Neither the admin's own key, nor a wrong one, nor another model's, nor a host of one's own."""
    scoped, poor = new_key(gateway, "scoped", models=["other"]), new_key(gateway, "poor")
    KeyStore(gateway.database).set_budget(f"key:{poor[0]}", "day", 1, None)
    gateway.keyring.refresh()
    seen = len(upstream.seen)
    for key, words in ((admin, "answers 403"), ("nonsense", "answers 401"), (scoped[1], "answers 403"),
                       (poor[1], "answers 429")):  # fmt: skip
        status, answer = ask(url, admin, "POST", "/api/playground/chat", chat_body(key))
        assert (status, answer["error"]["code"]) == (502, "service_refused")
        assert words in answer["error"]["message"], key
    for wrong in (chat_body("a b"), chat_body("a\r\nX: y"), chat_body("k", url="http://127.0.0.1:9"), chat_body("")):
        assert ask(url, admin, "POST", "/api/playground/chat", wrong)[0] == 400
    assert len(upstream.seen) == seen


def test_playground_ends_with_its_reader(gateway: Gateway, url: str, admin: str, upstream: Scripted) -> None:
    key, gone = new_key(gateway, "leaver")[1], upstream.cancelled
    upstream.tokens, upstream.pause = 100_000, 0.01
    link = connection(url)
    try:
        link.request("POST", "/api/playground/chat", json.dumps(chat_body(key)), {**JSON, "X-API-Key": admin})
        assert link.getresponse().readline().startswith(b"data: ")
        link.close()
        assert wait_for(lambda: upstream.cancelled > gone)
        assert wait_for(lambda: upstream.open == 0)
    finally:
        link.close()
        upstream.tokens, upstream.pause = 3, 0.0


def test_a_service_that_is_away_or_has_no_chat(gateway: Gateway, admin: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for beside, status in ((Beside(chat_url=nobody), 502), (Beside(), 404)):
        other = AdminServer(gateway, "127.0.0.1", 0, beside)
        try:
            assert ask(other.url, admin, "POST", "/api/playground/chat", chat_body("k"))[0] == status
            assert ask(other.url, admin, "GET", "/api/service")[1] == {"graphs": False, "chat": status == 502}
            assert ask(other.url, admin, "GET", "/api/traffic")[1]["request_log"] is None
        finally:
            other.close()


def test_a_service_of_graphs_has_it_too(graphs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = str(tmp_path / "keys.db")
    database = Database(where)
    admin = KeyStore(database).create("root", role="admin")[1].text
    database.close()
    started: list[Gateway] = []
    monkeypatch.setattr(Gateway, "check_models", lambda self, names: started.append(self))
    seen: list[Any] = []

    def run(*arguments: Any, **options: Any) -> None:
        assert started[0].admin is not None
        address = started[0].admin.url
        seen.extend(ask(address, admin, "GET", path)[1] for path in ("/api/service", "/api/graphs"))

    monkeypatch.setattr(graph_service, "run", run)
    graph_service.serve_graphs(graphs_file, keys=where, admin_port=0)
    assert seen[0] == {"graphs": True, "chat": False}
    assert seen[1]["data"][0]["nodes"]["both"]["edges"] == [["steady", ""], ["last", ""]]
    with pytest.raises(UserError, match="--keys"):
        graph_service.serve_graphs(graphs_file, admin_port=0)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


def texts(driver: Any, selector: str) -> list[str]:
    """At one moment: the page draws itself anew meanwhile."""
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(item => item.textContent)", selector
    )
    return found


def enter(driver: Any, url: str, key: str) -> None:
    driver.get(url)
    driver.find_element("id", "key").send_keys(key + "\ue007")


def problems(driver: Any) -> list[str]:
    rows = [row for row in driver.get_log("browser") if row["level"] == "SEVERE"]
    return [row["message"] for row in rows if row["source"] != "network"]


@pytest.mark.page
def test_page_refuses_and_admits(page: Any, gateway: Gateway, url: str, admin: str) -> None:
    enter(page, url, "soma_nonsense")
    assert wait_for(lambda: texts(page, "#problem") == ["this key is not valid"])
    assert not page.find_element("id", "tabs").is_displayed()
    page.find_element("id", "key").clear()
    page.find_element("id", "key").send_keys(admin + "\ue007")
    assert wait_for(lambda: page.find_element("id", "traffic").is_displayed())
    assert page.find_element("id", "key").get_property("value") == ""
    assert admin not in page.page_source
    assert page.execute_script("return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])") == (
        '[{},{},""]'
    )
    assert problems(page) == []


@pytest.mark.page
def test_page_by_keyboard(page: Any, gateway: Gateway, url: str, admin: str) -> None:
    """From the key field through the tabs to a new key and its end, without a mouse."""
    from selenium.webdriver.common.keys import Keys

    enter(page, url, admin)
    assert wait_for(lambda: page.execute_script("return document.activeElement.id") == "tab-traffic")
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert wait_for(lambda: page.find_element("id", "keys").is_displayed())
    page.switch_to.active_element.send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys("mallory <b>x</b>" + Keys.ENTER)
    assert wait_for(lambda: "name" in "".join(texts(page, "#problem")))
    box = page.find_element("css selector", "#new-key [name=name]")
    box.clear()
    box.send_keys("mallory" + Keys.TAB + "red" + Keys.ENTER)
    assert wait_for(lambda: len(texts(page, "#fresh code")) == 1)
    text = texts(page, "#fresh code")[0]
    assert gateway.keyring.find(text)[0] == "active"
    assert wait_for(lambda: page.find_elements("css selector", "button[aria-label='Revoke mallory']"))
    page.find_element("css selector", "button[aria-label='Revoke mallory']").send_keys(Keys.ENTER)
    assert wait_for(lambda: _accept(page))
    assert wait_for(lambda: gateway.keyring.find(text)[0] == "revoked")
    assert wait_for(lambda: not page.find_elements("css selector", "button[aria-label='Revoke mallory']"))
    assert problems(page) == []


def _accept(driver: Any) -> bool:
    from selenium.common.exceptions import NoAlertPresentException

    try:
        driver.switch_to.alert.accept()
    except NoAlertPresentException:
        return False
    return True


@pytest.mark.page
@pytest.mark.parametrize(("width", "dark"), [(320, True), pytest.param(1280, False, marks=pytest.mark.slow)])
def test_page_shows_all_views(gateway: Gateway, url: str, admin: str, width: int, dark: bool) -> None:
    store = KeyStore(gateway.database)
    key, _ = store.create("a-rather-long-name-of-somebody", team="view")
    store.set_budget("team:view", "day", 500, None)
    spend(gateway, key.id, "view", 9)
    with open_browser(width, 700, dark=dark) as driver:
        enter(driver, url, admin)
        assert wait_for(lambda: driver.find_element("id", "traffic").is_displayed())
        for name, words in (("keys", key.id), ("budgets", "team:view"), ("ledger", key.id), ("limits", "minute")):
            driver.find_element("id", f"tab-{name}").click()
            assert wait_for(lambda words=words: any(words in cell for cell in texts(driver, "td"))), name  # type: ignore[misc]
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width, name
        assert problems(driver) == []


def set_width(driver: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.mark.page
@pytest.mark.parametrize("width", [390, 1280])
def test_page_draws_graphs_as_they_run(page: Any, url: str, admin: str, graph: Graph, width: int) -> None:
    set_width(page, width)
    enter(page, url, admin)
    assert wait_for(lambda: page.find_element("id", "tab-graph").is_displayed())
    page.find_element("id", "tab-graph").click()
    assert wait_for(lambda: len(texts(page, "svg g")) == 5)
    assert sorted(texts(page, "svg .name")) == ["both", "last", "main", "next", "steady"]
    assert {"75%", "25%", "shadow", "1", "2"} <= {text[: len(text) // 2] for text in texts(page, "svg .edge")}
    assert len(page.find_elements("css selector", "svg path.shadow")) == 1
    boxes = page.execute_script(
        "return [...document.querySelectorAll('svg rect')].map(box => box.getBoundingClientRect().toJSON())"
    )
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            apart = one["left"] >= other["right"] or other["left"] >= one["right"]
            assert apart or one["top"] >= other["bottom"] or other["top"] >= one["bottom"]
    for user in "abcdefgh":
        use(graph, user)
    assert graph.seen["next"].failed == graph.seen["main"].count > 0
    count = graph.seen["main"].count
    assert wait_for(lambda: {f"{count} ×", f"{count} of {count} failed"} <= {*texts(page, "svg .count")})  # by itself
    assert any(re.search(r"p50 [\d.]+ ms · p95 [\d.]+ ms", text) for text in texts(page, "svg text"))
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert problems(page) == []


@pytest.mark.page
@pytest.mark.parametrize("width", [390, 1280])
def test_page_playground(page: Any, gateway: Gateway, url: str, admin: str, upstream: Scripted, width: int) -> None:
    """By keyboard: a key, its models, a chat, and one that is stopped."""
    from selenium.webdriver.common.keys import Keys

    key = new_key(gateway, f"typist-{width}")[1]
    set_width(page, width)
    enter(page, url, admin)
    assert wait_for(lambda: page.execute_script("return document.activeElement.id") == "tab-traffic")
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert wait_for(lambda: page.find_element("id", "playground").is_displayed())
    page.switch_to.active_element.send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys("nonsense" + Keys.TAB)
    assert wait_for(lambda: "answers 401" in "".join(texts(page, "#problem")))
    field = page.find_element("css selector", "#play [name=key]")
    field.clear()
    field.send_keys(key + Keys.TAB)
    assert wait_for(lambda: texts(page, "#play option") == ["tiny"])
    page.find_element("css selector", "#play [name=system]").send_keys("Be brief." + Keys.TAB)
    page.switch_to.active_element.send_keys("<b>hello</b>" + Keys.CONTROL + Keys.ENTER)
    assert wait_for(lambda: "stop" in "".join(texts(page, "#speed")))
    assert texts(page, "#said") == ["word0 word1 word2 "]
    assert re.search(r"3 tokens · first after \d+ ms · stop$", texts(page, "#speed")[0])
    assert [turn["content"] for turn in upstream.seen[-1]["messages"]] == ["Be brief.", "<b>hello</b>"]
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    upstream.tokens, upstream.pause, gone = 100_000, 0.02, upstream.cancelled
    try:
        assert wait_for(lambda: not page.find_element("id", "stop").is_displayed())
        page.find_element("css selector", "#play button.main").click()
        assert wait_for(lambda: "tokens/s" in texts(page, "#speed")[0] and "word5 " in texts(page, "#said")[0])
        page.find_element("id", "stop").send_keys(Keys.ENTER)
        assert wait_for(lambda: texts(page, "#speed")[0].endswith("stopped"))
        assert wait_for(lambda: upstream.cancelled > gone)
    finally:
        upstream.tokens, upstream.pause = 3, 0.0
    page.find_element("id", "tab-traffic").click()
    assert wait_for(lambda: page.find_element("id", "log").is_displayed())
    assert texts(page, "#log dt") == ["requests kept", "feedback kept", "not kept", "files that failed"]
    assert problems(page) == []


@pytest.mark.page
def test_page_hides_what_is_not_there(page: Any, gateway: Gateway, admin: str) -> None:
    from selenium.webdriver.common.keys import Keys

    other = AdminServer(gateway, "127.0.0.1", 0, Beside())
    try:
        enter(page, other.url, admin)
        assert wait_for(lambda: page.execute_script("return document.activeElement.id") == "tab-traffic")
        for name in ("tab-graph", "tab-playground", "log"):
            assert not page.find_element("id", name).is_displayed()
        page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)  # past what is hidden
        assert wait_for(lambda: page.find_element("id", "limits").is_displayed())
    finally:
        page.get("about:blank")
        other.close()


@pytest.mark.page
def test_a_revoked_admin_is_thrown_out(page: Any, gateway: Gateway, url: str) -> None:
    store = KeyStore(gateway.database)
    key, secret = store.create("short", role="admin")
    gateway.keyring.refresh()
    enter(page, url, secret.text)
    assert wait_for(lambda: page.find_element("id", "traffic").is_displayed())
    store.revoke(key.id)
    assert wait_for(lambda: page.find_element("id", "login").is_displayed())
    assert texts(page, "#problem") == ["this key is revoked"]


def test_the_page_stands_alone(url: str) -> None:
    _, headers, data = call(url, "GET", "/")
    assert re.findall(r"(?:src|href)=[\"']?(?!data:)[^\"'>]*//[^\"'>]*", data.decode()) == []
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"


def test_failures_are_limited_here_too(gateway: Gateway, url: str) -> None:
    answers = [ask(url, "wrong", "GET", "/api/keys")[0] for _ in range(40)]
    assert 429 in answers
    assert set(answers) <= {401, 429}


def test_a_port_that_is_taken(gateway: Gateway, url: str, tmp_path: Path) -> None:
    port = int(url.rpartition(":")[2])
    where = str(tmp_path / "k.db")
    Database(where).close()
    other = Gateway(where)
    with pytest.raises(UserError, match="in use"):
        other.start_admin("127.0.0.1", port, Beside())
    other.close()
