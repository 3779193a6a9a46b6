"""The request log: what is kept of requests, redacted, whole after kill -9, and what feedback makes of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pyarrow.parquet as pq
import pytest
from gateway_tools import Scripted, running_gateway
from http_tools import call, metric, post, wait_for
from tiny import make_model

from soma.base.errors import UserError
from soma.data.feedback import export_feedback
from soma.serve.calls import Call, Caller, Usage
from soma.serve.requestlog.config import RequestLogConfig, request_log_config
from soma.serve.requestlog.gate import RequestLog, is_sampled
from soma.serve.requestlog.record import MOST_BYTES, Record, asked_of
from soma.serve.requestlog.writer import REQUESTS, Writer
from soma.serve.running import running_service

MAIL = "write to ada.lovelace@example.com"


def rows_of(folder: Path, table: str = "requests") -> list[dict[str, Any]]:
    files = sorted((folder / table).glob("[!.]*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def make_log(folder: Path, **options: Any) -> RequestLog:
    return RequestLog(RequestLogConfig(folder=folder, **options))


def record_of(log: RequestLog, id_: str, said: str = "hi", key: str | None = None, **asked: Any) -> Record:
    caller = None if key is None else Caller(key, "team-1")
    made = Record(
        Call("/v1/chat/completions", "tiny", "::1", caller, id=id_, tags={"prompt": "greet@3"}),
        is_sampled=is_sampled(id_, log.config.sample),
    )
    made.asked(**(asked or {"messages": [{"role": "user", "content": "hello"}]}))
    made.said(0, said, "stop")
    return made


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("logged"))


@pytest.fixture(scope="module")
def service(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("log")
    with running_service(chat_folder, request_log=str(folder), request_log_seconds=0.1) as url:
        yield url, folder


def found(folder: Path, request_id: str, count: int = 1) -> list[dict[str, Any]]:
    """The rows of a request, once they are on the disk."""
    assert wait_for(lambda: len([r for r in rows_of(folder) if r["request_id"] == request_id]) >= count)
    return sorted((r for r in rows_of(folder) if r["request_id"] == request_id), key=lambda row: row["choice"])


def test_chat_whole_and_streamed(service: tuple[str, Path]) -> None:
    url, folder = service
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": MAIL}]
    whole = client.chat.completions.create(model="tiny", messages=asked, max_tokens=8, temperature=0, n=2)
    rows = found(folder, str(whole._request_id), 2)
    assert [row["completion"] for row in rows] == [choice.message.content for choice in whole.choices]
    assert [row["finish_reason"] for row in rows] == [choice.finish_reason for choice in whole.choices]
    row = rows[0]
    assert json.loads(row["messages"]) == [asked[0], {"role": "user", "content": "write to <email>"}]
    assert (row["redactions"], row["outcome"], row["stream"], row["model"]) == (1, "ok", False, "tiny")
    assert whole.usage is not None
    assert (row["prompt_tokens"], row["completion_tokens"]) == (whole.usage.prompt_tokens,
                                                                whole.usage.completion_tokens)  # fmt: skip
    assert 0 < row["first_token_ms"] <= row["total_ms"] < 120_000
    assert abs(row["time"].timestamp() - time.time()) < 600
    with client.chat.completions.with_streaming_response.create(
        model="tiny", messages=asked, max_tokens=8, temperature=0, stream=True
    ) as raw:
        request_id = raw.headers["x-request-id"]
        for _ in raw.iter_lines():
            pass
    (row,) = found(folder, request_id)
    assert (row["completion"], row["stream"]) == (rows[0]["completion"], True)


def test_other_routes(service: tuple[str, Path]) -> None:
    """Completions with two prompts, responses, the Open Inference Protocol."""
    url, folder = service
    body = {"model": "tiny", "prompt": ["the quick", "hello"], "n": 2, "max_tokens": 4, "temperature": 0}
    _, headers, data = call(url, "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    rows = found(folder, headers["x-request-id"], 4)
    assert [row["prompt"] for row in rows] == ["the quick"] * 2 + ["hello"] * 2
    assert [row["completion"] for row in rows] == [each["text"] for each in json.loads(data)["choices"]]
    assert all(row["messages"] is None for row in rows)
    body = {"model": "tiny", "input": "hello", "instructions": "be kind", "max_output_tokens": 4}
    _, headers, _ = call(url, "POST", "/v1/responses", json.dumps(body), {"Content-Type": "application/json"})
    (row,) = found(folder, headers["x-request-id"])
    assert [each["role"] for each in json.loads(row["messages"])] == ["system", "user"]
    before = len(rows_of(folder))
    answer = post(url, "/v2/models/tiny/generate", {"text_input": "the lazy", "max_tokens": 4, "temperature": 0,
                                                    "exclude_input_in_output": True})  # fmt: skip
    assert answer[0] == 200
    assert wait_for(lambda: len(rows_of(folder)) > before)
    (row,) = [row for row in rows_of(folder) if row["route"].startswith("/v2/")]
    assert (row["prompt"], row["completion"]) == ("the lazy", answer[1]["text_output"])
    assert wait_for(lambda: metric(url, "soma:request_log_rows_total", table="requests") == len(rows_of(folder)))


def test_feedback_is_checked(service: tuple[str, Path]) -> None:
    url, folder = service
    good = {"request_id": "req-" + "0" * 24, "rating": "up"}
    assert post(url, "/v1/feedback", good)[0] == 200
    assert wait_for(lambda: any(row["request_id"] == good["request_id"] for row in rows_of(folder, "feedback")))
    for wrong, param in (({"request_id": "../etc"}, "request_id"), ({"rating": "sideways"}, "rating"),
                         ({"rating": None}, "rating"), ({"choice": -1}, "choice"), ({"more": 1}, "more"),
                         ({"correction": ""}, "correction")):  # fmt: skip
        status, told = post(url, "/v1/feedback", {**good, **wrong})
        assert (status, told["error"]["param"]) == (400, param), told


def test_without_a_log_there_is_no_feedback(service_url: str) -> None:
    status, told = post(service_url, "/v1/feedback", {"request_id": "req-" + "0" * 24, "rating": "up"})
    assert (status, told["error"]["code"]) == (404, "no_request_log")
    assert b'data-feedback="off"' in call(service_url, "GET", "/")[2]


def test_the_gateway_keeps_what_upstreams_say(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Scripted(tokens=4) as upstream:
        config = {
            "models": {"m": {"upstreams": [{"url": f"http://127.0.0.1:{upstream.port}/v1"}], "health": None}},
            "request_log": {"folder": str(log), "rotate": "100ms"},
        }
        with running_gateway(tmp_path, config) as gateway:
            texts = []
            for stream in (False, True):
                body = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": MAIL}]}],
                        "stream": stream}  # fmt: skip
                headers = {"Content-Type": "application/json"}
                _, told, _ = call(gateway.url, "POST", "/v1/chat/completions", json.dumps(body), headers)
                (row,) = found(log, told["x-request-id"])
                assert json.loads(row["messages"]) == [{"role": "user", "content": "write to <email>"}]
                texts.append(row["completion"])
                assert row["outcome"] == "ok"
                assert row["finish_reason"] == "stop"
                assert (row["stream"], row["completion_tokens"]) == (stream, 4)
            assert texts == ["u", "u0 u1 u2 u3 "]
            assert post(gateway.url, "/v1/feedback", {"request_id": told["x-request-id"], "rating": "down"})[0] == 200
            gateway.process.send_signal(signal.SIGTERM)
            assert gateway.process.wait(60) == 0
    assert [row["rating"] for row in rows_of(log, "feedback")] == ["down"]


def test_sampling_and_feedback_for_what_was_not_sampled(tmp_path: Path) -> None:
    ids = [f"req-{n:024x}" for n in range(2000)]
    assert 150 < sum(is_sampled(each, 0.1) for each in ids) < 250
    assert all(is_sampled(each, 1.0) for each in ids)
    log = make_log(tmp_path, sample=0.0)
    for each in ids[:3]:
        log.ended(record_of(log, each, key="key-1"), Usage(3, 1))
    log.feedback(Caller("key-2"), {"request_id": ids[0], "choice": 0, "rating": "up"})  # another's
    log.feedback(Caller("key-1"), {"request_id": ids[1], "choice": 0, "rating": "up"})
    log.close()
    assert [row["request_id"] for row in rows_of(tmp_path)] == [ids[1]]
    assert rows_of(tmp_path)[0]["prompt_version"] == "greet@3"
    assert len(rows_of(tmp_path, "feedback")) == 2
    assert log.counts() == {"requests": 1, "feedback": 2, "dropped": 0, "errors": 0}


def test_refused_and_endless_requests_are_not_kept(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.ended(record_of(log, "a"), Usage(outcome="refused"))
    log.ended(record_of(log, "b", "x" * (MOST_BYTES + 1)), Usage())
    log.ended(record_of(log, "c", key="key-1"), Usage())
    log.close()
    assert [row["request_id"] for row in rows_of(tmp_path)] == ["c"]
    assert log.counts()["dropped"] == 1


def test_redaction_and_its_absence(tmp_path: Path) -> None:
    own = "soma_0123456789_" + "a" * 43
    said = f"card 4111 1111 1111 1111, key {own}, mail a@example.org"
    for redact in (True, False):
        log = make_log(tmp_path / str(redact), redact=redact)
        log.ended(record_of(log, "a", said), Usage())
        log.feedback(None, {"request_id": "a", "choice": 0, "correction": said, "comment": own})
        log.close()
    (row,) = rows_of(tmp_path / "True")
    assert (row["completion"], row["redactions"]) == ("card <card>, key <secret>, mail <email>", 3)
    (row,) = rows_of(tmp_path / "True", "feedback")
    assert (row["correction"], row["comment"]) == ("card <card>, key <secret>, mail <email>", "<secret>")
    (row,) = rows_of(tmp_path / "False")
    assert row["completion"] == said


def test_asked_of_bodies() -> None:
    assert asked_of({"prompt": ["a", "b"], "n": 3}) == {"prompts": ["a", "b"], "n": 3, "stream": False}
    assert asked_of({"prompt": [1, 2]})["prompts"] == []
    assert asked_of({"input": [{"role": "user", "content": [{"text": "x"}]}]})["messages"] == [
        {"role": "user", "content": "x"}
    ]
    picture = {"role": "user", "content": [{"type": "image_url"}]}
    assert asked_of({"messages": [picture, 7]})["messages"] == [picture, 7]


WRITES = """
import sys
from pathlib import Path
from soma.serve.requestlog.writer import Writer
writer = Writer(Path(sys.argv[1]), rotate=0.05, rotate_bytes=20_000, redact=False, on_written=lambda *_: None,
                on_dropped=lambda *_: None, on_error=lambda: None)
