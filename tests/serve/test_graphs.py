"""Inference graphs: a real engine behind OpenAI's API, another V2 server, ONNX and Python, tied together in YAML."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from fastapi.testclient import TestClient
from http_tools import call, metric, post, wait_for
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rich.console import Console
from tiny_onnx import write_onnx
from typer.testing import CliRunner
from v2_tools import Record, Served, v2_server

from soma.base.errors import UserError
from soma.cli import app as cli
from soma.serve.calls import Caller, Gates
from soma.serve.database import Database, ledger
from soma.serve.graphs.config import GraphsFile
from soma.serve.graphs.serve import graphs_app
from soma.serve.graphs.show import draw
from soma.serve.keys.store import KeyStore
from soma.serve.yaml_file import read_as

PYTHON = """
import asyncio
import numpy as np

def topic(text):
    return np.array(["refund" if b"money" in each else "other" for each in text.ravel()])

def form(text_input):
    return np.array(["Please fill in the form."] * len(text_input))

def length(text_input):
    return np.array([len(each) for each in text_input])

def features(count):
    return np.stack([count, count * 2, -count], 1)

def best(outputs):
    scores = {name: float(each["y"].sum()) for name, each in outputs.items()}
    return {"winner": np.array([max(scores, key=scores.get)])}

def one(x):
    return x + 1

def two(x):
    return x * 10

def broken(x):
    raise RuntimeError("secret")

async def slow(x):
    await asyncio.sleep(30)
    return x
"""
YAML = """
models:
  topics:
    python: parts.py:topic
    inputs: [{name: text, datatype: BYTES, shape: [-1]}]
    outputs: [{name: label, datatype: BYTES, shape: [-1]}]
    batching: {max_batch: 8}
  forms:
    python: parts.py:form
    inputs: [{name: text_input, datatype: BYTES, shape: [-1]}]
    outputs: [{name: text_output, datatype: BYTES, shape: [-1]}]
  lengths:
    python: parts.py:length
    inputs: [{name: text_input, datatype: BYTES, shape: [-1]}]
    outputs: [{name: count, datatype: INT64, shape: [-1]}]
  features:
    python: parts.py:features
    inputs: [{name: count, datatype: INT64, shape: [-1]}]
    outputs: [{name: x, datatype: FP32, shape: [-1, 3]}]
  relu: {onnx: relu.onnx, threads: 1}
  one: {python: "parts.py:one", inputs: [&x {name: x, datatype: FP32, shape: [-1, -1]}],
        outputs: [&y {name: y, datatype: FP32, shape: [-1, -1]}]}
  two: {python: "parts.py:two", inputs: [*x], outputs: [*y]}
  broken: {python: "parts.py:broken", inputs: [*x], outputs: [*y]}
  slow: {python: "parts.py:slow", inputs: [*x], outputs: [*y]}
graphs:
  support:
    inputs: [{name: text_input, datatype: BYTES, shape: [-1]}]
    outputs:
      - {name: text_output, datatype: BYTES, shape: [-1]}
      - {name: label, datatype: BYTES, shape: [-1]}
      - {name: y, datatype: FP32, shape: [-1, 3]}
    nodes:
      main: {sequence: [look, answer]}
      look: {ensemble: [classify, measure]}
      classify: {model: topics, inputs: {text: text_input}}
      measure: {sequence: [count, features, relu]}
      count: {model: lengths}
      features: {model: features}
      relu: {model: relu}
      answer: {switch: [{when: {label: [refund, money]}, node: form}, {node: llm}]}
      form: {model: forms}
      llm: {openai: "URL/v1", model: tiny, parameters: {max_tokens: 12, temperature: 0, ignore_eos: true, seed: null}}
  split:
    inputs: [*x]
    outputs: [{name: y, datatype: FP32, shape: [-1, -1]}]
    nodes:
      main: {splitter: [{node: one, weight: 90}, {node: two, weight: 10}, {node: broken, shadow: true}], by: user}
      one: {model: one}
      two: {model: two}
      broken: {model: broken}
  race:
    inputs: [*x]
    outputs: [{name: winner, datatype: BYTES, shape: [1]}]
    nodes:
      main: {ensemble: [one, two], combine: "parts.py:best"}
      one: {model: one}
      two: {model: two}
  clash:
    inputs: [*x]
    outputs: [*y]
    nodes: {main: {ensemble: [one, two]}, one: {model: one}, two: {model: two}}
  patience:
    inputs: [*x]
    outputs: [*y]
    nodes: {slow: {model: slow}}
  chain:
    inputs: [*x]
    outputs: [*y]
    nodes:
      main: {sequence: [inner, again]}
      inner: {model: race}
      again: {model: two}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, service_url: str) -> Path:
    made = tmp_path_factory.mktemp("graphs")
    (made / "parts.py").write_text(PYTHON)
    (made / "graphs.yaml").write_text(YAML.replace("URL", service_url))
    write_onnx(made / "relu.onnx")
    return made


