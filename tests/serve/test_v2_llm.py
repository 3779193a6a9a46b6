"""An engine behind the Open Inference Protocol: the same tokens as /v1, the same gates, and what a client that leaves
stops."""

import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from fastapi.testclient import TestClient
from http_tools import wait_for
from tiny import make_model
from tritonclient.utils import InferenceServerException
from v2_tools import Record, Served, v2_server

from soma.engine.embed import Embedder
from soma.engine.engine import Engine
from soma.engine.load import load_weights
from soma.engine.stats import stats_of
from soma.serve.app import create_app
from soma.serve.calls import Caller, Gates, Usage
from soma.serve.errors import ApiError

GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def record() -> Record:
    return Record()


@pytest.fixture(scope="module")
def app(record: Record, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = make_model(tmp_path_factory.mktemp("v2"), num_hidden_layers=4)
    model, tokenizer = load_weights(folder, precision="fp32", device="cpu")
    engine = Engine(model, tokenizer, max_running=4)
    embedder = Embedder(model, folder, max_length=engine.max_length)
    yield create_app(engine, tokenizer, "tiny", gates=Gates([record]), embedder=embedder)
    engine.close()


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


def completion(client: TestClient, prompt: str, **changes: Any) -> str:
    body = {"model": "tiny", "prompt": prompt, **GREEDY, **changes}
    return str(client.post("/v1/completions", json=body).json()["choices"][0]["text"])


def text(module: Any, name: str, *values: str) -> Any:
    made = module.InferInput(name, [len(values)], "BYTES")
    made.set_data_from_numpy(np.array([value.encode() for value in values], object))
    return made


def yes(module: Any, name: str, value: bool = True) -> Any:
    made = module.InferInput(name, [1], "BOOL")
    made.set_data_from_numpy(np.array([value]))
    return made


def test_generate(client: TestClient, record: Record) -> None:
    expected = completion(client, "hello world")
    record.entered.clear()
    record.left.clear()
    body = {"text_input": "hello world", "id": "7", "exclude_input_in_output": True, "parameters": GREEDY}
    answer = client.post("/v2/models/tiny/generate", json=body)
    assert answer.status_code == 200
    assert answer.json() == {"model_name": "tiny", "model_version": "1", "id": "7", "text_output": expected}
    (call,) = record.entered
    assert (call.route, call.model, call.max_tokens) == ("/v2/models/tiny/generate", "tiny", 6)
    assert answer.headers["x-request-id"] == call.id
    assert answer.headers["x-ratelimit-remaining-requests"] == "7"
    assert record.left == [Usage(call.prompt_tokens, 6)]
    assert call.prompt_tokens > 0
    # As Triton's vLLM backend, the prompt comes first unless told otherwise; parameters may stand outside too.
    whole = client.post("/v2/models/tiny/generate", json={"text_input": "hello world", **GREEDY}).json()
    assert whole["text_output"] == "hello world" + expected


def events(answer: Any) -> list[dict[str, Any]]:
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines]


def test_generate_stream(client: TestClient, record: Record) -> None:
    expected = completion(client, "the quick")
    answer = client.post("/v2/models/tiny/generate_stream", json={"text_input": "the quick", **GREEDY})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer)
    assert len(found) > 1
    assert "".join(each["text_output"] for each in found) == expected
    assert record.left[-1].completion_tokens == 6
    whole = client.post(
        "/v2/models/tiny/generate_stream", json={"text_input": "the quick", "stream": False, **GREEDY}
    )  # fmt: skip
    assert [each["text_output"] for each in events(whole)] == ["the quick" + expected]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text_input": "a", "temperature": -1}, "temperature"),
        ({"text_input": "a", "max_tokenz": 3}, "max_tokenz"),
        ({"text_input": []}, "text_input is empty"),
        ({"text_input": 5}, "must be strings"),
        ({}, "give either text_input or input_ids"),
        ({"text_input": "a", "input_ids": [3]}, "give either"),
        ({"input_ids": [10**6]}, "vocabulary"),
        ({"text_input": "a", "stream": True}, "generate_stream"),
        ({"text_input": "a", "sampling_parameters": "{"}, "must be JSON"),
        ({"text_input": "a", "sampling_parameters": '{"stream": true}'}, "no sampling parameter"),
        ({"text_input": "a", "sampling_parameters": '{"lora_name": "x"}'}, "does not exist"),
        ({"text_input": "a", "parameters": {"text_input": "b"}}, "given twice"),
    ],
)
def test_bad_generate(client: TestClient, record: Record, body: dict[str, Any], words: str) -> None:
    answer = client.post("/v2/models/tiny/generate", json=body)
    assert answer.status_code in (400, 404)
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"]
    assert record.entered == []


