"""The Open Inference Protocol's bytes: what a client library would not send, the published example requests, and the
datatypes' conversions against numpy's."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
from http_tools import call
from hypothesis import given, settings
from hypothesis import strategies as st
from v2_tools import Served, v2_server

from soma.serve.errors import ApiError
from soma.serve.v2 import datatypes
from soma.serve.v2.datatypes import DTYPES

LENGTH = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with v2_server() as made:
        yield made


def post(served: Served, path: str, body: bytes | Any, **headers: str) -> tuple[int, dict[str, str], bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return call(
        f"http://{served.http}", "POST", path, data, {key.replace("_", "-"): each for key, each in headers.items()}
    )


def x_of(datatype: str, shape: list[int], data: Any, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": data}], **more}


def test_the_published_example_in_json(served: Served) -> None:
    """Nested and flat data are the same tensor; MLServer's `content_type` is taken and changes nothing."""
    nested = x_of("UINT32", [2, 2], [[1, 2], [3, 4]], id="42", parameters={"content_type": "np"})
    flat = x_of("UINT32", [2, 2], [1, 2, 3, 4], id="42")
    for body in (nested, flat):
        status, headers, data = post(served, "/v2/models/echo_UINT32/infer", body)
        assert status == 200
        assert headers["content-type"] == "application/json"
        assert json.loads(data) == {
            "model_name": "echo_UINT32", "model_version": "1", "id": "42",
            "outputs": [{"name": "y", "datatype": "UINT32", "shape": [2, 2], "data": [1, 2, 3, 4]}],
        }  # fmt: skip


def test_bytes_in_json(served: Served) -> None:
    body = x_of("BYTES", [1, 2], ["naïve", ""])
    assert json.loads(post(served, "/v2/models/echo_BYTES/infer", body)[2])["outputs"][0]["data"] == ["naïve", ""]


def binary_request(served: Served, head: Any, tail: bytes, path: str = "/v2/models/echo_BYTES/infer") -> Any:
    data = json.dumps(head).encode()
    return post(served, path, data + tail, **{LENGTH: str(len(data))})


def test_binary_output(served: Served) -> None:
    tail = b"\x03\x00\x00\x00abc\x00\x00\x00\x00"
    tensor = {"name": "x", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": len(tail)}}
    head = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    status, headers, data = binary_request(served, head, tail)
    assert status == 200
    assert headers["content-type"] == "application/octet-stream"
    length = int(headers[LENGTH.lower()])
    assert data[length:] == tail
    (output,) = json.loads(data[:length])["outputs"]
    assert output == {
        "name": "y", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": len(tail)}
    }  # fmt: skip
    status, _, data = binary_request(
        served, {**head, "parameters": {}, "inputs": [tensor]}, b"\x03\0\0\0\xff\xfe\xfd\0\0\0\0"
    )
    assert status == 400  # no UTF-8 in JSON
    assert "binary_data" in json.loads(data)["error"]


def test_raw_requests(served: Served) -> None:
    """A body that is a tensor and nothing else: of free sizes the last takes what there is."""
    values = np.arange(5, dtype="<f4")
    status, headers, data = post(served, "/v2/models/breaks/infer", values.tobytes(), **{LENGTH: "0"})
    assert status == 200
    length = int(headers[LENGTH.lower()])
    assert np.array_equal(np.frombuffer(data[length:], "<f4"), values)
    assert json.loads(data[:length])["outputs"][0]["shape"] == [5]
    status, headers, data = post(served, "/v2/models/echo_BYTES/infer", b"whole body", **{LENGTH: "0"})
    assert data[int(headers[LENGTH.lower()]) :] == b"\x0a\0\0\0whole body"
    assert post(served, "/v2/models/breaks/infer", b"123", **{LENGTH: "0"})[0] == 400
    assert post(served, "/v2/models/simple/infer", values.tobytes(), **{LENGTH: "0"})[0] == 400  # two inputs


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON"), (b"[1]", "object"), (b"{", "JSON"), (b'{"inputs": ' + b"[" * 100_000, "JSON"),
        ({}, "inputs must be"), ({"inputs": [1]}, "inputs must be"), ({"inputs": [{}]}, "inputs must be"),
        ({"inputs": {"name": "x"}}, "inputs must be"),
        (x_of("FP32", [2], [1]), "1 elements"), (x_of("FP32", [-1], [1]), "shape"), (x_of("FP32", "1", [1]), "shape"),
        (x_of("FP32", [True], [1]), "shape"), (x_of("FP32", [1 << 70], [1]), "shape"),
        (x_of("FP32", [1 << 40, 1 << 40], []), "0 elements"), (x_of("FP33", [1], [1]), "datatype 'FP33'"),
        (x_of(7, [1], [1]), "datatype 7"), (x_of("FP32", [1], 1), "must be a list"),
        (x_of("FP32", [1], ["1"]), "does not fit"), (x_of("FP32", [1], [None]), "does not fit"),
        (x_of("FP32", [2], [[1], [1, 2]]), "no regular list"), (x_of("FP32", [1], [{}]), "does not fit"),
        (x_of("FP32", [1], [1], parameters=3), "parameters must be"), (x_of("FP32", [1], [1], id=3), "id must be"),
        (x_of("FP32", [1], [1], outputs=[{"name": "z"}]), "unexpected inference output 'z'"),
        (x_of("FP32", [1], [1], outputs=[{"name": "y", "parameters": {"classification": 0}}]), "number of classes"),
        (x_of("FP32", [1], [1], outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]), "shared memory"),
        (x_of("FP32", [1], [1], parameters={"timeout": "soon"}), "microseconds"),
        ({"inputs": x_of("FP32", [1], [1])["inputs"] * 2}, "twice"),
        ({"inputs": [{**x_of("FP32", [1], [1])["inputs"][0], "parameters": {"binary_data_size": 4}}]}, "0 bytes"),
    ],
)  # fmt: skip
def test_malformed(served: Served, body: Any, words: str) -> None:
    before = len(served.record.entered)
    status, headers, data = post(served, "/v2/models/breaks/infer", body)
    assert status == 400
    assert headers["content-type"] == "application/json"
    error = json.loads(data)
    assert list(error) == ["error"]
    assert words in error["error"]
    assert len(served.record.entered) == before