print("ready", flush=True)
for number in range(10**9):
    writer.put("requests", lambda number=number: [{"request_id": str(number), "completion": "x" * 500}], 500)
    if number % 50 == 0:
        import time; time.sleep(0.002)
"""


def test_kill_leaves_no_torn_file(tmp_path: Path) -> None:
    """Killed at several points: every visible file is whole, numbers have no gap, the next start sweeps."""
    for round_ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = len(list((tmp_path / "requests").glob("[!.]*.parquet")))
        assert wait_for(lambda b=before: len(list((tmp_path / "requests").glob("[!.]*.parquet"))) > b + 2)  # type: ignore[misc]
        time.sleep(0.003 * round_)
        process.kill()
        process.communicate()
        numbers = [int(row["request_id"]) for row in rows_of(tmp_path)]
        runs = [place for place, number in enumerate(numbers) if number == 0]
        assert len(runs) == round_ + 1
        for start, end in zip(runs, [*runs[1:], len(numbers)], strict=True):
            assert numbers[start:end] == list(range(end - start))
    stale = tmp_path / "requests" / f".{os.uname().nodename}-{process.pid}-1-1.parquet.tmp"
    stale.write_bytes(b"half")
    others = tmp_path / "requests" / f".{os.uname().nodename}-{os.getppid()}-1-1.parquet.tmp"
    others.write_bytes(b"half")
    make_log(tmp_path).close()
    assert (stale.exists(), others.exists()) == (False, True)


FULL = """
import resource, sys, time
from pathlib import Path
from soma.serve.requestlog.config import RequestLogConfig
from soma.serve.requestlog.gate import RequestLog
from soma.serve.calls import Usage
log = RequestLog(RequestLogConfig(folder=Path(sys.argv[1]), rotate=0.05))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # writes fail as on a full disk
log.feedback(None, {"request_id": "r", "choice": 0, "rating": "up"})
deadline = time.monotonic() + 60
while not log.counts()["errors"] and time.monotonic() < deadline:
    time.sleep(0.01)
