"""Who runs first and for how long, as clients can say it: priority, user, timeout."""

import json
import socket
import time
from typing import Any

import pytest
from http_tools import JSON, LONG, call, connection, metric, open_stream, wait_for


def leave(link: Any) -> None:
    assert link.sock is not None
    link.sock.shutdown(socket.SHUT_RDWR)
    link.close()


def running(url: str) -> float:
    return metric(url, "vllm:num_requests_running")


def waiting(url: str) -> float:
    return metric(url, "vllm:num_requests_waiting")


@pytest.mark.parametrize(
    ("first", "second"),
    [({"priority": 5}, {"priority": -5}), ({"user": "busy"}, {"user": "idle"})],
    ids=["priority", "user"],
)
def test_who_comes_later_runs_first(service_url: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Four places, all taken by one user; of two who wait the second gets the next place."""
    assert wait_for(lambda: running(service_url) == waiting(service_url) == 0)
    links = [open_stream(service_url, user="busy")[0] for _ in range(4)]
    for number, change in enumerate((first, second), start=1):
        links.append(connection(service_url))
        links[-1].request("POST", "/v1/completions", json.dumps({**LONG, "stream": True, **change}), JSON)
        assert wait_for(lambda number=number: waiting(service_url) == number)
    leave(links[0])
    answer = links[5].getresponse()
    assert answer.readline().startswith(b"data: ")
    assert wait_for(lambda: waiting(service_url) == 1)
    leave(links[1])
    answer = links[4].getresponse()
    assert answer.readline().startswith(b"data: ")
    for link in links[2:]:
        leave(link)
    assert wait_for(lambda: running(service_url) == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline(service_url: str, stream: bool) -> None:
    """Running or still waiting: it ends when its time is over, and frees its place."""
    began = time.monotonic()
    body = {**LONG, "prompt": [[5]] * 6, "timeout": 0.5, "stream": stream}
    status, _, data = call(service_url, "POST", "/v1/completions", json.dumps(body), JSON)
    assert time.monotonic() - began > 0.4
    if stream:
        assert status == 200
        *_, error, done = [line for line in data.decode().splitlines() if line]
        assert done == "data: [DONE]"
        value = json.loads(error.removeprefix("data: "))
    else:
        assert status == 504
        value = json.loads(data)
    assert value["error"]["code"] == "deadline_exceeded"
    assert wait_for(lambda: running(service_url) == waiting(service_url) == 0)