def test_malformed_binary(served: Served) -> None:
    def tensor(size: Any, **more: Any) -> dict[str, Any]:
        return {"name": "x", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": size}, **more}

    for head, tail, words in (
        ({"inputs": [tensor(9)]}, b"1234", "4 bytes are left"),
        ({"inputs": [tensor(-1)]}, b"1234", "binary_data_size"),
        ({"inputs": [tensor("4")]}, b"1234", "binary_data_size"),
        ({"inputs": [tensor(4)]}, b"\xff\xff\xff\xff", "0 are left"),
        ({"inputs": [tensor(3)]}, b"\0\0\0", "too few"),
        ({"inputs": [tensor(8)]}, b"\0" * 8, "2 elements"),
        ({"inputs": [tensor(4)]}, b"\0" * 9, "5 bytes are left behind"),
        ({"inputs": [tensor(4, data=["a"])]}, b"\0" * 4, "both"),
    ):
        status, _, data = binary_request(served, head, tail)
        assert status == 400, words
        assert words in json.loads(data)["error"]
    for length in ("9999", "-1", "x", "1.5"):
        status, _, data = post(served, "/v2/models/echo_BYTES/infer", b"{}", **{LENGTH: length})
        assert status == 400
        assert LENGTH in json.loads(data)["error"]


def test_packed_bodies(served: Served) -> None:
    path, body = "/v2/models/breaks/infer", json.dumps(x_of("FP32", [1], [1])).encode()
    assert post(served, path, gzip.compress(body), Content_Encoding="gzip")[0] == 200
    assert post(served, path, gzip.compress(body)[:-9], Content_Encoding="gzip")[0] == 400
    assert post(served, path, b"no gzip", Content_Encoding="gzip")[0] == 400
    assert post(served, path, body, Content_Encoding="br")[0] == 415
    bomb = gzip.compress(b" " * (served.front.max_body_bytes + 1))
    assert len(bomb) < 100_000
    assert post(served, path, bomb, Content_Encoding="gzip")[0] == 413


def test_not_finite_needs_binary(served: Served) -> None:
    value = np.array([np.nan], "<f4").tobytes()
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "parameters": {"binary_data_size": 4}}
    assert binary_request(served, {"inputs": [tensor]}, value, "/v2/models/echo_FP32/infer")[0] == 400
    head = {"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
    status, _, data = binary_request(served, head, value, "/v2/models/echo_FP32/infer")
    assert status == 200
    assert data.endswith(value)


def test_routes_and_methods(served: Served) -> None:
    url = f"http://{served.http}"
    for method, path, status in (
        ("GET", "/v2", 200), ("GET", "/v2/health/live", 200), ("GET", "/v2/health/ready", 200),
        ("GET", "/v2/models/simple", 200), ("GET", "/v2/models/simple/versions/3", 200),
        ("GET", "/v2/models/simple/versions/9", 404), ("GET", "/v2/models/nobody", 404),
        ("GET", "/v2/models/simple/ready", 200), ("GET", "/v2/models/loadable/ready", 503),
        ("GET", "/v2/models/simple/stats", 200), ("GET", "/v2/models/stats", 200),
        ("POST", "/v2/repository/index", 200), ("GET", "/v2/models/simple/infer", 405), ("GET", "/v2/nothing", 404),
    ):  # fmt: skip
        got, _, data = call(url, method, path)
        assert got == status, path
        if status >= 400 and data:
            assert list(json.loads(data)) == ["error"]
    index = json.loads(call(url, "POST", "/v2/repository/index", b'{"ready": true}')[2])
    assert all(each["state"] == "READY" for each in index)
    assert "loadable" not in {each["name"] for each in index}


NUMERIC = [name for name in DTYPES if name not in ("BYTES", "BF16")]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(NUMERIC), st.lists(st.integers(0, 3), max_size=3), st.randoms(use_true_random=False))
def test_json_and_raw_carry_the_same(datatype: str, shape: list[int], random: Any) -> None:
    """Through JSON text and through bytes a tensor stays what it is, for values of the whole range."""
    dtype = DTYPES[datatype]
    count = int(np.prod(shape))
    raw = bytes(random.getrandbits(8) for _ in range(count * dtype.itemsize))
    array = (
        np.frombuffer(raw, dtype).reshape(shape)
        if datatype != "BOOL"
        else np.frombuffer(raw, "u1").reshape(shape) % 2 == 1
    )
    array = np.nan_to_num(array) if dtype.kind == "f" else array
    size = tuple(shape)
    assert np.array_equal(datatypes.from_raw(datatypes.to_raw(array, datatype), datatype, size, "x"), array)
    text = orjson.dumps(datatypes.to_json(array, datatype, "x"), option=orjson.OPT_SERIALIZE_NUMPY)
    for data in (orjson.loads(text), json.loads(json.dumps(array.tolist() if shape else [array.item()]))):
        back = datatypes.from_json(data, datatype, size, "x")
        assert back.dtype == dtype
        assert np.array_equal(back, array)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([name for name in NUMERIC if "INT" in name]), st.integers(-(1 << 70), 1 << 70))
