"""The admin API on its own listener, and its page in a real browser."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import open_browser
from http_tools import call, wait_for

from soma.serve.calls import Call, Caller, Gates, Usage
from soma.serve.database import Database
from soma.serve.gateway import Gateway
from soma.serve.keys.door import Failures
from soma.serve.keys.store import KeyStore
from soma.serve.limits.config import LimitsConfig
from soma.serve.limits.gate import LimitsGate

LIMITS = {"rules": [{"name": "minute", "limit": 5, "window": "1m", "per": ["key"]}]}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("admin")
    (folder / "prices.yaml").write_text("currency: EUR\nmodels: {tiny: {prompt: 1, completion: 2}}\n")
    where = str(folder / "keys.db")
    Database(where).close()
    made = Gateway(where, str(folder / "prices.yaml"))
    made.start_admin("127.0.0.1", 0, LimitsGate(LimitsConfig.model_validate(LIMITS)))
    yield made
    made.close()


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
        ("GET", "/api/ledger?by=prompt", None, "expected some of"),
        ("GET", "/api/ledger?format=xml", None, "json or csv"),
        ("GET", "/api/ledger?since=2026-1-1'--", None, "since"),
        ("POST", "/api/teams", {"name": "<script>"}, "team"),
    ],
)
def test_mistakes(url: str, admin: str, method: str, path: str, body: Any, words: str) -> None:
    status, answer = ask(url, admin, method, path, body)
    assert status == 400
    assert words in answer["error"]["message"]


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


def texts(driver: Any, selector: str) -> list[str]:
    return [item.get_property("textContent") for item in driver.find_elements("css selector", selector)]


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
    button = page.find_element("css selector", "button[aria-label='Revoke mallory']")
    button.send_keys(Keys.ENTER)
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
    from soma.base.errors import UserError

    port = int(url.rpartition(":")[2])
    where = str(tmp_path / "k.db")
    Database(where).close()
    other = Gateway(where)
    with pytest.raises(UserError, match="in use"):
        other.start_admin("127.0.0.1", port)
    other.close()
