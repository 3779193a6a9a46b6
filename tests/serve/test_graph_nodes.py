"""Nodes of a graph one by one: engines that it owns, limits, versions, metrics, traces, replacement without a break."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from http_tools import call, connection, post, wait_for
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from tiny import make_model
from typer.testing import CliRunner
from v2_tools import served

from soma.base.errors import UserError
from soma.cli import app as cli
from soma.serve.graphs.config import GraphsFile, rules_of
from soma.serve.graphs.serve import graphs_app
from soma.serve.limits.config import LimitsConfig, Rule
from soma.serve.yaml_file import read_as

X, Y = "{name: x, datatype: FP32, shape: [-1]}", "{name: y, datatype: FP32, shape: [-1]}"
YAML = f"""
models:
  add: {{python: "parts.py:add", inputs: [{X}], outputs: [{Y}], versions: {{"2": {{python: "parts.py:add2", inputs: [{X}], outputs: [{Y}]}}}}}}
graphs:
  talk:
    inputs: [{{name: text_input, datatype: BYTES, shape: [-1]}}]
    outputs: [{{name: text_output, datatype: BYTES, shape: [-1]}}]
    nodes:
      main: {{splitter: [{{node: first, weight: 1}}, {{node: second, weight: 0, shadow: true}}]}}
      first: {{llm: {{model: a, in_process: true}}, version: "7", parameters: {{max_tokens: 8, temperature: 0, ignore_eos: true}}}}
      second: {{llm: {{model: a, in_process: true, chat: true, system: be brief}}, parameters: {{max_tokens: 4}}}}
  old: {{inputs: [{X}], outputs: [{Y}], nodes: {{add: {{model: add, version: "1", limits: [{{name: few, limit: 5, window: 1h}}]}}}}}}
  new: {{inputs: [{X}], outputs: [{Y}], nodes: {{add: {{model: add}}}}}}
"""  # noqa: E501
PARTS = "def add(x):\n    return x + 1\n\ndef add2(x):\n    return x + 2\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nodes")
    for name, size in (("a", 128), ("b", 96)):
        (made / name).symlink_to(make_model(tmp_path_factory.mktemp(name), intermediate_size=size))
    (made / "parts.py").write_text(PARTS)
    (made / "graphs.yaml").write_text(YAML)
    return made


@pytest.fixture(scope="module")
def app(folder: Path) -> Iterator[FastAPI]:
    only: Any = {"model": ["add"], "route": ["/v2/models/add/generate"]}
    limits = LimitsConfig(rules=[Rule(name="direct", limit=3, window="1h", only=only)])  # type: ignore[arg-type]
    made = graphs_app(folder / "graphs.yaml", allow_control=True, limits=limits)
    yield made
    made.state.v2.repository.close()


@pytest.fixture(scope="module")
def url(app: FastAPI) -> Iterator[str]:
    with served(app) as made:
        yield made


def generate(url: str, graph: str, **body: Any) -> tuple[int, Any]:
    return post(url, f"/v2/models/{graph}/generate", body)


def load(url: str, model: str) -> int:
    return call(url, "POST", f"/v2/repository/models/{model}/load", "{}", {"Content-Type": "application/json"})[0]


def test_an_engine_of_its_own(url: str, app: FastAPI) -> None:
    """The answer alone, the same whole and streamed, by graph and by the node's own address."""
    status, whole = generate(url, "talk", text_input="hello")
    assert status == 200, whole
    assert whole["text_output"]
    assert not whole["text_output"].startswith("hello")
    _, direct = generate(url, "talk.first", text_input="hello", max_tokens=8, temperature=0, ignore_eos=True)
    assert direct["text_output"] == whole["text_output"]
    _, _, data = call(url, "POST", "/v2/models/talk/generate_stream", json.dumps({"text_input": "hello"}),
                      {"Content-Type": "application/json"})  # fmt: skip
    events = [json.loads(line[6:]) for line in data.decode().split("\n") if line]
    assert len(events) > 2
    assert "".join(event["text_output"] for event in events) == whole["text_output"]
    model = app.state.v2.repository.get("talk.second").loaded.model
    tokenizer = model.service.tokenizer
    expected = tokenizer.encode_chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
                                     True, None)  # fmt: skip
    assert model.read_prompts({"text_input": np.array([b"hi"], object)}) == [expected]


