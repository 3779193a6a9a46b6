"""Models from a file: Python functions and classes, ONNX, encoders; versions, batching, loading anew; `soma serve`."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from http_tools import call, wait_for
from redis_tools import free_ports
from test_embeddings import TEXTS, bert_folder  # noqa: F401  (a fixture)
from tiny_onnx import write_onnx
from v2_tools import v2_server

from soma.base.errors import UserError
from soma.engine.embed import load_embedder
from soma.model.tokenizer import Tokenizer
from soma.serve.options import ServeOptions
from soma.serve.server import serve
from soma.serve.v2.batched import BatchedModel
from soma.serve.v2.config import ModelsFile, add_models
from soma.serve.v2.front import Alone, Front
from soma.serve.v2.repository import Repository
from soma.serve.yaml_file import read_as

PYTHON = """
import asyncio
import numpy as np
from soma.serve.v2.model import TensorSpec, V2Model

VERSION = 1

def label(text, parameters):
    return np.array([parameters.get("prefix", "") + ("good" if b"good" in each else "bad") for each in text.ravel()])

async def both(a, b=None):
    await asyncio.sleep(0)
    return {"total": a if b is None else a + b, "version": np.full(len(a), VERSION)}

class Twice(V2Model):
    inputs = (TensorSpec("x", "FP64", (-1,)),)
    outputs = (TensorSpec("y", "FP64", (-1,)),)

    async def infer(self, tensors, parameters):
        return {"y": 2 * tensors["x"]}

ready_made = Twice()
"""
YAML = """
models:
  sentiment:
    python: mine.py:label
    inputs: [{name: text, datatype: BYTES, shape: [-1]}]
    outputs: [{name: label, datatype: BYTES, shape: [-1]}]
  sum:
    python: mine.py:both
    inputs:
      - {name: a, datatype: INT32, shape: [-1]}
      - {name: b, datatype: INT32, shape: [-1], optional: true}
    outputs: [{name: total, datatype: INT32, shape: [-1]}, {name: version, datatype: INT64, shape: [-1]}]
    load: false
  twice:
    python: mine.py:Twice
    versions: {"2": {python: "mine.py:ready_made"}}
  relu:
    onnx: relu.onnx
    labels: [a, b, c]
    threads: 1
    batching: {max_batch: 8, max_delay_ms: 20, pad: true}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(PYTHON)
    (tmp_path / "models.yaml").write_text(YAML)
    write_onnx(tmp_path / "relu.onnx")
    return tmp_path


def repository_of(folder: Path) -> Repository:
    made = Repository()
    add_models(made, read_as(ModelsFile, folder / "models.yaml"), folder)
    return made


def tensor(module: Any, name: str, array: np.ndarray, datatype: str) -> Any:
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def test_models_of_a_file(folder: Path) -> None:
    with v2_server(Front(repository_of(folder), Alone(), allow_control=True)) as served:
        client = triton_http.InferenceServerClient(served.http)
        texts = np.array([b"good day", b"rain"], object)
        result = client.infer("sentiment", [tensor(triton_http, "text", texts, "BYTES")], parameters={"prefix": "so "})
        assert result.as_numpy("label").tolist() == [b"so good", b"so bad"]

        assert not client.is_model_ready("sum")
        client.load_model("sum")
        a = tensor(triton_http, "a", np.array([1, 2], np.int32), "INT32")
        assert client.infer("sum", [a]).as_numpy("total").tolist() == [1, 2]
        assert client.infer("sum", [a]).as_numpy("version").tolist() == [1, 1]
        (folder / "mine.py").write_text(PYTHON.replace("VERSION = 1", "VERSION = 7"))
        client.load_model("sum")  # loading again reads the file again
        assert client.infer("sum", [a]).as_numpy("version").tolist() == [7, 7]
        (folder / "mine.py").write_text("this is no Python")
        with pytest.raises(Exception, match="SyntaxError"):
            client.load_model("sum")
        assert client.infer("sum", [a]).as_numpy("version").tolist() == [7, 7]  # what was loaded stays

        assert client.get_model_metadata("twice")["versions"] == ["1", "2"]
        x = np.array([1.5], np.float64)
        assert client.infer("twice", [tensor(triton_http, "x", x, "FP64")]).as_numpy("y").tolist() == [3.0]

        metadata = client.get_model_metadata("relu")
        assert metadata["platform"] == "onnxruntime_onnx"
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
        rows = np.random.default_rng().standard_normal((5, 3)).astype(np.float32)
        got = client.infer("relu", [tensor(triton_http, "x", rows, "FP32")]).as_numpy("y")
        assert np.allclose(got, np.maximum(rows, 0) + rows, atol=1e-6)
        wanted = [triton_http.InferRequestedOutput("y", class_count=1)]
        best = client.infer("relu", [tensor(triton_http, "x", rows[:1], "FP32")], outputs=wanted).as_numpy("y")
        assert best.ravel()[0].decode().split(":")[2] == "abc"[int(rows[0].argmax())]
        client.close()