@pytest.fixture(scope="module")
def record() -> Record:
    return Record()


@pytest.fixture(scope="module")
def app(folder: Path, record: Record) -> Any:
    return graphs_app(folder / "graphs.yaml", Gates([record]), allow_control=True)


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[TestClient]:
    with TestClient(app) as made:
        yield made


@pytest.fixture(scope="module")
def served(app: Any) -> Iterator[Served]:
    with v2_server(app.state.v2) as made:
        yield made


@pytest.fixture(autouse=True)
def _fresh(record: Record) -> None:
    record.entered, record.left, record.refuses = [], [], False


def completion(url: str, prompt: str, **changes: Any) -> str:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **changes}
    return str(post(url, "/v1/completions", body)[1]["choices"][0]["text"])


def generate(client: TestClient, graph: str, **body: Any) -> Any:
    return client.post(f"/v2/models/{graph}/generate", json=body)


def test_encoder_llm_classifier_and_what_combines_them(client: TestClient, service_url: str, record: Record) -> None:
    answer = generate(client, "support", text_input="hello world", id="7")
    assert answer.status_code == 200, answer.text
    value = answer.json()
    assert value["text_output"] == completion(service_url, "hello world")
    assert value["label"] == "other"
    assert value["y"] == [22, 44, -11]  # relu(x) + x of (11, 22, -11)
    assert (value["model_name"], value["id"]) == ("support", "7")
    refund = generate(client, "support", text_input="my money back").json()
    assert (refund["text_output"], refund["label"]) == ("Please fill in the form.", "refund")
    shorter = generate(client, "support", text_input="hello world", max_tokens=3, top_k=9).json()  # top_k: not named
    assert shorter["text_output"] == completion(service_url, "hello world", max_tokens=3)


def test_every_node_passes_the_gates(client: TestClient, record: Record) -> None:
    """Each under its own name, tokens where they are made, for whoever asked the graph."""
    generate(client, "support", text_input="hello world")
    calls = {call.model: call for call in record.entered}
    assert set(calls) == {"support", "topics", "lengths", "features", "relu", "support.llm"}
    assert calls["support.llm"].tags == {"graph": "support", "node": "llm"}
    assert calls["support.llm"].max_tokens == 12
    assert calls["support"].tags == {}
    assert {call.address for call in record.entered} == {"testclient"}
    assert [usage.outcome for usage in record.left] == ["ok"] * 6
    assert sorted(usage.completion_tokens for usage in record.left) == [0, 0, 0, 0, 0, 12]


def test_a_key_for_the_graph_is_enough(app: Any, record: Record) -> None:
    """It may not use the nodes from outside, and may through the graph."""
    from soma.serve.v2.front import InferRequest
    from soma.serve.v2.model import Origin

    caller = Caller("key-1", models=("race",))
    front = app.state.v2

    async def ask(model: str) -> Any:
        x = np.ones((1, 2), np.float32)
        request = InferRequest(model, inputs={"x": x}, datatypes={"x": "FP32"})
        running = await front.start(request, Origin("/r", "::1", caller))
        async with running:
            return await running.only()

    (winner,) = asyncio.run(ask("race"))
    assert winner.array.tolist() == [b"two"]
    assert {(call.model, call.caller) for call in record.entered} == {
        ("race", caller), ("one", replace(caller, models=None)), ("two", replace(caller, models=None)),
    }  # fmt: skip
    with pytest.raises(Exception, match="may not use the model `one`"):
        asyncio.run(ask("one"))


def test_streaming_through_the_graph(client: TestClient, served: Served, service_url: str) -> None:
    expected = completion(service_url, "the quick")
    answer = client.post("/v2/models/support/generate_stream", json={"text_input": "the quick"})
    events = [json.loads(line[6:]) for line in answer.text.split("\n") if line]
    assert len(events) > 2
    assert "".join(event["text_output"] for event in events) == expected
    assert {event["label"] for event in events} == {"other"}
    made = triton_grpc.InferenceServerClient(served.grpc)
    prompt = triton_grpc.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"the quick"], object))
    assert made.infer("support", [prompt]).as_numpy("text_output")[0].decode() == expected
    made.close()


