"""The Open Inference Protocol as tritonclient speaks it: http, http.aio, grpc, grpc.aio."""

import asyncio
import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from http_tools import wait_for
from tritonclient.utils import InferenceServerException
from v2_tools import Served, v2_server

from soma.serve.v2.datatypes import DTYPES


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with v2_server() as made:
        yield made


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, served: Served) -> Iterator[Any]:
    module = triton_http if request.param == "http" else triton_grpc
    made = module.InferenceServerClient(served.http if request.param == "http" else served.grpc)
    yield made
    made.close()


def module_of(client: Any) -> Any:
    return triton_http if "http" in type(client).__module__ else triton_grpc


def tensor(module: Any, name: str, array: np.ndarray, datatype: str) -> Any:
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def sample(datatype: str) -> np.ndarray:
    """Random values of all of a datatype's range, fresh in every run."""
    random = np.random.default_rng()
    if datatype == "BYTES":
        lengths = random.integers(0, 9, 6)
        values = np.array([random.bytes(int(length)) for length in lengths] + [b""], object)[:6]
        return values.reshape(2, 3)
    if datatype == "BOOL":
        return random.integers(0, 2, (2, 3)).astype(bool)
    if datatype == "BF16":
        return random.integers(0, 0x7F80, (2, 3)).astype(np.uint16).view(pytest.importorskip("ml_dtypes").bfloat16)
    dtype = DTYPES[datatype]
    if dtype.kind == "f":
        return random.standard_normal((2, 3)).astype(dtype)
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, (2, 3), dtype=dtype, endpoint=True)


@pytest.mark.parametrize("datatype", list(DTYPES))
def test_every_datatype_comes_back(client: Any, datatype: str) -> None:
    module = module_of(client)
    array = sample(datatype)
    result = client.infer(f"echo_{datatype}", [tensor(module, "x", array, datatype)], request_id="id-7")
    got = result.as_numpy("y")
    assert got.shape == (2, 3)
    assert np.array_equal(got, array)
    response = result.get_response() if module is triton_http else result.get_response(as_json=True)
    assert response["id"] == "id-7"
    assert response["model_name"] == f"echo_{datatype}"


@pytest.mark.parametrize("binary", [False, True])
def test_rest_json_and_binary_mixed(served: Served, binary: bool) -> None:
    client = triton_http.InferenceServerClient(served.http)
    a, b = np.arange(32, dtype=np.int32).reshape(2, 16), np.ones((2, 16), np.int32)
    inputs = [triton_http.InferInput(name, [2, 16], "INT32") for name in ("INPUT0", "INPUT1")]
    inputs[0].set_data_from_numpy(a, binary_data=binary)
    inputs[1].set_data_from_numpy(b, binary_data=not binary)
    wanted = [triton_http.InferRequestedOutput("OUTPUT1", binary_data=binary),
              triton_http.InferRequestedOutput("OUTPUT0", binary_data=not binary)]  # fmt: skip
    result = client.infer("simple", inputs, outputs=wanted)
    assert np.array_equal(result.as_numpy("OUTPUT0"), a + b)
    assert np.array_equal(result.as_numpy("OUTPUT1"), a - b)
    assert [output["name"] for output in result.get_response()["outputs"]] == ["OUTPUT1", "OUTPUT0"]
    client.close()


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_rest_compression(served: Served, packing: str) -> None:
    client = triton_http.InferenceServerClient(served.http)
    array = np.zeros((50, 1000), np.float32)
    result = client.infer(
        "echo_FP32", [tensor(triton_http, "x", array, "FP32")], request_compression_algorithm=packing,
        response_compression_algorithm=packing,
    )  # fmt: skip
    assert np.array_equal(result.as_numpy("y"), array)
    client.close()


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_grpc_compression(packing: str) -> None:
    with v2_server(compression=packing) as served:
        client = triton_grpc.InferenceServerClient(served.grpc)
        array = np.zeros((50, 1000), np.float32)
        inputs = [tensor(triton_grpc, "x", array, "FP32")]
        result = client.infer("echo_FP32", inputs, compression_algorithm=packing)
        assert np.array_equal(result.as_numpy("y"), array)
        client.close()