print(log.counts()["errors"])
print(sorted(path.name for path in Path(sys.argv[1]).rglob("*") if path.is_file()))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.close()
print(log.counts()["feedback"], log.counts()["dropped"])
"""


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """Nothing half is left, the failure is counted, and what waited is written once there is room."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    errors, files, after = done.stdout.splitlines()
    assert int(errors) >= 1
    assert files == "[]"
    assert after == "1 0"
    assert [row["rating"] for row in rows_of(tmp_path, "feedback")] == ["up"]


def test_what_does_not_fit_is_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soma.serve.requestlog.writer.HELD_BYTES", 0)
    dropped: list[tuple[str, int]] = []
    writer = Writer(tmp_path, rotate=1000, rotate_bytes=2000, redact=False, on_written=lambda *_: None,
                    on_dropped=lambda *told: dropped.append(told), on_error=lambda: None)  # fmt: skip
    writer.put("requests", lambda: [{"request_id": "large"}], 3000)
    writer.put("requests", lambda: [{"request_id": 1 / 0}], 10)  # our own mistake costs one record
    writer.put("requests", lambda: [{"request_id": "fits"}], 10)
    writer.close()
    assert [row["request_id"] for row in rows_of(tmp_path)] == ["fits"]
    assert sorted(dropped) == [("failed", 1), ("no_space", 1)]
    (file,) = (tmp_path / "requests").glob("[!.]*.parquet")
    assert pq.read_schema(file).names == list(REQUESTS)


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the request log belongs there"):
        make_log(tmp_path / "file")
    with pytest.raises(UserError, match="a share from 0 to 1"):
        request_log_config(tmp_path, sample=2.0)
    assert request_log_config(None) is None
    with pytest.raises(UserError, match="no request log"):
        export_feedback(tmp_path, tmp_path / "out")