def test_a_client_that_leaves_frees_the_engine_behind(served: Served, service_url: str, record: Record) -> None:
    link = triton_grpc.InferenceServerClient(served.grpc)
    answers: list[Any] = []
    link.start_stream(lambda result, error: answers.append((result, error)))
    prompt = triton_grpc.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"hello"], object))
    link.async_stream_infer("support", [prompt], parameters={"max_tokens": 4000})
    assert wait_for(lambda: len(answers) > 2)
    assert wait_for(lambda: metric(service_url, "vllm:num_requests_running") == 1)
    link.stop_stream(cancel_requests=True)
    link.close()
    assert wait_for(lambda: metric(service_url, "vllm:num_requests_running") == 0)
    assert wait_for(lambda: len(record.entered) == len(record.left))
    used = {entered.model: usage for entered, usage in zip(record.entered, record.left, strict=True)}
    assert {usage.outcome for usage in used.values()} == {"ok", "abort"}


def test_splitter(client: TestClient, app: Any) -> None:
    """9 in 10 go one way, equal users the same way, and a shadow that breaks hurts nobody."""
    graph = app.state.graphs["split"]
    graph.random.seed(1)

    def ask(**more: Any) -> float:
        answer = generate(client, "split", x=[[5.0]], **more)
        assert answer.status_code == 200, answer.text
        return float(answer.json()["y"])

    ways = Counter(ask() for _ in range(200))
    assert set(ways) == {6, 50}
    assert 160 < ways[6] < 197
    users = {user: ask(user=user) for user in range(60)}
    assert set(users.values()) == {6, 50}
    assert all(ask(user=user) == way for user, way in users.items())
    assert wait_for(lambda: not graph.shadows)
    seen = graph.described()["nodes"]
    assert seen["broken"]["failed"] == seen["broken"]["count"] > 100
    assert seen["main"]["failed"] == 0


def test_ensemble(client: TestClient) -> None:
    assert generate(client, "race", x=[[1.0, 2.0]]).json()["winner"] == "two"
    clash = generate(client, "clash", x=[[1.0]])
    assert clash.status_code == 500
    assert "y twice" in clash.json()["error"]


def test_a_deadline_covers_the_whole_graph(client: TestClient, record: Record) -> None:
    for limit in (100_000, 2_000_000, 20_000_000):  # a busy machine may take seconds until a node begins
        record.entered.clear()
        record.left.clear()
        answer = generate(client, "patience", x=[[1.0]], timeout=limit)
        assert answer.status_code == 504
        if len(record.entered) == 2:
            break
    assert len(record.left) == len(record.entered) == 2
    assert record.entered[1].timeout is not None
    assert record.entered[1].timeout <= limit / 1e6


def test_a_node_is_deployed_alone(client: TestClient, folder: Path) -> None:
    assert generate(client, "race", x=[[1.0]]).json()["winner"] == "two"
    (folder / "parts.py").write_text(PYTHON.replace("return x + 1", "return x + 100"))
    assert client.post("/v2/repository/models/one/load").status_code == 200
    assert generate(client, "race", x=[[1.0]]).json()["winner"] == "one"
    (folder / "parts.py").write_text(PYTHON)
    assert client.post("/v2/repository/models/one/load").status_code == 200
    assert client.post("/v2/repository/models/one/unload").status_code == 200
    assert generate(client, "race", x=[[1.0]]).status_code == 503
    assert client.get("/v2/models/race/ready").status_code == 503
    assert client.post("/v2/repository/models/one/load").status_code == 200
    assert client.get("/v2/models/race/ready").status_code == 200
    direct = generate(client, "one", x=[[1.0]])  # every node has an address of its own
    assert direct.json()["y"] == 2


REMOTE = """
graphs:
  far:
    inputs: [{name: x, datatype: KIND, shape: [-1, -1]}]
    outputs: [{name: y, datatype: KIND, shape: [-1, -1]}]
    nodes: {echo: {v2: "http://HOST", model: echo_KIND}}
  wrong:
    inputs: [{name: x, datatype: FP32, shape: [-1]}]
    outputs: [{name: y, datatype: FP32, shape: [-1]}]
    nodes: {breaks: {v2: "http://HOST", model: breaks}}
  gone:
    inputs: [{name: text_input, datatype: BYTES, shape: [-1]}]
    outputs: [{name: text_output, datatype: BYTES, shape: [-1]}]
    nodes: {llm: {openai: "http://127.0.0.1:9/v1", model: m}}
  lost:
    inputs: [{name: x, datatype: FP32, shape: [-1]}]
    outputs: [{name: y, datatype: FP32, shape: [-1]}]
    nodes: {there: {v2: "http://127.0.0.1:9", model: m}}
"""