def test_infer_gives_what_is_asked_for(client: TestClient, served: Served) -> None:
    expected = [completion(client, prompt) for prompt in ("hello", "the lazy dog")]
    sampling = json.dumps({"temperature": "0.0", "max_tokens": "6", "ignore_eos": True})  # texts, as Triton's examples
    for module, address in ((triton_http, served.http), (triton_grpc, served.grpc)):
        made = module.InferenceServerClient(address)
        flags = ("exclude_input_in_output", "return_finish_reason", "return_num_output_tokens", "return_logprobs",
                 "return_num_input_tokens", "return_cumulative_logprob")  # fmt: skip
        inputs = [text(module, "text_input", "hello", "the lazy dog"), text(module, "sampling_parameters", sampling)]
        result = made.infer("tiny", inputs + [yes(module, flag) for flag in flags])
        assert [each.decode() for each in result.as_numpy("text_output")] == expected
        assert [each.decode() for each in result.as_numpy("finish_reason")] == ["length", "length"]
        assert result.as_numpy("num_output_tokens").tolist() == [6, 6]
        steps = [json.loads(each) for each in result.as_numpy("logprobs")]
        sums = [sum(next(iter(step.values()))["logprob"] for step in each) for each in steps]
        assert np.allclose(result.as_numpy("cumulative_logprob"), sums, atol=1e-4)
        made.close()


def test_ids_in_and_out(client: TestClient, served: Served) -> None:
    ids = client.post("/tokenize", json={"prompt": "hello world"}).json()["tokens"]
    expected = completion(client, "hello world")
    made = triton_grpc.InferenceServerClient(served.grpc)
    prompt = triton_grpc.InferInput("input_ids", [len(ids)], "INT64")
    prompt.set_data_from_numpy(np.array(ids, np.int64))
    inputs = [prompt, yes(triton_grpc, "return_output_ids"), yes(triton_grpc, "exclude_input_in_output")]
    result = made.infer("tiny", inputs, parameters=GREEDY)
    assert result.as_numpy("text_output")[0].decode() == expected
    got = result.as_numpy("output_ids").tolist()
    assert len(got) == 6
    assert client.post("/detokenize", json={"tokens": got}).json()["prompt"] == expected
    made.close()


def stream_of(served: Served, prompt: str, **sampling: Any) -> Iterator[Any]:
    """Requests for ModelStreamInfer of a raw gRPC client."""
    inputs = [text(triton_grpc, "text_input", prompt), yes(triton_grpc, "stream"),
              text(triton_grpc, "sampling_parameters", json.dumps(sampling))]  # fmt: skip
    made: Any = triton_grpc.service_pb2.ModelInferRequest(model_name="tiny")
    for each in inputs:
        made.inputs.append(each._get_tensor())
        made.raw_input_contents.append(each._get_content())
    yield made


def test_stream_over_grpc(client: TestClient, served: Served, record: Record) -> None:
    expected = completion(client, "hello")
    with grpc.insecure_channel(served.grpc) as channel:
        stub = triton_grpc.service_pb2_grpc.GRPCInferenceServiceStub(channel)
        texts = [
            each.infer_response.raw_output_contents[0][4:].decode()
            for each in stub.ModelStreamInfer(stream_of(served, "hello", **GREEDY))
        ]
    assert len(texts) > 1
    assert "".join(texts) == expected
    assert record.left[-1] == Usage(record.entered[-1].prompt_tokens, 6)


LONG = {"max_tokens": 4000, "ignore_eos": True}


