"""The service as a process: metrics, clients that leave, a full queue, SIGTERM, ports, hosts, the probe."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path

import psutil
import pytest
from http_tools import JSON, LONG, call, connection, metric, open_stream, post, wait_for

from soma.base.errors import UserError
from soma.engine.engine import Engine
from soma.engine.params import SamplingParams
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer
from soma.serve.app import create_app
from soma.serve.listener import check_host, listen
from soma.serve.options import ServeOptions
from soma.serve.probe import percentile, probe
from soma.serve.running import running_service
from soma.serve.server import serve


def idle(url: str) -> bool:
    return metric(url, "vllm:num_requests_running") == 0 == metric(url, "vllm:num_requests_waiting")


def test_health_and_metrics(service_url: str) -> None:
    assert json.loads(call(service_url, "GET", "/health")[2]) == {"status": "ok"}
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count",
             "vllm:inter_token_latency_seconds_count", "vllm:e2e_request_latency_seconds_count")  # fmt: skip

    def values() -> list[float]:
        finished = metric(service_url, "vllm:request_success_total", finished_reason="length", model_name="tiny")
        return [*(metric(service_url, name, model_name="tiny") for name in names), finished]

    before = values()
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 10, "ignore_eos": True, "n": 2}
    assert post(service_url, "/v1/completions", body)[0] == 200
    assert [after - start for start, after in zip(before, values(), strict=True)] == [3, 20, 2, 18, 2, 2]
    status, headers, _ = call(service_url, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(service_url: str, stream: bool) -> None:
    assert wait_for(lambda: idle(service_url))
    aborted = metric(service_url, "vllm:request_success_total", finished_reason="abort")
    if stream:
        link, _ = open_stream(service_url, n=2)
    else:
        link = connection(service_url)
        link.request("POST", "/v1/completions", json.dumps({**LONG, "n": 2}), JSON)
    assert wait_for(lambda: metric(service_url, "vllm:num_requests_running") == 2)
    assert link.sock is not None
    link.sock.shutdown(socket.SHUT_RDWR)
    link.close()
    assert wait_for(lambda: idle(service_url))
    assert metric(service_url, "vllm:request_success_total", finished_reason="abort") == aborted + 2


def test_a_full_queue_is_429_with_retry_after(service_url: str) -> None:
    """4 run, 8 wait, the 13th is told to come back; the health check and the metrics still answer."""
    links = [open_stream(service_url, n=4)[0]]
    waiting = connection(service_url)
    waiting.request("POST", "/v1/completions", json.dumps({**LONG, "n": 8}), JSON)
    assert wait_for(lambda: metric(service_url, "vllm:num_requests_waiting") == 8)
    status, headers, data = call(service_url, "POST", "/v1/completions", json.dumps(LONG), JSON)
    assert status == 429
    assert int(headers["retry-after"]) >= 1
    assert json.loads(data)["error"]["code"] == "queue_full"
    assert call(service_url, "GET", "/health")[0] == 200
    for link in (*links, waiting):
        assert link.sock is not None
        link.sock.shutdown(socket.SHUT_RDWR)
        link.close()
    assert wait_for(lambda: idle(service_url))


@contextmanager
def own_process(folder: Path, **options: object) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A service whose process the test has in its hands."""
    arguments = json.dumps({"model_ref": str(folder), "port": 0, **options})
    code = "import sys; from soma.serve.running import main; main(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", code, arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_sigterm_finishes_streams_and_refuses_new_requests(tiny_folder: Path) -> None:
    with own_process(tiny_folder) as (url, process):
        link, answer = open_stream(url, max_tokens=100)
        (engine,) = psutil.Process(process.pid).children()
        engine.suspend()  # the stream goes on when all the rest has been seen
        process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: call(url, "GET", "/health")[0] == 503)
        status, headers, data = call(url, "POST", "/v1/completions", json.dumps({**LONG, "max_tokens": 2}), JSON)
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert json.loads(data)["error"]["code"] == "shutting_down"
        engine.resume()
        rest = answer.read()
        link.close()
        assert b'"finish_reason":"length"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        assert process.wait(timeout=60) == 0


def is_cut_off(answer: HTTPResponse) -> bool:
    """Whether a stream ended before its 4000 tokens were made."""
    try:
        return b'"finish_reason":"length"' not in answer.read()
    except (HTTPException, ConnectionError):
        return True


def test_sigterm_waits_no_longer_than_the_grace(tiny_folder: Path) -> None:
    with own_process(tiny_folder, grace=0.5) as (url, process):
        link, answer = open_stream(url)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert time.monotonic() - started > 0.3
        assert is_cut_off(answer)
        link.close()


def test_a_second_signal_ends_at_once(tiny_folder: Path) -> None:
    with own_process(tiny_folder) as (url, process):
        link, answer = open_stream(url)
        process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: call(url, "GET", "/health")[0] == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert is_cut_off(answer)
        link.close()


