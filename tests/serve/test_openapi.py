"""/openapi.json and /docs; what schemathesis finds when it takes the document at its word."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from browser import open_browser
from fastapi.testclient import TestClient
from http_tools import wait_for
from test_page import ask_for_all_tokens

from soma.serve.database import Database
from soma.serve.gateway import Gateway
from soma.serve.keys.routes import PUBLIC
from soma.serve.keys.store import KeyStore
from soma.serve.openapi import BODIES
from soma.serve.running import running_service
from soma.serve.upstreams.app import ROUTES, create_gateway_app
from soma.serve.upstreams.config import GatewayConfig


@pytest.fixture(scope="module")
def key(key_gateway: Gateway) -> str:
    secret = KeyStore(key_gateway.database).create("tester", routes=["*"])[1]
    key_gateway.keyring.refresh()
    return secret.text


def test_the_document(keyed_app: Any) -> None:
    found = TestClient(keyed_app).get("/openapi.json").json()
    assert found["openapi"].startswith("3.1")
    assert found["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert found["components"]["securitySchemes"]["api_key"]["name"] == "X-API-Key"
    assert found["security"] == [{"bearer": []}, {"api_key": []}]
    for path, methods in found["paths"].items():
        for operation in methods.values():
            assert ("401" in operation["responses"]) == (path not in PUBLIC)
            assert operation.get("security") == ([] if path in PUBLIC else None)
    for path, kind in BODIES.items():
        body = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{kind.__name__}"}
    for name in re.findall(r'"\$ref": ?"#/components/schemas/([^"]+)"', str(found).replace("'", '"')):
        assert name in found["components"]["schemas"]
    assert {"/v1/chat/completions", "/health", "/metrics", "/v1/models/{name}", "/v2/models/{name}/infer"} <= set(
        found["paths"]
    )


def test_without_keys_it_asks_for_none(service_url: str) -> None:
    from http_tools import call

    status, _, data = call(service_url, "GET", "/openapi.json")
    assert status == 200
    assert b'"security":[]' in data
    assert b'"401"' not in data


def test_the_gateway_has_it_too(key_gateway: Gateway) -> None:
    """What goes to upstreams, which FastAPI knows nothing of, with bodies that upstreams may know more of."""
    config = GatewayConfig.model_validate({"models": {"m": {"upstreams": [{"url": "http://127.0.0.1:9/v1"}]}}})
    client = TestClient(create_gateway_app(config, key_gateway))
    found = client.get("/openapi.json").json()
    assert found["info"]["title"] == "Soma gateway"
    assert set(found["paths"]) == {*ROUTES, "/v1/feedback", "/v1/models", "/v1/models/{name}", "/health",
                                   "/health/ready", "/health/live", "/metrics"}  # fmt: skip
    assert found["security"] == [{"bearer": []}, {"api_key": []}]
    assert set(found["components"]["securitySchemes"]) == {"bearer", "api_key"}
    for path, methods in found["paths"].items():
        for operation in methods.values():
            assert ("502" in operation["responses"]) == (path in ROUTES)
            assert ("401" in operation["responses"]) == (path not in PUBLIC)
    for path in ROUTES:
        name = BODIES[path].__name__
        body = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert found["components"]["schemas"][name].get("additionalProperties", True) is True
    identities = [each["operationId"] for methods in found["paths"].values() for each in methods.values()]
    assert len(set(identities)) == len(identities)
    page = client.get("/docs")
    assert page.status_code == 200
    for asset in re.findall(r'(?:src|href)="(/docs/[^"]+)"', page.text):
        assert client.get(asset).status_code == 200
    assert client.get("/v1/models").status_code == 401
    assert TestClient(create_gateway_app(config)).get("/openapi.json").json()["security"] == []


def test_the_gateway_loads_no_torch() -> None:
    code = "import sys, soma.serve.upstreams.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def explore(app: Any, key: str, examples: int) -> set[str]:
    """Requests that the document allows and some that it forbids: no 5xx, and nothing that it does not say. Returns
    the paths that have answered with a success."""
    import schemathesis

    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [result.ok() for result in schema.get_all_operations()]
    operations = [each for each in operations if not each.path.startswith("/v2/")]  # held to tritonclient elsewhere
    assert len(operations) >= 9
    return {operation.path for operation in operations if 2 in statuses(operation, key, examples)}


def statuses(operation: Any, key: str, examples: int) -> set[int]:
    """Try one operation; the hundreds of the statuses that came."""
    import hypothesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    seen = set()

    @hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(case=operation.as_strategy(), is_there=hypothesis.strategies.booleans())
    def run(case: Any, is_there: bool) -> None:
        if is_there and "name" in case.path_parameters:  # made-up names are those of no model
            case.path_parameters["name"] = "tiny"
        if isinstance(case.body, dict):  # a model that is there, and not for long
            case.body |= {name: value for name, value in SHORT.items() if name in case.body or name == "model"}
        response = case.call(headers={"X-API-Key": key})
        seen.add(response.status_code // 100)
        case.validate_response(response, checks=checks)

    run()
    return seen


# A deadline of its own that has passed is a 504 by design.
SHORT = {"model": "tiny", "max_tokens": 2, "max_completion_tokens": 2, "n": 1, "timeout": 60.0}


def test_schemathesis(keyed_app: Any, key: str) -> None:
    assert explore(keyed_app, key, 4) >= {"/detokenize", "/v1/models", "/metrics"}


@pytest.mark.slow
def test_schemathesis_at_length(keyed_app: Any, key: str) -> None:
    assert explore(keyed_app, key, 100) >= {"/v1/completions", "/tokenize", "/v1/models/{name}"}


def texts(driver: Any, selector: str) -> list[str]:
    """At one moment: the page draws itself anew meanwhile."""
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(item => item.textContent)", selector
    )
    return found


@pytest.fixture(scope="module")
def kept(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A real service that asks for keys: its URL, and one."""
    where = str(tmp_path_factory.mktemp("kept") / "keys.db")
    database = Database(where)
    secret = KeyStore(database).create("reader")[1].text
    database.close()
    with running_service(tiny_folder, keys=where) as url:
        yield url, secret