def test_whole_numbers_fit_or_are_refused(datatype: str, value: int) -> None:
    limits = np.iinfo(DTYPES[datatype])
    if limits.min <= value <= limits.max:
        assert int(datatypes.from_json([value], datatype, (1,), "x")[0]) == value
    else:
        with pytest.raises(ApiError):
            datatypes.from_json([value], datatype, (1,), "x")
    with pytest.raises(ApiError):
        datatypes.from_json([value + 0.5], datatype, (1,), "x")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=6))
def test_bytes_as_raw(elements: list[bytes]) -> None:
    array = datatypes.as_objects(elements, (len(elements),))
    raw = datatypes.to_raw(array, "BYTES")
    assert datatypes.split_bytes(raw, len(elements), "x") == elements


def test_bf16_against_ml_dtypes() -> None:
    """Rounded to the nearest even, as ml_dtypes does, infinities and NaN included."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = np.random.default_rng().integers(0, 1 << 32, 200_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.float32([np.inf, -np.inf, 3.4e38, 0, -0.0])])
    ours = datatypes.to_bf16(values)
    with np.errstate(invalid="ignore"):
        theirs = values.astype(ml_dtypes.bfloat16)
    finite = ~np.isnan(values)
    assert np.array_equal(ours[finite], theirs.view("<u2")[finite])
    assert np.isnan(ours[~finite].view(ml_dtypes.bfloat16)).all()
    back = datatypes.from_raw(theirs[finite].tobytes(), "BF16", (int(finite.sum()),), "x")
    assert np.array_equal(back, theirs[finite].astype(np.float32))
