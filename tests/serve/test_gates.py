"""What the gates see of a call, and that whatever they held is given back, however it ends."""

import asyncio
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from tiny import make_model
from v2_tools import Record

from soma.engine.engine import Engine
from soma.engine.load import load_weights
from soma.serve.app import create_app
from soma.serve.calls import Call, Gates, Usage
from soma.serve.errors import ApiError


@pytest.fixture(scope="module")
def record() -> Record:
    return Record()


@pytest.fixture(scope="module")
def client(record: Record, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    model, tokenizer = load_weights(make_model(tmp_path_factory.mktemp("gated")), precision="fp32", device="cpu")
    engine = Engine(model, tokenizer, max_running=4)
    with TestClient(create_app(engine, tokenizer, "tiny", gates=Gates([record]))) as made:
        yield made
    engine.close()


@pytest.fixture(autouse=True)
def _fresh(record: Record) -> None:
    record.entered, record.left, record.refuses = [], [], False


def ask(client: TestClient, **changes: object) -> tuple[int, dict[str, str], str]:
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, **changes}
    answer = client.post("/v1/completions", json=body)
    return answer.status_code, dict(answer.headers), answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_call_reserves_and_uses(client: TestClient, record: Record, stream: bool) -> None:
    status, headers, _ = ask(client, prompt=[[5, 6, 7], [8, 9]], n=2, stream=stream)
    assert status == 200
    assert headers["x-ratelimit-remaining-requests"] == "7"
    (call,) = record.entered
    assert headers["x-request-id"] == call.id
    assert (call.route, call.model, call.prompt_tokens, call.max_tokens) == ("/v1/completions", "tiny", 5, 16)
    assert record.left == [Usage(5, 16)]


def test_a_stop_uses_less_than_it_reserved(client: TestClient, record: Record) -> None:
    ids = list(range(4, 200))
    status, _, _ = ask(client, stop_token_ids=ids, max_tokens=9)
    assert status == 200
    assert record.entered[0].max_tokens == 9
    assert record.left[0].completion_tokens < 9


def test_refused(client: TestClient, record: Record) -> None:
    record.refuses = True
    status, headers, text = ask(client)
    assert status == 429
    assert headers["retry-after"] == "3"
    assert "rate_limited" in text
    assert record.left == []


def test_a_bad_request_never_reaches_the_gates(client: TestClient, record: Record) -> None:
    assert ask(client, prompt=[10**6])[0] == 400
    assert ask(client, model="other")[0] == 404
    assert record.entered == []


class Held:
    headers: dict[str, str]

    def __init__(self, log: list[str], name: str, breaks: bool = False) -> None:
        self.log, self.name, self.breaks, self.headers = log, name, breaks, {name: "1"}

    async def enter(self, call: Call) -> "Held":
        if self.name == "refuses":
            raise ApiError(429, "no")
        self.log.append(f"+{self.name}")
        return self

    async def leave(self, usage: Usage) -> None:
        await asyncio.sleep(0)
        self.log.append(f"-{self.name} {usage.outcome}")
        if self.breaks:
            raise RuntimeError("no disk")


CALL = Call("/v1/completions", "tiny", "127.0.0.1")


def test_all_or_nothing() -> None:
    """The first two are undone, in reverse, though one of them fails at that."""
    log: list[str] = []
    gates = Gates([Held(log, "a"), Held(log, "b", breaks=True), Held(log, "refuses")])
    with pytest.raises(ApiError):
        asyncio.run(gates.enter(CALL))
    assert log == ["+a", "+b", "-b refused", "-a refused"]


def test_left_once_and_also_when_cancelled() -> None:
    log: list[str] = []

    async def run() -> None:
        passage = await Gates([Held(log, "a"), Held(log, "b")]).enter(CALL)
        assert passage.headers == {"x-request-id": CALL.id, "a": "1", "b": "1"}
        task = asyncio.create_task(passage.leave(Usage(outcome="abort")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await passage.leave(Usage())
        while len(log) < 4:
            await asyncio.sleep(0)

    asyncio.run(run())
    assert log == ["+a", "+b", "-b abort", "-a abort"]