def test_server_and_model_state(client: Any) -> None:
    module = module_of(client)
    as_json = {} if module is triton_http else {"as_json": True}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    assert client.is_model_ready("simple", "3")
    metadata = client.get_server_metadata(**as_json)
    assert metadata["name"] == "soma"
    assert "binary_tensor_data" in metadata["extensions"]
    model = client.get_model_metadata("simple", **as_json)
    assert model["versions"] == ["1", "3"]
    assert [int(size) for size in model["inputs"][0]["shape"]] == [-1, 16]
    assert [each["name"] for each in model["outputs"]] == ["OUTPUT0", "OUTPUT1"]
    assert {each["datatype"] for each in model["inputs"]} == {"INT32"}


def test_versions(client: Any) -> None:
    module = module_of(client)
    inputs = [tensor(module, name, np.ones((1, 16), np.int32), "INT32") for name in ("INPUT0", "INPUT1")]

    def version_of(asked: str) -> str:
        result = client.infer("simple", inputs, model_version=asked)
        response = result.get_response() if module is triton_http else result.get_response(as_json=True)
        return str(response["model_version"])

    assert version_of("") == "3"
    assert version_of("1") == "1"
    with pytest.raises(InferenceServerException, match="no version '2'"):
        version_of("2")


def test_errors(client: Any) -> None:
    module = module_of(client)
    good = np.zeros(3, np.float32)
    for model, inputs, words in (
        ("nobody", [tensor(module, "x", good, "FP32")], "unknown model"),
        ("breaks", [tensor(module, "z", good, "FP32")], "unexpected inference input 'z'"),
        ("breaks", [tensor(module, "x", good.astype(np.float64), "FP64")], "FP64"),
        ("breaks", [tensor(module, "x", good.reshape(1, 3), "FP32")], "shape"),
        ("simple", [tensor(module, "INPUT0", np.zeros((1, 16), np.int32), "INT32")], "'INPUT1' is missing"),
        ("breaks", [tensor(module, "x", good - 1, "FP32")], "the server failed on this request"),
        ("liar", [tensor(module, "x", good, "FP32")], "the server failed on this request"),
    ):
        with pytest.raises(InferenceServerException) as caught:
            client.infer(model, inputs)
        assert words in str(caught.value), model
        assert "secret" not in str(caught.value)


def test_repository(client: Any) -> None:
    module = module_of(client)
    index = client.get_model_repository_index(**({} if module is triton_http else {"as_json": True}))
    models = {(each["name"], each["version"]): each for each in (index if module is triton_http else index["models"])}
    assert models["simple", "3"]["state"] == "READY"
    assert models["loadable", "1"]["state"] == "UNAVAILABLE"
    inputs = [tensor(module, "x", np.ones(2, np.float32), "FP32")]
    with pytest.raises(InferenceServerException, match="not available"):
        client.infer("loadable", inputs)
    client.load_model("loadable")
    assert client.is_model_ready("loadable")
    assert client.infer("loadable", inputs).as_numpy("y").tolist() == [1, 1]
    client.unload_model("loadable")
    assert not client.is_model_ready("loadable")
    with pytest.raises(InferenceServerException, match="as long as this service"):
        client.unload_model("simple")
    with pytest.raises(InferenceServerException, match="unknown model"):
        client.load_model("nobody")
    with pytest.raises(InferenceServerException, match="load parameters are not supported"):
        client.load_model("loadable", config="{}")


def test_statistics(client: Any) -> None:
    module = module_of(client)

    def numbers() -> tuple[int, int]:
        found = client.get_inference_statistics("breaks", **({} if module is triton_http else {"as_json": True}))
        (stats,) = found["model_stats"]
        inner = stats["inference_stats"]
        return int(inner["success"].get("count", 0)), int(inner["fail"].get("count", 0))

    before = numbers()
    client.infer("breaks", [tensor(module, "x", np.ones(1, np.float32), "FP32")])
    with pytest.raises(InferenceServerException):
        client.infer("breaks", [tensor(module, "x", -np.ones(1, np.float32), "FP32")])
    assert numbers() == (before[0] + 1, before[1] + 1)


def test_classification(client: Any) -> None:
    module = module_of(client)
    array = np.array([[0.1, 0.7, 0.2]], np.float32)
    wanted = [module.InferRequestedOutput("y", class_count=2)]
    got = client.infer("scores", [tensor(module, "x", array, "FP32")], outputs=wanted).as_numpy("y")
    assert [text.decode().split(":")[1:] for text in got.ravel()] == [["1", "dog"], ["2", "eel"]]


