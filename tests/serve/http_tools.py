"""Plain HTTP for the tests: what a client library would never send, and what /metrics says."""

import http.client
import json
import re
import time
from typing import Any
from urllib.parse import urlsplit

LONG = {"model": "tiny", "prompt": "hello", "max_tokens": 4000, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}


def connection(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    assert parts.hostname
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=120)


def call(
    url: str, method: str, path: str, body: bytes | str | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body of one request."""
    link = connection(url)
    try:
        link.request(method, path, body.encode() if isinstance(body, str) else body, headers or {})
        answer = link.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        link.close()


def post(url: str, path: str, value: Any, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a POST; `value` is JSON text or what becomes JSON."""
    text = value if isinstance(value, str | bytes) else json.dumps(value)
    status, _, data = call(url, "POST", path, text, {"Content-Type": "application/json", **headers})
    return status, json.loads(data)


def open_stream(url: str, **changes: object) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A stream that has said something, or whose requests wait."""
    link = connection(url)
    link.request("POST", "/v1/completions", json.dumps({**LONG, "stream": True, **changes}), JSON)
    answer = link.getresponse()
    assert answer.status == 200
    assert answer.readline().startswith(b"data: ")
    return link, answer


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    _, _, data = call(url, "GET", "/metrics")
    total = 0.0
    for line in data.decode().splitlines():
        found = re.fullmatch(rf"{re.escape(name)}\{{(.*)\}} (\S+)", line)
        if found and all(f'{key}="{value}"' in found[1] for key, value in labels.items()):
            total += float(found[2])
    return total


def wait_for(condition: Any, seconds: float = 300.0) -> bool:
    """Whether `condition()` became true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False