def test_versions(url: str) -> None:
    """A node asks the version that it names, else the newest; its own version is what metadata tells."""
    assert generate(url, "old", x=[1.0])[1]["y"] == 2
    assert generate(url, "new", x=[1.0])[1]["y"] == 3
    _, _, data = call(url, "GET", "/v2/models/talk.first")
    assert json.loads(data)["versions"] == ["7"]


def test_limits_of_a_node_and_of_a_file(url: str) -> None:
    """The node's hold on the way through its graph alone, the file's where they say."""
    found = [generate(url, "old", x=[1.0])[0] for _ in range(6)]
    assert found in ([200] * 4 + [429] * 2, [200] * 5 + [429])  # another test may have asked once
    headers = {"Content-Type": "application/json"}
    _, told, data = call(url, "POST", "/v2/models/old/generate", '{"x": [1.0]}', headers)
    assert "old.add.few" in json.loads(data)["error"]
    assert 0 < int(told["retry-after"]) <= 3600
    assert generate(url, "new", x=[1.0])[0] == 200
    assert [generate(url, "add", x=[1.0])[0] for _ in range(4)] == [200, 200, 200, 429]
    _, _, data = call(url, "GET", "/metrics")
    assert re.search(r'soma:limits_refused_total\{rule="old.add.few"\} [23]', data.decode())


def test_names_of_limits(folder: Path) -> None:
    file = read_as(GraphsFile, folder / "graphs.yaml")
    (rule,) = rules_of(file)
    assert (rule.name, rule.only, rule.limit) == ("old.add.few", {"route": ["/graphs/old/add"]}, 5)
    talk = file.graphs["talk"].nodes["first"]
    talk.limits = [Rule(name="a", limit=1, algorithm="concurrency")]
    made = {rule.name: rule for rule in rules_of(file)}
    assert made["talk.first.a"].only == {"model": ["talk.first"]}
    talk.limits *= 2
    with pytest.raises(UserError, match="two rules are named"):
        rules_of(file)
    talk.limits = []
    with pytest.raises(UserError, match=r"'old\.add\.few' is the name of a node's rule"):
        graphs_app(folder / "graphs.yaml", limits=LimitsConfig(rules=[Rule(name="old.add.few", limit=1)]))
    bad = YAML.replace("main: {splitter", "main: {limits: [{name: a, limit: 1}], splitter")
    (folder / "bad.yaml").write_text(bad)
    with pytest.raises(UserError, match="limits are for a node that computes"):
        read_as(GraphsFile, folder / "bad.yaml")


def test_metrics_of_nodes_and_engines(url: str) -> None:
    generate(url, "talk", text_input="hello")
    _, _, data = call(url, "GET", "/metrics")
    families = list(text_string_to_metric_families(data.decode()))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    samples = {(sample.name, *sorted(sample.labels.items())): sample.value
               for family in families for sample in family.samples}  # fmt: skip
    count = ("soma:graph_node_requests_total", ("graph", "talk"), ("node", "first"), ("outcome", "ok"))
    assert samples[count] >= 1
    engines = {sample.labels["model_name"] for family in families if family.name == "vllm:num_requests_running"
               for sample in family.samples}  # fmt: skip
    assert engines == {"talk.first", "talk.second"}


def test_show_and_deploy_by_url(url: str) -> None:
    shown = CliRunner().invoke(cli, ["graph", "show", url])
    assert shown.exit_code == 0, shown.output
    for words in ("talk  text_input → text_output", "llm talk.first version 7  p50", "shadow: second", "100%: first"):
        assert words in shown.output, shown.output
    told = CliRunner().invoke(cli, ["graph", "deploy", url, "talk.second"])
    assert told.exit_code == 0, told.output
    wrong = CliRunner().invoke(cli, ["graph", "deploy", url, "nobody"])
    assert isinstance(wrong.exception, UserError)
    assert "unknown model" in str(wrong.exception)