@pytest.mark.parametrize("kind", ["FP32", "BYTES", "INT8", "FP16", "BF16", "BOOL"])
def test_another_v2_server(tmp_path: Path, kind: str) -> None:
    from test_v2_clients import sample

    with v2_server() as far:
        (tmp_path / "far.yaml").write_text(REMOTE.replace("HOST", far.http).replace("KIND", kind))
        with v2_server(graphs_app(tmp_path / "far.yaml").state.v2) as near:
            made = triton_http.InferenceServerClient(near.http)
            array = sample(kind)
            given = triton_http.InferInput("x", list(array.shape), kind)
            given.set_data_from_numpy(array)
            assert np.array_equal(made.infer("far", [given]).as_numpy("y"), array)
            assert made.get_model_metadata("far.echo")["inputs"] == [{"name": "x", "datatype": kind, "shape": [-1, -1]}]
            if kind == "FP32":
                for graph, body, status in (
                    ("wrong", {"x": [-1.0]}, 502), ("gone", {"text_input": "a"}, 503), ("lost", {"x": [1.0]}, 503),
                ):  # fmt: skip
                    url = f"http://{near.http}"
                    got, _, data = call(url, "POST", f"/v2/models/{graph}/generate", json.dumps(body))
                    assert got == status, data
                    assert "a node of the graph" in json.loads(data)["error"]
            made.close()


def test_an_llm_that_refuses(client: TestClient) -> None:
    answer = generate(client, "support", text_input="hello", max_tokens=-1)
    assert answer.status_code == 400
    assert "max_tokens" in answer.json()["error"]
    stream = client.post("/v2/models/support/generate_stream", json={"text_input": "hello", "max_tokens": -1})
    assert "max_tokens" in json.loads(stream.text[6:])["error"]


def test_the_path_of_a_request_in_a_trace(client: TestClient) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    generate(client, "support", text_input="my secret money back")
    every = exporter.get_finished_spans()  # some versions of FastAPI add their own around ours
    spans = {span.name: span for span in every if span.name.startswith(("graph", "node "))}
    assert set(spans) == {"graph", *(f"node {name}" for name in (
        "main", "look", "classify", "measure", "count", "features", "relu", "answer", "form"))}  # fmt: skip
    identities = {span.context.span_id: name for name, span in spans.items() if span.context}
    parents = {name: identities.get(span.parent.span_id) if span.parent else None for name, span in spans.items()}
    assert parents["graph"] is None
    assert parents["node main"] == "graph"
    assert parents["node classify"] == parents["node measure"] == "node look"
    assert parents["node form"] == "node answer"
    assert len({span.context.trace_id for span in spans.values() if span.context}) == 1
    assert "secret" not in "".join(span.to_json() for span in every)
    exporter.clear()
    generate(client, "split", x=[[5.0]])

    def failed() -> set[str]:
        return {span.name for span in exporter.get_finished_spans() if span.status.description}

    assert wait_for(lambda: failed() == {"node broken"})


def test_show(folder: Path, client: TestClient, service_url: str) -> None:
    shown = CliRunner().invoke(cli, ["graph", "show", str(folder / "graphs.yaml")])
    assert shown.exit_code == 0
    for words in ("support  text_input → text_output, label, y", "main  one after another", "classify  model topics",
                  "label = ['refund', 'money']: form", "else: llm", f"at {service_url}/v1", "90%: one",
                  "shadow: broken"):  # fmt: skip
        assert words in shown.stdout, words
    generate(client, "race", x=[[1.0]])
    nodes = client.get("/graphs/race").json()["nodes"]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(draw("race", read_as(GraphsFile, folder / "graphs.yaml").graphs["race"], nodes))
    text = console.export_text()
    assert "requests" in text
    assert "p95" in text
    assert client.get("/graphs/nobody").status_code == 404
    missing = CliRunner().invoke(cli, ["graph", "show", str(folder / "graphs.yaml"), "--url", "http://127.0.0.1:9"])
    assert isinstance(missing.exception, UserError)


