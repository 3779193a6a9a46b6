"""The feature store's own paths without Feast: repositories, joins of files, what goes online, lookups in a graph."""

import json
import runpy
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from aiohttp import web
from fastapi.testclient import TestClient
from feast_tools import VIEW, FeatureServer, stand_in
from gateway_tools import Scripted
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app as cli
from soma.serve.features import environment
from soma.serve.features.repo import init, materialize, online_store, sources
from soma.serve.features.server import running_feature_server
from soma.serve.graphs.config import GraphsFile
from soma.serve.graphs.serve import graphs_app
from soma.serve.yaml_file import read_as

STARTER = files("soma.serve.features").joinpath("starter")


def soma(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["features", *arguments])


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example's repository, with a stand-in for Feast's program."""
    stand_in(tmp_path / "feast", [VIEW], monkeypatch)
    assert "next: soma features apply" in soma("init", str(tmp_path / "repo")).output
    return tmp_path / "repo"


def truth(rows: list[dict[str, Any]], question: str, at: datetime) -> str | None:
    """What a knowledge base had at that time, by looking at every row."""
    seen = [row for row in rows if row["question"] == question and max(row["event_time"], row["created_time"]) <= at]
    best = max(seen, key=lambda row: (row["event_time"], row["created_time"]), default=None)
    return best["answer"] if best else None


def test_answers_that_change(repo: Path, tmp_path: Path) -> None:
    """200 questions over 20 years: each gets who was known to be president when it was asked, some of them wrongly."""
    out = tmp_path / "out.parquet"
    said = soma("get", "answer:answer", "--repo", str(repo), "--entities", str(repo / "data" / "questions.parquet"),
                "--out", str(out))  # fmt: skip
    assert said.output == f"{out}: 200 rows\n", said.exception
    rows = pq.read_table(repo / "data" / "answers.parquet").to_pylist()
    found = pq.read_table(out).to_pylist()
    assert [row["id"] for row in found] == list(range(200))
    assert [row["answer"] for row in found] == [truth(rows, row["question"], row["event_timestamp"]) for row in found]
    names = {row["answer"] for row in found}
    assert {"Emmanuel Macron", "François Hollande", None} <= names
    hindsight = [truth(rows, row["question"], datetime(2026, 1, 1, tzinfo=UTC)) for row in found]
    assert sum(row["answer"] != later for row, later in zip(found, hindsight, strict=True)) > 60
    corrected = {(row["question"], row["event_time"]) for row in rows}
    assert len(corrected) < len(rows)  # the data has corrections


def test_what_goes_online(repo: Path, tmp_path: Path) -> None:
    """As known at a time: before the correction the wrong name, after it the right one; nothing that was not known."""
    rows = pq.read_table(repo / "data" / "answers.parquet").to_pylist()
    for at in ("2010-01-01", "2017-05-20", "2024-01-05", "2026-01-01"):
        moment = datetime.fromisoformat(at).replace(tzinfo=UTC)
        said = soma("materialize", str(repo), "--at", at)
        written = pq.read_table(tmp_path / "feast" / "answer.parquet").to_pylist()
        expected = {row["question"]: truth(rows, row["question"], moment) for row in rows}
        assert {row["question"]: row["answer"] for row in written} == {k: v for k, v in expected.items() if v}
        assert said.output == f"answer: {len(written)} rows\n"
    asked = (tmp_path / "feast" / "asked").read_text().splitlines()
    assert asked == ["describe ", "write "] * 4  # our own modules are not on its path
    with pytest.raises(UserError, match="nothing: there is no such view"):
        materialize(repo, views=["nothing"])
    assert "expected a time" in str(soma("materialize", str(repo), "--at", "noon").exception)


def test_data_is_the_same_twice(repo: Path) -> None:
    before = {path.name: path.read_bytes() for path in (repo / "data").iterdir()}
    runpy.run_path(str(repo / "make_data.py"), run_name="__main__")
    assert {path.name: path.read_bytes() for path in (repo / "data").iterdir()} == before


def test_mistakes(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = str(repo / "data" / "questions.parquet")
    more = ["--repo", str(repo), "--out", str(tmp_path / "out.parquet")]
    for arguments, words in (
        (["get", "answer:answer", "--entities", "none.parquet", *more], "none.parquet: no such file"),
        (["get", "answer:age", "--entities", questions, *more], "the view answer has answer, since"),
        (["get", "other:age", "--entities", questions, *more], "there are answer"),
        (["get", "answer:answer", "--entities", questions, "--at", "id", *more], "id is int64; expected a timestamp"),
        (["get", "answer:answer", "--entities", str(repo / "facts.csv"), *more], "facts.csv: "),
        (["get", "answer:answer", "--entities", questions], "goes with --repo"),
        (["get", "answer:answer"], "say whose"),
        (["get", "answer:answer", "--entity", "x"], "expected KEY=VALUE"),
        (["get", "answer:answer", "--entity", "question=x", "--url", "http://127.0.0.1:9"], "is away"),
        (["init", str(repo)], "is there already"),
        (["init", str(tmp_path / "new"), "--online", "mysql://x"], "expected sqlite or redis"),
        (["init", str(tmp_path / "new"), "--online", "redis://:secret@h"], "no password here"),
        (["apply", str(tmp_path / "nowhere")], "there is no feature_store.yaml"),
    ):  # fmt: skip
        result = soma(*arguments)
        assert isinstance(result.exception, UserError), (arguments, result.output, result.exception)
        assert words in str(result.exception), arguments
        assert "secret" not in str(result.exception)
    assert not (tmp_path / "out.parquet").exists()
    (tmp_path / "feast" / "refuse").touch()
    assert "feast apply: ValueError: no such entity" in str(soma("apply", str(repo)).exception)
    with pytest.raises(UserError, match="ended with status 3: no Feast here"), running_feature_server(repo):
        pass
    (repo / "data" / "answers.parquet").unlink()
    assert "is no Parquet file that is here" in str(soma("materialize", str(repo)).exception)
    for change in ({"mapped": True}, {"keys": []}):
        (tmp_path / "feast" / "views.json").write_text(json.dumps([{**VIEW, **change}]))
        with pytest.raises(UserError, match="is not supported"):
            sources(repo)
    monkeypatch.setenv("SOMA_FEAST_ENV", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="there is no bin/python"):
        environment.python()


def test_an_environment_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's words, and nothing half-made is left; the lock names what Feast asks for."""
    monkeypatch.delenv("SOMA_FEAST_ENV", raising=False)
    monkeypatch.setenv("SOMA_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, "run", lambda command: refuse(command))
    with pytest.raises(UserError, match="cannot be installed"):
        init(tmp_path / "repo")
    assert not environment.location().exists()
    assert not (tmp_path / "repo").exists()
    pins = [line for line in environment.lock_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    assert any(pin.startswith("feast==") for pin in pins)


def refuse(command: list[str]) -> None:
    raise UserError("Feast cannot be installed")


def test_redis_is_a_setting() -> None:
    assert online_store("redis://h:7000/3") == {
        "type": "redis", "connection_string": "h:7000,db=3", "skip_dedup": True,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- in a graph

GRAPH = """
graphs:
  g:
    inputs: [{name: question, datatype: BYTES, shape: [-1]}]
    outputs: [{name: who, datatype: BYTES, shape: [-1]}, {name: age, datatype: INT64, shape: [-1]},
              {name: text, datatype: BYTES, shape: [-1]}]
    nodes:
      look:
        features:
          url: "URL"
          entities: {question: BYTES}
          get: {"answer:answer": BYTES, "answer:age": INT64}
          defaults: {"answer:age": -1}
          fill: {text: "{{ question }} {{ answer }} ({{ age }})"}
        outputs: {answer: who}
"""


@pytest.fixture
def server() -> Iterator[FeatureServer]:
    with FeatureServer({"chile": {"answer": "Boric", "age": 40}, "france": {"answer": "Macron"}}) as made:
        yield made


@pytest.fixture
def client(server: FeatureServer, tmp_path: Path) -> Iterator[TestClient]:
    file = tmp_path / "graph.yaml"
    file.write_text(GRAPH.replace("URL", server.url))
    with TestClient(graphs_app(file)) as made:
        yield made


def ask(client: TestClient, *questions: str) -> tuple[int, Any]:
    tensor = {"name": "question", "datatype": "BYTES", "shape": [len(questions)], "data": list(questions)}
    answer = client.post("/v2/models/g/infer", json={"inputs": [tensor]})
    value = answer.json()
    if answer.status_code == 200:
        value = {output["name"]: output["data"] for output in value["outputs"]}
    return answer.status_code, value


def test_a_lookup_in_a_graph(client: TestClient, server: FeatureServer) -> None:
    """Many entities in one request to the server; defaults, texts, renamed outputs."""
    assert ask(client, "chile", "france") == (200, {
        "who": ["Boric", "Macron"], "age": [40, -1], "text": ["chile Boric (40)", "france Macron (-1)"],
    })  # fmt: skip
    assert server.seen == [{
        "entities": {"question": ["chile", "france"]}, "features": ["answer:answer", "answer:age"],
        "full_feature_names": True,
    }]  # fmt: skip


def test_what_a_lookup_cannot_find(client: TestClient, server: FeatureServer) -> None:
    status, said = ask(client, "atlantis")
    assert (status, said["error"]) == (404, "the feature store has no answer:answer for this entity")
    server.statuses["chile"] = "OUTSIDE_MAX_AGE"  # the value comes all the same: it is over
    assert ask(client, "chile")[0] == 404
    server.statuses.clear()
    for reply, code in (
        (lambda value: web.Response(text="nonsense"), 502), (lambda value: web.json_response({"results": []}), 502),
        (lambda value: web.json_response("no such view", status=422), 502),
        (lambda value: web.json_response("busy", status=503), 503),
    ):  # fmt: skip
        server.reply = reply
        assert ask(client, "chile")[0] == code
    server.reply = None
    server.rows["chile"]["age"] = "old"
    status, said = ask(client, "chile")
    assert (status, said["error"]) == (502, "the feature store's answer:age is no INT64")
    server.stop()
    assert ask(client, "chile")[0] == 503


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"get": {"answer": "BYTES"}}, "expected VIEW:FEATURE"),
        ({"get": {"a:x": "BYTES", "b:x": "BYTES"}}, "x stands for two tensors"),
        ({"fill": {"question": "x"}}, "question stands for two tensors"),
        ({"defaults": {"a:y": 1}}, "a:y is not looked up"),
        ({"fill": {"text": "{% if %}"}}, "features.fill, line 1"),
        ({"url": "ftp://h"}, "url"),
        ({"key_env": "SOMA_NO_SUCH_KEY"}, "SOMA_NO_SUCH_KEY"),
    ],
)
def test_a_lookup_that_makes_no_sense(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    value = yaml.safe_load(GRAPH.replace("URL", "http://127.0.0.1:9"))
    value["graphs"]["g"]["nodes"]["look"]["features"] |= change
    file = tmp_path / "graph.yaml"
    file.write_text(yaml.safe_dump(value))
    with pytest.raises(UserError, match=words):
        graphs_app(file)


def test_the_example_graph(tmp_path: Path, server: FeatureServer) -> None:
    """The starter's graph: question to features to language model, which gets what is known."""
    question = "who is the president of Chile?"
    server.rows[question] = {"answer": "Gabriel Boric", "since": "2022-03-11"}

    async def complete(request: web.Request, value: dict[str, Any]) -> web.Response:
        return web.json_response({
            "choices": [{"index": 0, "text": " Gabriel Boric", "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
        })  # fmt: skip

    with Scripted() as upstream:
        upstream.answer = complete
        text = STARTER.joinpath("graph.yaml").read_text(encoding="utf-8")
        file = tmp_path / "graph.yaml"
        file.write_text(
            text.replace("http://127.0.0.1:6566", server.url).replace("http://127.0.0.1:8000/v1", upstream.url)
        )
        assert list(read_as(GraphsFile, file).graphs) == ["president"]
        tensor = {"name": "question", "datatype": "BYTES", "shape": [1], "data": [question]}
        with TestClient(graphs_app(file)) as client:
            answer = client.post("/v2/models/president/infer", json={"inputs": [tensor]}).json()
        made = {output["name"]: output["data"] for output in answer["outputs"]}
        assert made == {"text_output": [" Gabriel Boric"], "answer": ["Gabriel Boric"]}
        assert upstream.seen[0]["prompt"] == (
            f"{question} By our records it is Gabriel Boric, since 2022-03-11. The answer is:"
        )


def test_a_lookup_from_the_command_line(server: FeatureServer) -> None:
    said = soma("get", "answer:answer", "answer:age", "--entity", "question=france", "--url", server.url)
    assert json.loads(said.output) == {"answer:answer": "Macron", "answer:age": None}


def test_tables_of_several_files(repo: Path) -> None:
    """A view's path may be a folder of Parquet files."""
    path = repo / "data" / "answers.parquet"
    rows = pq.read_table(path)
    path.unlink()
    path.mkdir()
    pq.write_table(rows.slice(0, 10), path / "a.parquet")
    pq.write_table(rows.slice(10), path / "b.parquet")
    assert materialize(repo) == {"answer": len(set(rows.column("question").to_pylist()))}
    pq.write_table(pa.table({"x": [1]}), path / "a.parquet")
    with pytest.raises(UserError):
        materialize(repo)
