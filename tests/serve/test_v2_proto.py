"""The .proto file: its generated code is what it gives, and its names and numbers are the published ones."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import given, settings
from hypothesis import strategies as st
from v2_tools import v2_server

from soma.serve.v2 import inference_pb2
from soma.serve.v2.datatypes import DTYPES, as_objects
from soma.serve.v2.front import InferRequest, Output
from soma.serve.v2.messages import CONTENTS, as_response, pb, read_contents
from tools.proto import generate


def test_generated_code_is_that_of_the_file() -> None:
    pytest.importorskip("grpc_tools")
    assert Path(inference_pb2.__file__).read_text() == generate(), "run `make proto`"


def fields(message: Any) -> dict[str, tuple[int, int, bool]]:
    return {field.name: (field.number, field.type, field.is_repeated) for field in message.fields}


def check_same(ours: Any, published: Any) -> None:
    theirs = fields(published)
    for name, described in fields(ours).items():
        assert theirs[name] == described, f"{ours.full_name}.{name}"
    nested = {each.name: each for each in published.nested_types}
    for each in ours.nested_types:
        check_same(each, nested[each.name])


def test_names_and_numbers_are_the_published_ones() -> None:
    """Against the descriptors that tritonclient carries; both live in this process, which needs pools of their own."""
    published = triton_grpc.service_pb2.DESCRIPTOR
    ours = inference_pb2.DESCRIPTOR
    assert ours.package == published.package == "inference"
    assert len(ours.message_types_by_name) > 25
    for name, message in ours.message_types_by_name.items():
        check_same(message, published.message_types_by_name[name])
    methods = {
        method.name: method for method in published.services_by_name["GRPCInferenceService"].methods
    }  # fmt: skip
    for method in ours.services_by_name["GRPCInferenceService"].methods:
        theirs = methods[method.name]
        assert method.input_type.full_name == theirs.input_type.full_name
        assert method.output_type.full_name == theirs.output_type.full_name
        assert (method.client_streaming, method.server_streaming) == (theirs.client_streaming, theirs.server_streaming)


def test_the_check_notices_another_number() -> None:
    """Negative control."""
    published = triton_grpc.service_pb2.DESCRIPTOR.message_types_by_name
    ours = inference_pb2.DESCRIPTOR.message_types_by_name
    with pytest.raises(AssertionError):  # `parameters` is 4 in the one and 2 in the other
        check_same(ours["ModelInferRequest"].nested_types[1], published["ModelInferRequest"].nested_types[0])
    with pytest.raises((AssertionError, KeyError)):
        check_same(ours["ModelInferRequest"], published["ModelInferResponse"])


def test_health_and_reflection() -> None:
    with v2_server() as served, grpc.insecure_channel(served.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        status = health_pb2.HealthCheckResponse

        def check(service: str) -> Any:
            return health.Check(health_pb2.HealthCheckRequest(service=service)).status

        for service in ("", "inference.GRPCInferenceService", "simple"):
            assert check(service) == status.SERVING
        assert check("loadable") == status.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check("nobody")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert next(watch).status == status.SERVING
        served.front.host.draining = True
        assert next(watch).status == status.NOT_SERVING
        assert check("") == status.NOT_SERVING
        served.front.host.draining = False
        assert next(watch).status == status.SERVING
        watch.cancel()

        database = ProtoReflectionDescriptorDatabase(channel)
        names = {"inference.GRPCInferenceService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        assert set(database.get_services()) == names
        for name in names:
            assert database.FindFileContainingSymbol(name).name


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(CONTENTS)), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_typed_contents(datatype: str, count: int, seed: int) -> None:
    """Tensors in the field of their datatype, read and written, against protobuf's own lists; also with a field that
    nobody knows behind it."""
    random = np.random.default_rng(seed)
    if datatype == "BYTES":
        array = as_objects([random.bytes(int(length)) for length in random.integers(0, 5, count)], (count,))
    else:
        array = np.frombuffer(random.bytes(count * DTYPES[datatype].itemsize), DTYPES[datatype])
        array = random.integers(0, 2, count).astype(bool) if datatype == "BOOL" else np.nan_to_num(array)
    plain = pb.InferTensorContents()
    getattr(plain, CONTENTS[datatype]).extend(array.tolist())
    unknown = pb.InferTensorContents.FromString(plain.SerializeToString() + b"\xfa\x07\x03abc")  # field 127
    for message in (plain, unknown):
        assert np.array_equal(read_contents(message, datatype, (count,), "x"), array)
    running = SimpleNamespace(entry=SimpleNamespace(name="m", version="1"), request=InferRequest("m"))
    made = as_response(running, [Output("y", datatype, array, {})], raw=False)
    assert made.outputs[0].contents == plain