def test_an_engine_error_in_a_stream_is_an_event(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status is out already: the client gets an event with the error, without our insides, then [DONE]."""
    import uvicorn

    engine = Engine(load_model(tiny_folder), Tokenizer.load(tiny_folder), cache_tokens=8192)
    step = engine.runner.step
    monkeypatch.setattr(engine.runner, "step", lambda batch: step(batch) if batch.longest <= 8 else [][0])
    app = create_app(engine, Tokenizer.load(tiny_folder), "tiny")
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        assert wait_for(lambda: server.started)
        link, answer = open_stream(url)
        rest = answer.read()
        link.close()
        events = [json.loads(line[6:]) for line in rest.decode().split("\n\n") if line.startswith("data: {")]
        assert events[-1]["error"]["type"] == "server_error"
        assert "list index" not in rest.decode()
        assert rest.endswith(b"data: [DONE]\n\n")
        status, value = post(url, "/v1/completions", LONG)
        assert (status, value["error"]["code"]) == (500, "engine_error")
        short = {**LONG, "max_tokens": 2}
        assert post(url, "/v1/completions", short)[0] == 200
        engine.close()
        assert post(url, "/v1/completions", short)[0] == 503
        assert call(url, "GET", "/health")[0] == 503
    finally:
        server.should_exit = True
        thread.join(60)
        engine.close()
        listener.close()


def test_streamed_metrics_and_engine_agree_with_the_python_api(service_url: str, tiny_folder: Path) -> None:
    """HTTP adds nothing: the engine in this process gives the same text."""
    tokenizer = Tokenizer.load(tiny_folder)
    engine = Engine(load_model(tiny_folder), tokenizer, cache_tokens=8192)
    try:
        params = SamplingParams(seed=11, max_tokens=25, temperature=0.8, top_p=0.9)
        mine = engine.generate(tokenizer.encode("hello"), params)
    finally:
        engine.close()
    body = {"model": "tiny", "prompt": "hello", "seed": 11, "max_tokens": 25, "temperature": 0.8, "top_p": 0.9}
    assert post(service_url, "/v1/completions", body)[1]["choices"][0]["text"] == mine.text


def test_a_port_in_use(tmp_path: Path) -> None:
    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    try:
        with pytest.raises(UserError, match=rf"port {port} .* in use.*--port"):
            serve(tmp_path, ServeOptions(port=port))
    finally:
        taken.close()
    with pytest.raises(UserError, match="0 to 65535"):
        listen("127.0.0.1", 70_000)
    with pytest.raises(UserError, match="host nowhere"):
        listen("nowhere.invalid", 0)


def test_only_this_machine_unless_said(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.5", "example.org", ""):
        with pytest.raises(UserError, match="allow-public"):
            serve(tmp_path, ServeOptions(host=host))
        check_host(host, allow_public=True)
    for host in ("127.0.0.1", "127.0.0.9", "::1", "localhost"):
        check_host(host, allow_public=False)


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model folder"), running_service(tmp_path / "none"):
        pass


def test_the_probe(service_url: str, base_url: str) -> None:
    for url, is_chat in ((service_url, True), (base_url, False)):
        result = probe(url, ["hello", "the fox", "world"], max_tokens=12, concurrency=2)
        json.dumps(result, allow_nan=False)
        assert result["chat"] == is_chat
        assert (result["succeeded"], result["failed"]) == (3, 0)
        for row, prompt in zip(result["requests"], ("hello", "the fox", "world"), strict=True):
            assert row["prompt"] == prompt
            assert row["finish_reason"] in ("stop", "length")
            assert 0 < row["ttft_seconds"] <= row["e2e_seconds"]
        assert result["percentiles"]["ttft_seconds"]["p50"] > 0
        assert result["tokens_per_second"] > 0
    same = probe(service_url, ["hello"], max_tokens=12)["requests"][0]["answer"]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0}
    assert post(service_url, "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == same
    failed = probe(service_url, ["x" * 20_000], max_tokens=5)
    assert failed["failed"] == 1
    assert "context" in failed["requests"][0]["error"]
    with pytest.raises(UserError, match="does not name its models"):
        probe(service_url, ["x"], model="other")


def test_percentiles() -> None:
    assert percentile([1, 2, 3, 4], 90) == pytest.approx(3.7)
    assert percentile([5.0], 99) == 5.0


def test_uvloop_is_used_where_it_is(service_url: str) -> None:
    pytest.importorskip("uvloop")
    import uvicorn

    factory = uvicorn.Config(lambda: None).get_loop_factory()
    assert factory is not None
    assert "uvloop" in factory.__module__
    assert os.environ["OMP_NUM_THREADS"] == "1"