@pytest.mark.page
@pytest.mark.parametrize("width", [320, pytest.param(1280, marks=pytest.mark.slow)])
def test_docs_page(kept: tuple[str, str], width: int) -> None:
    """Swagger UI from this machine alone, with both ways to give a key, which then work."""
    url, key = kept
    with open_browser(width, 900) as driver:
        driver.get(url + "/docs")
        assert wait_for(lambda: driver.find_elements("css selector", "button.authorize"))
        driver.find_element("css selector", "button.authorize").click()
        assert wait_for(lambda: len(driver.find_elements("css selector", ".auth-container")) >= 2)
        shown = " ".join(texts(driver, ".auth-container"))
        assert "bearer" in shown
        assert "X-API-Key" in shown
        box = driver.find_elements("css selector", ".auth-container input")[-1]
        box.send_keys(key)
        driver.find_elements("css selector", ".auth-btn-wrapper button.authorize")[-1].click()
        driver.find_element("css selector", ".btn-done, .close-modal").click()
        block = next(
            each for each in driver.find_elements("css selector", ".opblock")
            if each.find_element("css selector", "[data-path]").get_attribute("data-path") == "/v1/models"
        )  # fmt: skip
        driver.execute_script("arguments[0].querySelector('.opblock-summary-control').click()", block)
        assert wait_for(lambda: block.find_elements("css selector", ".try-out__btn"))
        driver.execute_script("arguments[0].querySelector('.try-out__btn').click()", block)
        assert wait_for(lambda: block.find_elements("css selector", ".execute"))
        driver.execute_script("arguments[0].querySelector('.execute').click()", block)
        assert wait_for(lambda: "tiny" in " ".join(texts(driver, ".live-responses-table .response")))
        bad = [row["message"] for row in driver.get_log("browser") if row["level"] == "SEVERE"]
        assert bad == []


@pytest.mark.page
def test_chat_page_asks_for_a_key(kept: tuple[str, str]) -> None:
    url, key = kept
    with open_browser() as driver:
        driver.get(url)
        assert wait_for(lambda: driver.find_element("id", "door").is_displayed())
        driver.find_element("id", "key").send_keys("wrong\ue007")
        assert wait_for(lambda: "not valid" in " ".join(texts(driver, "#hello")))
        driver.find_element("id", "key").send_keys(key + "\ue007")
        assert wait_for(lambda: driver.find_element("id", "input").is_enabled())
        assert not driver.find_element("id", "door").is_displayed()
        driver.execute_script("document.getElementById('max_tokens').value = 5")
        ask_for_all_tokens(driver)
        driver.find_element("id", "input").send_keys("hello\ue007")
        assert wait_for(lambda: texts(driver, ".stats") and "5 tokens" in texts(driver, ".stats")[0])
        assert wait_for(lambda: texts(driver, "#running") == ["0"])
        assert key not in driver.page_source
