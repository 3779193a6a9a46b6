"""gRPC and REST fed with rubbish: every answer is an error that says so, or right, and the server goes on."""

import random
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from http_tools import call, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from v2_tools import Served, v2_server

from soma.serve.errors import ApiError
from soma.serve.v2.messages import pb, read_request

METHODS = [
    method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    if not method.client_streaming
]  # fmt: skip
NAMES = ["simple", "echo_BYTES", "echo_FP32", "breaks", "scores", "counter", "liar", "nobody", ""]
DATATYPES = ["INT32", "FP32", "BYTES", "FP16", "BF16", "INT8", "", "FP99"]
# UNKNOWN is what an exception that nobody caught would give.
EXPECTED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED}  # fmt: skip


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with v2_server() as made:
        yield made


@pytest.fixture(scope="module")
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(served.grpc) as made:
        yield made


def send(channel: grpc.Channel, method: str, data: bytes) -> grpc.StatusCode:
    try:
        channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(data, timeout=120)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def works(served: Served, channel: grpc.Channel) -> None:
    """A good request is answered, nothing is open, and what entered has left."""
    request = pb.ModelInferRequest(model_name="echo_FP32")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    data = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(request.SerializeToString(), timeout=120)
    assert list(pb.ModelInferResponse.FromString(data).outputs[0].contents.fp32_contents) == [1, 2]
    assert wait_for(lambda: served.front.host.open == 0)
    assert wait_for(lambda: len(served.record.entered) == len(served.record.left))


def test_contents_beside_raw_bytes() -> None:
    """Empty ones, as MLServer's client sends them, are as none; others are refused."""
    request = pb.ModelInferRequest(model_name="echo_FP32", raw_input_contents=[np.float32([1, 2]).tobytes()])
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    tensor.contents.SetInParent()
    assert tensor.HasField("contents")
    assert read_request(request).inputs["x"].tolist() == [[1, 2]]
    tensor.contents.fp32_contents.append(1)
    with pytest.raises(ApiError, match="contents must be empty"):
        read_request(request)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(METHODS), st.binary(max_size=200))
def test_random_bytes(served: Served, channel: grpc.Channel, method: str, data: bytes) -> None:
    assert send(channel, method, data) in EXPECTED | {grpc.StatusCode.OK}
    works(served, channel)


def random_request(source: random.Random) -> Any:
    """A message that looks like a request: names that are there, shapes and contents that may or may not fit."""
    made = pb.ModelInferRequest(model_name=source.choice(NAMES), model_version=source.choice(["", "", "1", "3", "x"]))
    for _ in range(source.choice([0, 1, 1, 1, 2, 3])):
        shape = [source.choice([0, 1, 2, 3, 16, -1, 1 << 62]) for _ in range(source.choice([0, 1, 1, 2, 2, 3, 40]))]
        tensor = made.inputs.add(
            name=source.choice(["x", "INPUT0", "INPUT1", "until", ""]), datatype=source.choice(DATATYPES), shape=shape
        )
        count = source.choice([0, 1, 2, 3, 4, 16, int(np.prod(shape, dtype=object)) % 1000 if shape else 1])
        for field in source.sample(
            ["int_contents", "fp32_contents", "bytes_contents", "uint64_contents"], source.choice([0, 1, 2])
        ):
            value = {"int_contents": 7, "fp32_contents": 0.5, "bytes_contents": b"\xff", "uint64_contents": 1}[field]
            getattr(tensor.contents, field).extend([value] * count)
    for _ in range(source.choice([0, 0, 1, 2, len(made.inputs)])):
        made.raw_input_contents.append(source.randbytes(source.choice([0, 1, 4, 8, 12, 64, 128])))
    for _ in range(source.choice([0, 0, 1])):
        output = made.outputs.add(name=source.choice(["y", "OUTPUT0", "nothing"]))
        output.parameters["classification"].int64_param = source.choice([-1, 0, 2, 1 << 60])
    for key in source.sample(["timeout", "priority", "binary_data_output", "triton_enable_empty_final_response"], 1):
        field, value = source.choice([("int64_param", -1), ("int64_param", 1), ("int64_param", 10_000_000),
                                      ("string_param", "x"), ("bool_param", True)])  # fmt: skip
        setattr(made.parameters[key], field, value)
    return made


def test_messages_that_look_valid(served: Served, channel: grpc.Channel) -> None:
    source = random.Random()
    codes = {send(channel, "ModelInfer", random_request(source).SerializeToString()) for _ in range(400)}
    assert codes <= EXPECTED | {grpc.StatusCode.OK}
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
    works(served, channel)


def test_streams_of_such_messages(served: Served, channel: grpc.Channel) -> None:
    """Every request of a stream is answered, with an error or a result; broken off it leaves nothing behind."""
    source = random.Random()
    for round_ in range(10):
        requests = [random_request(source) for _ in range(40)]
        for place, request in enumerate(requests):
            request.id = str(place)
        stub = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        answers = stub(iter(requests), timeout=60)
        if round_ % 2:
            next(answers)
            answers.cancel()
        else:
            ids = {answer.infer_response.id for answer in answers}
            decoupled = {request.id for request in requests if request.model_name == "counter"}
            assert ids | decoupled == {str(place) for place in range(40)}
        works(served, channel)


def test_rest_random_bodies(served: Served, channel: grpc.Channel) -> None:
    source = random.Random()
    good = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.5]}], "id": "a"}'
    for _ in range(300):
        body = bytearray(good)
        for _ in range(source.randint(0, 6)):
            place = source.randrange(len(body))
            body[place : place + source.randint(0, 4)] = source.randbytes(source.randint(0, 4))
        headers = (
            {"Inference-Header-Content-Length": str(source.randint(0, len(body)))} if source.random() < 0.3 else {}
        )
        path = f"/v2/models/breaks/{source.choice(['infer', 'generate', 'generate_stream'])}"
        status = call(f"http://{served.http}", "POST", path, bytes(body), headers)[0]
        assert status in (200, 400), (status, bytes(body))
    works(served, channel)