def test_batches_over_grpc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests at once: everybody's own rows, in fewer runs than requests."""
    compute = BatchedModel.run

    async def late(model: BatchedModel, calls: list[Any]) -> list[Any]:
        while model.batcher.batches == 0 and len(model.batcher.queue) < 2:  # the first run ends when others wait
            await asyncio.sleep(0.001)
        return await compute(model, calls)

    monkeypatch.setattr(BatchedModel, "run", late)
    repository = repository_of(folder)

    async def run() -> list[np.ndarray]:
        import tritonclient.grpc.aio as aio

        async with aio.InferenceServerClient(served.grpc) as client:
            results = await asyncio.gather(*(
                client.infer("relu", [tensor(triton_grpc, "x", each, "FP32")]) for each in rows
            ))  # fmt: skip
        return [result.as_numpy("y") for result in results]

    rows = list(np.random.default_rng().standard_normal((64, 1, 3)).astype(np.float32))
    with v2_server(Front(repository, Alone())) as served:
        for got, given in zip(asyncio.run(run()), rows, strict=True):
            assert np.allclose(got, np.maximum(given, 0) + given, atol=1e-6)
        (stats,) = served.front.statistics("relu")
    assert stats["inference_count"] == 64
    assert stats["execution_count"] < 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "models.yaml: expected keys and values"), ("models: {}", "models"), ("models: [", "no YAML"),
        ("models: {a: {}}", "models.a: expected one of python, onnx, encoder; got none"),
        ("models: {a: {python: 'x:y', onnx: z}}", "got python, onnx"),
        ("models: {a: {pithon: 'x:y'}}", "models.a.pithon"),
        ("models: {a: {python: 'mine.py'}}", "models.a: python 'mine.py': expected"),
        ("models: {a: {python: 'mine.py:nothing'}}", "there is no nothing"),
        ("models: {a: {python: 'mine.py:VERSION'}}", "no function"),
        ("models: {a: {python: 'mine.py:label'}}", "say its inputs and outputs"),
        ("models: {a: {python: 'other.py:label'}}", "no such file"),
        ("models: {a: {python: 'no_such_package_:f'}}", "No module named"),
        ("models: {a: {onnx: mine.py}}", "models.a: onnx"), ("models: {a: {onnx: gone.onnx}}", "no such file"),
        ("models: {'a/b': {onnx: relu.onnx}}", "must not be empty"),
        ("models: {a: {versions: {'1.2': {onnx: relu.onnx}}}}", "no whole number"),
        ("models: {a: {onnx: relu.onnx, versions: {'1': {onnx: relu.onnx}}}}", "version 1 is there twice"),
        ("models: {a: {python: 'mine.py:Twice', batching: {max_batch: 0}}}", "models.a.batching.max_batch"),
    ],
)  # fmt: skip
def test_mistakes_are_named(folder: Path, text: str, words: str) -> None:
    (folder / "models.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        repository_of(folder)
    assert words in str(caught.value)


def test_soma_serve(tiny_folder: Path, folder: Path) -> None:
    """The command with all of it: the engine's model, the file's models, gRPC beside HTTP, SIGTERM."""
    port, grpc_port = free_ports(2)
    command = [sys.executable, "-m", "soma.cli", "serve", str(tiny_folder), "--port", str(port), "--grpc-port",
               str(grpc_port), "--models", str(folder / "models.yaml"), "--grpc-compression", "gzip"]  # fmt: skip
    process = subprocess.Popen(command, env=os.environ | {"NO_COLOR": "1"})
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        assert process.poll() is None
        try:
            return call(url, "GET", "/v2/health/ready")[0] == 200
        except OSError:
            return False

    try:
        assert wait_for(is_up, 120)
        made = triton_grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}")
        assert made.is_server_ready()
        index = json.loads(call(url, "POST", "/v2/repository/index")[2])
        assert {each["name"] for each in index} == {"tiny", "tiny-embeddings", "sentiment", "sum", "twice", "relu"}
        texts = tensor(triton_grpc, "text", np.array([b"good"], object), "BYTES")
        assert made.infer("sentiment", [texts]).as_numpy("label").tolist() == [b"good"]
        prompt = tensor(triton_grpc, "text_input", np.array([b"hello"], object), "BYTES")
        assert (
            made.infer("tiny", [prompt], parameters={"max_tokens": 3}).as_numpy("text_output")[0].startswith(b"hello")
        )
        with pytest.raises(Exception, match="--allow-model-control"):
            made.load_model("sum")
        made.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_grpc_port_in_use(tiny_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(UserError, match="grpc port"):
        serve(tiny_folder, ServeOptions(port=0, grpc_port=listener.getsockname()[1], in_process=True))
    with pytest.raises(UserError, match="grpc compression 'zip'"):
        serve(tiny_folder, ServeOptions(port=0, grpc_port=0, grpc_compression="zip", in_process=True))


def test_an_encoder_of_the_file(bert_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """The vectors of the embedder itself; padding and company change nothing."""
    (tmp_path / "models.yaml").write_text(f"models: {{minilm: {{encoder: '{bert_folder}'}}}}")
    embedder, tokenizer = load_embedder(bert_folder), Tokenizer.load(bert_folder)
    expected = embedder.embed([tokenizer.inner.encode(text).ids for text in TEXTS])
    with v2_server(Front(repository_of(tmp_path), Alone())) as served:
        client = triton_http.InferenceServerClient(served.http)
        given = np.array([text.encode() for text in TEXTS], object)
        got = client.infer("minilm", [tensor(triton_http, "text", given, "BYTES")]).as_numpy("embedding")
        assert np.allclose(got, expected, atol=1e-5)
        assert client.get_model_metadata("minilm")["outputs"][0]["shape"] == [-1, embedder.dimensions]
        for bad in ([b""], [b"\xff"], []):
            with pytest.raises(Exception, match="text"):
                client.infer("minilm", [tensor(triton_http, "text", np.array(bad, object), "BYTES")])
        client.close()
    embedder.close()