@pytest.mark.parametrize("how", ["cancel", "deadline", "gone"])
def test_a_client_that_leaves_frees_the_engine(
    app: Any, served: Served, record: Record, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    runner, step = app.state.service.engine.runner, app.state.service.engine.runner.step
    monkeypatch.setattr(runner, "step", lambda batch: time.sleep(0.005) or step(batch))  # 4000 tokens: 20 s
    channel = grpc.insecure_channel(served.grpc)
    stub = triton_grpc.service_pb2_grpc.GRPCInferenceServiceStub(channel)
    call = stub.ModelStreamInfer(stream_of(served, "hello", **LONG), timeout=2.5 if how == "deadline" else None)
    next(call)
    assert record.entered[-1].max_tokens == 4000
    if how == "cancel":
        call.cancel()
    if how == "gone":
        channel.close()
    assert wait_for(lambda: len(record.left) == 1)
    assert record.left[0].outcome in ("abort", "error")
    assert 0 < record.left[0].completion_tokens < 4000
    assert wait_for(lambda: app.state.service.open == 0)
    assert wait_for(lambda: stats_of(app.state.service.engine)["running"] == 0)
    channel.close()


def test_a_deadline_reaches_the_engine(client: TestClient, record: Record) -> None:
    body = {"text_input": "hello", "timeout": 150_000, **LONG}  # microseconds
    answer = client.post("/v2/models/tiny/generate", json=body)
    assert answer.status_code == 504
    assert record.left[0].outcome == "error"


def test_refused_by_a_gate(client: TestClient, served: Served, record: Record) -> None:
    record.refuses = True
    for path in ("generate", "generate_stream"):
        answer = client.post(f"/v2/models/tiny/{path}", json={"text_input": "a"})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "3"
        assert answer.json() == {"error": "enough"}
    made = triton_grpc.InferenceServerClient(served.grpc)
    with pytest.raises(InferenceServerException) as caught:
        made.infer("tiny", [text(triton_grpc, "text_input", "a")])
    assert "RESOURCE_EXHAUSTED" in str(caught.value.status())
    made.close()
    assert record.left == []


def test_embeddings(client: TestClient, served: Served, record: Record) -> None:
    texts = ["hello world", "the quick brown fox"]
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": texts}).json()
    expected = [each["embedding"] for each in answer["data"]]
    record.left.clear()
    for module, address in ((triton_http, served.http), (triton_grpc, served.grpc)):
        made = module.InferenceServerClient(address)
        got = made.infer("tiny-embeddings", [text(module, "text", *texts)]).as_numpy("embedding")
        assert np.allclose(got, expected, atol=1e-6)
        made.close()
    assert record.left == [Usage(answer["usage"]["prompt_tokens"])] * 2
    assert {call.model for call in record.entered} == {"tiny"}  # keys, limits and prices are those of the model


class Guard:
    """Knows one key."""

    def admit(self, given: Any, address: str, path: str) -> Caller:
        assert address == "127.0.0.1"
        if list(given) != ["right"]:
            raise ApiError(401, "this key is not valid")
        if path.endswith("ModelLoad"):
            raise ApiError(403, "this key may not use this route")
        return Caller("key-1")


def test_keys_over_grpc(app: Any, record: Record) -> None:
    with v2_server(app.state.v2, guard=Guard()) as served:
        made = triton_grpc.InferenceServerClient(served.grpc)
        inputs = [text(triton_grpc, "text_input", "a"), text(triton_grpc, "sampling_parameters", json.dumps(GREEDY))]
        assert made.is_server_live()
        assert made.is_server_ready()
        attempts: list[Any] = [
            made.get_server_metadata, made.get_model_repository_index, made.get_inference_statistics,
            *(partial(method, "tiny") for method in (made.is_model_ready, made.get_model_metadata, made.load_model,
                                                     made.unload_model)),
            partial(made.infer, "tiny", inputs),
        ]  # fmt: skip
        for attempt in attempts:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}):
                with pytest.raises(InferenceServerException, match="not valid"):
                    attempt(headers=headers)
        with pytest.raises(InferenceServerException, match="may not"):
            made.load_model("tiny", headers={"x-api-key": "right"})
        for headers in ({"authorization": "Bearer right"}, {"x-api-key": "right"}):
            made.infer("tiny", inputs, headers=headers)
        assert [call.caller for call in record.entered] == [Caller("key-1")] * 2
        with grpc.insecure_channel(served.grpc) as channel:
            stub = triton_grpc.service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.ModelStreamInfer(stream_of(served, "a", **GREEDY)))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        made.close()


def test_draining(app: Any, served: Served) -> None:
    """Readiness turns first; requests are refused; what runs goes on."""
    made = triton_grpc.InferenceServerClient(served.grpc)
    http = triton_http.InferenceServerClient(served.http)
    app.state.service.draining = True
    try:
        assert not made.is_server_ready()
        assert not http.is_server_ready()
        assert made.is_server_live()
        assert http.is_server_live()
        for module, one in ((triton_grpc, made), (triton_http, http)):
            with pytest.raises(InferenceServerException, match="shutting down"):
                one.infer("tiny", [text(module, "text_input", "a")])
    finally:
        app.state.service.draining = False
    assert made.is_server_ready()
    made.close()
    http.close()
