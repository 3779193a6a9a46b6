"""Kinds of graph nodes in modules of their own: found by name, checked, built, asked through the gates."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from pydantic import Field
from v2_tools import Record

from soma.base.errors import UserError
from soma.serve.calls import Gates
from soma.serve.graphs import kinds
from soma.serve.graphs.config import GraphsFile
from soma.serve.graphs.kinds import NodeKind, Place
from soma.serve.graphs.serve import graphs_app
from soma.serve.v2.datatypes import Tensors
from soma.serve.v2.model import Job, Once, Options, TensorSpec, V2Model
from soma.serve.yaml_file import read_as

YAML = """
models:
  measure:
    python: parts.py:measure
    inputs: [{name: text, datatype: BYTES, shape: [-1]}]
    outputs: [{name: length, datatype: INT64, shape: [-1]}]
graphs:
  g:
    inputs: [{name: text, datatype: BYTES, shape: [-1]}]
    outputs: [{name: loud, datatype: BYTES, shape: [-1]}]
    nodes: {main: {shout: {times: 2}, outputs: {shouted: loud}}}
"""


class Shouting(V2Model):
    """Asks the model `measure` of the service, and shouts."""

    inputs = (TensorSpec("text", "BYTES", (-1,)),)
    outputs = (TensorSpec("shouted", "BYTES", (-1,)),)

    def __init__(self, times: int, place: Place) -> None:
        self.times, self.place, self.closed = times, place, False

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        raise AssertionError("job is asked")

    async def job(self, tensors: Tensors, options: Options) -> Job:
        async def answer() -> Tensors:
            found = await self.place.ask("measure", {"text": tensors["text"]}, options)
            marks = "!" * self.times
            texts = [f"{each.decode().upper()}{marks}{n}" for each, n in zip(tensors["text"], found["length"],
                                                                            strict=True)]  # fmt: skip
            return {"shouted": np.array(texts)}

        return Once(answer, options.timeout)

    def close(self) -> None:
        self.closed = True


class Shout(NodeKind):
    times: int = Field(1, ge=1)

    def build(self, place: Place) -> V2Model:
        if self.times > 9:
            raise UserError("too loud")
        return Shouting(self.times, place)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    module = ModuleType("shouting")
    module.Shout = Shout  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shouting", module)
    monkeypatch.setitem(kinds.KINDS, "shout", "shouting:Shout")
    monkeypatch.setitem(kinds.KINDS, "absent", "soma_no_such_module:Absent")
    (tmp_path / "parts.py").write_text("def measure(text):\n    return [len(each) for each in text]\n")
    (tmp_path / "graphs.yaml").write_text(YAML)
    return tmp_path


def test_a_kind_of_another_module(folder: Path) -> None:
    record = Record()
    app = graphs_app(folder / "graphs.yaml", Gates([record]), allow_control=True)
    with TestClient(app) as client:
        answer = client.post("/v2/models/g/generate", json={"text": "abc"})
        assert answer.json()["loud"] == "ABC!!3"
        assert [(call.model, call.route) for call in record.entered] == [
            ("g", "/v2/models/g/generate"), ("g.main", "/graphs/g/main"), ("measure", "/graphs/g/main"),
        ]  # fmt: skip
        assert [usage.outcome for usage in record.left] == ["ok"] * 3
        direct = client.post("/v2/models/g.main/generate", json={"text": "x"})  # an address of its own
        assert direct.json()["shouted"] == "X!!1"
        before = app.state.v2.repository.get("g.main").loaded.model
        assert client.post("/v2/repository/models/g.main/load").status_code == 200
        after = app.state.v2.repository.get("g.main").loaded.model
        assert (before.closed, after.closed) == (True, False)
        assert client.get("/graphs/g").json()["nodes"]["main"]["kind"] == "shout"


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ("{shout: {times: 0}}", "shout: times: Input should be greater"),
        ("{shout: {pitch: 3}}", "shout: pitch: Extra inputs"),
        ("{shout: {}, model: measure}", "a shout has no model"),
        ("{shout: {}, sequence: [main]}", "expected one of"),
        ("{shout: {}, absent: {}}", "expected one kind"),
        ("{absent: {}}", "needs more packages"),
        ("{further: {}}", "further: no key of a node"),
        ("{nothing: {}}", "nothing"),
    ],
)
def test_mistakes_name_the_key(folder: Path, node: str, told: str) -> None:
    text = YAML.replace("{shout: {times: 2}, outputs: {shouted: loud}}", node)
    (folder / "graphs.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        read_as(GraphsFile, folder / "graphs.yaml")


def test_a_node_that_cannot_be_built_is_named(folder: Path) -> None:
    (folder / "graphs.yaml").write_text(YAML.replace("times: 2", "times: 10"))
    with pytest.raises(UserError, match=r"graphs\.g\.nodes\.main: too loud"):
        graphs_app(folder / "graphs.yaml")