GRAPH = """
models: {m: {python: "parts.py:one", inputs: [{name: x, datatype: FP32, shape: [-1]}], outputs: [{name: y, datatype: FP32, shape: [-1]}]}}
graphs: {g: {inputs: [{name: x, datatype: FP32, shape: [-1]}], outputs: [{name: y, datatype: FP32, shape: [-1]}], nodes: NODES}}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ("{}", "nodes"), ("{a: {}}", "got none"), ("{a: {model: n}}", "model n is not in this file"),
        ("{a: {sequence: [b]}}", "leads to b, which is no node"), ("{a: {sequence: [a]}}", "a circle: a → a"),
        ("{a: {sequence: [b]}, b: {sequence: [a]}}", "a circle"),
        ("{a: {model: m}, b: {model: m}}", "nothing leads to b"),
        ("{a: {sequence: [b], model: m}, b: {model: m}}", "has no model of its own"),
        ("{a: {sequence: [b], ensemble: [b]}, b: {model: m}}", "got sequence, ensemble"),
        ("{a: {openai: 'http://x'}}", "needs model"), ("{a: {openai: x, model: m}}", "no http://"),
        ("{a: {v2: 'http://x', model: m, key_env: SOMA_NO_SUCH_KEY}}", "SOMA_NO_SUCH_KEY"),
        ("{a: {splitter: [{node: b, shadow: true}]}, b: {model: m}}", "weight"),
        ("{a: {model: m, combine: 'parts.py:best'}}", "combine is for an ensemble"),
        ("{a: {ensemble: [b], combine: 'parts.py:no'}, b: {model: m}}", "there is no no"),
        ("{a: {modell: m}}", "graphs.g.nodes.a.modell"),
    ],
)  # fmt: skip
def test_mistakes_are_named(folder: Path, tmp_path: Path, nodes: str, words: str) -> None:
    (tmp_path / "parts.py").write_text(PYTHON)
    (tmp_path / "g.yaml").write_text(GRAPH.replace("NODES", nodes))
    with pytest.raises(UserError) as caught:
        graphs_app(tmp_path / "g.yaml")
    assert words in str(caught.value)


def test_keys_and_the_ledger(folder: Path, tmp_path: Path, served: Served) -> None:
    """The command with a database: nobody in without a key, over REST and gRPC, and tokens counted at the node."""
    where = str(tmp_path / "keys.db")
    database = Database(where)
    key, secret = KeyStore(database).create("alice", models=("support",))
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        port, grpc_port = one.getsockname()[1], two.getsockname()[1]
    command = [sys.executable, "-m", "soma.cli", "graph", "serve", str(folder / "graphs.yaml"), "--port", str(port),
               "--grpc-port", str(grpc_port), "--keys", where]  # fmt: skip
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    given = {"Authorization": f"Bearer {secret.text}"}

    def is_up() -> bool:
        assert process.poll() is None
        try:
            return call(url, "GET", "/v2/health/ready")[0] == 200
        except OSError:
            return False

    try:
        assert wait_for(is_up, 120)
        body = json.dumps({"text_input": "hello world", "max_tokens": 5})
        status, headers, data = call(url, "POST", "/v2/models/support/generate", body)
        assert status == 401
        assert "www-authenticate" in headers
        assert list(json.loads(data)) == ["error"]
        assert call(url, "POST", "/v2/models/support/generate", body, given)[0] == 200
        assert call(url, "POST", "/v2/models/one/generate", '{"x": [[1]]}', given)[0] == 403
        index = json.loads(call(url, "POST", "/v2/repository/index", None, given)[2])
        assert {each["name"] for each in index} == {"support"}
        made = triton_grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}")
        with pytest.raises(Exception, match="asks for a key"):
            made.get_model_metadata("support")
        headers = {"authorization": f"Bearer {secret.text}"}
        assert made.get_model_metadata("support", headers=headers).name == "support"
        with pytest.raises(Exception, match="may not use the model `one`"):
            made.is_model_ready("one", headers=headers)
        made.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        with database.engine.connect() as connection:
            rows = connection.execute(sa.select(ledger)).all()
        counted = {row.model: row.completion_tokens for row in rows if row.key_id == key.id and row.outcome == "ok"}
        assert counted["support.llm"] == 5
        assert counted["support"] == 0
        assert "topics" in counted
    finally:
        process.kill()
        process.wait()
        database.close()