def test_a_node_is_replaced_while_it_streams(url: str, app: FastAPI, folder: Path) -> None:
    """The stream ends whole on the old model; requests after the deployment go to the new one."""
    body = {"text_input": "hello", "max_tokens": 300}
    headers = {"Content-Type": "application/json"}
    _, _, data = call(url, "POST", "/v2/models/talk/generate_stream", json.dumps(body), headers)
    expected = data
    before = app.state.v2.repository.get("talk.first").loaded
    link = connection(url)
    link.request("POST", "/v2/models/talk/generate_stream", json.dumps(body), headers)
    answer = link.getresponse()
    first = answer.readline()
    try:
        (folder / "graphs.yaml").write_text(YAML.replace("first: {llm: {model: a", "first: {llm: {model: b"))
        assert load(url, "talk.first") == 200
        assert app.state.v2.repository.get("talk.first").loaded is not before
        other = generate(url, "talk", text_input="hello")[1]["text_output"]
        assert first + answer.read() == expected
        link.close()
        assert wait_for(lambda: not before.model.ready)  # the engine was closed after its last stream
        old = "".join(json.loads(line[6:])["text_output"] for line in expected.decode().split("\n") if line)
        assert not old.startswith(other)
    finally:
        (folder / "graphs.yaml").write_text(YAML)
    (folder / "graphs.yaml").write_text("graphs: {}")
    assert load(url, "talk.first") == 400
    (folder / "graphs.yaml").write_text(YAML)
    assert generate(url, "talk", text_input="hello")[1]["text_output"] == other  # what ran goes on


def test_a_trace_goes_on(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spans of a request belong to the trace that its header names."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with TestClient(app) as client:
        given = {"traceparent": f"00-{trace_id}-{parent}-01"}
        assert client.post("/v2/models/new/generate", json={"x": [1.0]}, headers=given).status_code == 200
        spans = exporter.get_finished_spans()
        assert {span.name for span in spans} >= {"call", "graph", "node add"}
        assert {f"{span.context.trace_id:032x}" for span in spans} == {trace_id}
        tops = {f"{span.parent.span_id:016x}" for span in spans if span.parent is not None and span.parent.is_remote}
        assert tops == {parent}
        exporter.clear()
        for without in ({}, {"traceparent": "nonsense"}):
            assert client.post("/v2/models/new/generate", json={"x": [1.0]}, headers=without).status_code == 200
        assert trace_id not in {f"{span.context.trace_id:032x}" for span in exporter.get_finished_spans()}


@pytest.mark.slow
def test_an_engine_process_is_replaced_while_it_streams(folder: Path) -> None:
    """As above with processes: the old one is gone in the end."""
    text = YAML.replace("model: a, in_process: true}", "model: a}", 1)
    (folder / "process.yaml").write_text(text)
    app = graphs_app(folder / "process.yaml", allow_control=True)
    with contextlib.ExitStack() as stack:
        stack.callback(app.state.v2.repository.close)
        url = stack.enter_context(served(app))
        process = app.state.v2.repository.get("talk.first").loaded.model.service.engine.process
        body = json.dumps({"text_input": "hello", "max_tokens": 300})
        headers = {"Content-Type": "application/json"}
        _, _, expected = call(url, "POST", "/v2/models/talk/generate_stream", body, headers)
        link = connection(url)
        link.request("POST", "/v2/models/talk/generate_stream", body, headers)
        answer = link.getresponse()
        first = answer.readline()
        assert load(url, "talk.first") == 200
        assert first + answer.read() == expected
        link.close()
        assert wait_for(lambda: process.poll() is not None)
        assert generate(url, "talk", text_input="hello")[0] == 200
