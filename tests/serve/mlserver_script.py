"""What a client of MLServer does, run by a Python that has mlserver: REST_URL GRPC_ADDRESS.

Requests by its codecs, over REST and gRPC; answers and errors as its types, decoded by its codecs. Ends with an error
where one is not as it should be.
"""

import sys
import urllib.error
import urllib.request

import grpc
import numpy as np
from mlserver import types
from mlserver.codecs import NumpyCodec, NumpyRequestCodec, StringCodec
from mlserver.grpc import converters, dataplane_pb2_grpc

OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def call(url: str, body: types.InferenceRequest | None = None) -> bytes:
    data = None if body is None else body.model_dump_json(exclude_none=True).encode()
    with OPEN.open(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60) as answer:
        return answer.read()


def over_rest(url: str, model: str, request: types.InferenceRequest) -> types.InferenceResponse:
    return types.InferenceResponse.model_validate_json(call(f"{url}/v2/models/{model}/infer", request))


def over_grpc(
    stub: dataplane_pb2_grpc.GRPCInferenceServiceStub, model: str, request: types.InferenceRequest, *, raw: bool
) -> types.InferenceResponse:
    message = converters.ModelInferRequestConverter.from_types(request, model_name=model, use_raw=raw)
    return converters.ModelInferResponseConverter.to_types(stub.ModelInfer(message, timeout=60))


def main(url: str, address: str) -> None:
    random = np.random.default_rng()
    stub = dataplane_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(address))
    ways = [
        lambda model, request: over_rest(url, model, request),
        lambda model, request: over_grpc(stub, model, request, raw=False),
        lambda model, request: over_grpc(stub, model, request, raw=True),
    ]
    for infer in ways:
        for datatype, array in (
            ("FP32", random.standard_normal((2, 3)).astype(np.float32)),
            ("FP64", random.standard_normal((3, 1))), ("INT64", random.integers(-(2**62), 2**62, (1, 4))),
            ("BOOL", random.integers(0, 2, (2, 2)).astype(bool)),
        ):  # fmt: skip
            request = types.InferenceRequest(id="id-7", inputs=[NumpyCodec.encode_input("x", array)])
            answer = infer(f"echo_{datatype}", request)
            assert (answer.id, answer.model_name) == ("id-7", f"echo_{datatype}")
            got = NumpyCodec.decode_output(answer.outputs[0])
            assert got.dtype == array.dtype
            np.testing.assert_array_equal(got, array)
        texts = ["hello", "größer", ""]
        request = types.InferenceRequest(inputs=[StringCodec.encode_input("x", texts)])
        assert StringCodec.decode_output(infer("echo_BYTES", request).outputs[0]) == texts
    whole = NumpyRequestCodec.encode_request(np.ones((2, 3), np.float32))
    whole.inputs[0].name = "x"
    np.testing.assert_array_equal(
        NumpyRequestCodec.decode_response(over_rest(url, "echo_FP32", whole)), np.ones((2, 3))
    )

    server = types.MetadataServerResponse.model_validate_json(call(f"{url}/v2"))
    assert server.name == "soma"
    model = types.MetadataModelResponse.model_validate_json(call(f"{url}/v2/models/echo_FP32"))
    assert [(each.name, each.datatype) for each in model.inputs] == [("x", "FP32")]
    status, said = 200, b""
    try:
        over_rest(url, "nobody", whole)
    except urllib.error.HTTPError as error:
        status, said = error.code, error.read()
    assert status == 404
    assert "nobody" in types.InferenceErrorResponse.model_validate_json(said).error
    print("all as it should be")


main(*sys.argv[1:])