def test_aio_clients(served: Served) -> None:
    array = np.random.default_rng().standard_normal((4, 4)).astype(np.float32)

    async def run() -> None:
        for module, address in ((triton_http_aio, served.http), (triton_grpc_aio, served.grpc)):
            async with module.InferenceServerClient(address) as client:
                results = await asyncio.gather(*(
                    client.infer("echo_FP32", [tensor(module, "x", array * scale, "FP32")]) for scale in range(8)
                ))  # fmt: skip
                for scale, result in enumerate(results):
                    assert np.array_equal(result.as_numpy("y"), array * scale)

    asyncio.run(run())


class Collected:
    """Answers and errors of a stream, in order."""

    def __init__(self) -> None:
        self.queue: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def __call__(self, result: Any, error: Any) -> None:
        self.queue.put((result, error))

    def get(self) -> tuple[Any, Any]:
        return self.queue.get(timeout=60)


def test_stream(served: Served) -> None:
    """A decoupled model's answers, its empty final response, and an error that leaves the stream open."""
    client = triton_grpc.InferenceServerClient(served.grpc)
    collected = Collected()
    client.start_stream(collected)
    until = tensor(triton_grpc, "until", np.array([3], np.int32), "INT32")
    client.async_stream_infer("counter", [until], request_id="a", enable_empty_final_response=True)
    for expected in range(3):
        result, error = collected.get()
        assert error is None
        assert result.as_numpy("number").tolist() == [expected]
        assert not result.get_response().parameters["triton_final_response"].bool_param
    result, error = collected.get()
    assert error is None
    assert result.get_response().id == "a"
    assert result.get_response().parameters["triton_final_response"].bool_param
    assert not result.get_response().outputs
    client.async_stream_infer("nobody", [until], request_id="b")
    result, error = collected.get()
    assert "unknown model" in str(error)
    for place in range(20):  # answers of models that give one come in order, also where the first takes longer
        seconds = tensor(triton_grpc, "seconds", np.array([0.3 if place == 0 else 0], np.float32), "FP32")
        client.async_stream_infer("sleep", [seconds], request_id=str(place))
    results = [collected.get()[0].get_response() for _ in range(20)]
    assert [each.id for each in results] == [str(place) for place in range(20)]
    assert all(each.parameters["triton_final_response"].bool_param for each in results)
    client.stop_stream()
    client.close()


def test_strict_stream_ends_with_a_status(served: Served) -> None:
    client = triton_grpc.InferenceServerClient(served.grpc)
    collected = Collected()
    client.start_stream(collected, headers={"triton_grpc_error": "true"})
    until = tensor(triton_grpc, "until", np.array([3], np.int32), "INT32")
    client.async_stream_infer("nobody", [until])
    _, error = collected.get()
    assert "NOT_FOUND" in str(error.status())
    client.stop_stream()
    client.close()


def test_a_stream_that_is_left_stops_what_runs(served: Served) -> None:
    client = triton_grpc.InferenceServerClient(served.grpc)
    collected = Collected()
    client.start_stream(collected)
    before = len(served.counter.ended)
    until = tensor(triton_grpc, "until", np.array([1_000_000], np.int32), "INT32")
    client.async_stream_infer("counter", [until])
    assert collected.get()[1] is None
    client.stop_stream(cancel_requests=True)
    client.close()
    assert wait_for(lambda: served.counter.ended[before:] == ["abort"])
    assert wait_for(lambda: served.front.host.open == 0)


def test_a_deadline_stops_what_runs(served: Served) -> None:
    client = triton_grpc.InferenceServerClient(served.grpc)
    seconds = tensor(triton_grpc, "seconds", np.array([600], np.float32), "FP32")
    entered, left = len(served.record.entered), len(served.record.left)
    for limit in (0.2, 2.0, 20.0):  # a busy machine may take seconds until the server has the request
        with pytest.raises(InferenceServerException, match=r"(?i)deadline"):
            client.infer("sleep", [seconds], client_timeout=limit)
        if len(served.record.entered) > entered:
            break
    assert wait_for(lambda: len(served.record.left) == left + 1)
    assert served.record.left[-1].outcome in ("abort", "error")
    with pytest.raises(InferenceServerException, match="not done in time"):
        client.infer("sleep", [seconds], timeout=100_000)  # microseconds, Triton's parameter
    client.close()
    assert wait_for(lambda: served.front.host.open == 0)
