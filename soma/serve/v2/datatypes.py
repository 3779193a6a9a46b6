"""Tensors of the Open Inference Protocol: its datatypes as numpy's, and tensors as JSON and as raw bytes.

Inside, a tensor is a numpy array. BYTES is an array of `bytes` objects; BF16, which numpy does not have, is float32
whose low 16 bits are lost on the way out. Raw bytes are little-endian and row-major; each element of a BYTES tensor is
preceded by its length in 4 bytes. Source: "Binary tensor data extension" and "Required API" of the protocol.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from soma.serve.errors import ApiError

Tensors = dict[str, np.ndarray]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "UINT8": np.dtype("u1"), "UINT16": np.dtype("<u2"), "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"), "INT8": np.dtype("i1"), "INT16": np.dtype("<i2"), "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"), "FP16": np.dtype("<f2"), "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<f4"), "BYTES": np.dtype("O"),
}  # fmt: skip
SIZES = {name: 2 if name == "BF16" else dtype.itemsize for name, dtype in DTYPES.items() if name != "BYTES"}
LENGTH = struct.Struct("<I")


def known(datatype: Any, where: str) -> str:
    """The datatype, if it is one. Raises ApiError."""
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise ApiError(400, f"{where}: datatype {datatype!r}; known are {', '.join(DTYPES)}")
    return datatype


def known_shape(shape: Any, where: str) -> tuple[int, ...]:
    """The shape, if it is a list of sizes. Raises ApiError."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 63 for size in shape
    ) or len(shape) > 32:  # fmt: skip
        raise ApiError(400, f"{where}: the shape must be a list of at most 32 whole numbers, none below 0")
    return tuple(shape)


def from_raw(data: bytes | memoryview, datatype: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """The tensor in raw bytes; a read-only view of them where that is possible. Raises ApiError."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return as_objects(split_bytes(data, count, where), shape)
    if len(data) != count * SIZES[datatype]:
        raise ApiError(400, f"{where}: {len(data)} bytes for {datatype} of shape {list(shape)}, which takes "
                       f"{count * SIZES[datatype]}")  # fmt: skip
    if datatype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    if datatype == "BOOL":  # any byte but 0 is true; numpy would keep what is no bool
        return (np.frombuffer(data, "u1") != 0).reshape(shape)
    return np.frombuffer(data, DTYPES[datatype]).reshape(shape)


def split_bytes(data: bytes | memoryview, count: int, where: str) -> list[bytes]:
    """The elements of a raw BYTES tensor. Raises ApiError unless there are exactly `count`."""
    made: list[bytes] = []
    place, end = 0, len(data)
    whole = bytes(data)
    while place < end:
        if end - place < 4:
            raise ApiError(400, f"{where}: {end - place} bytes are left, too few for the length of an element")
        (length,) = LENGTH.unpack_from(whole, place)
        place += 4
        if length > end - place:
            raise ApiError(400, f"{where}: element {len(made)} should have {length} bytes, {end - place} are left")
        made.append(whole[place : place + length])
        place += length
    if len(made) != count:
        raise ApiError(400, f"{where}: {len(made)} elements, its shape has {count}")
    return made


def as_objects(elements: Sequence[bytes], shape: tuple[int, ...]) -> np.ndarray:
    """A BYTES tensor of these elements."""
    made = np.empty(len(elements), object)
    made[:] = elements
    return made.reshape(shape)


def to_raw(array: np.ndarray, datatype: str) -> bytes:
    """A tensor as raw bytes."""
    if datatype == "BYTES":
        return b"".join(LENGTH.pack(len(element)) + element for element in array.ravel())
    if datatype == "BF16":
        return to_bf16(array).tobytes()
    return np.ascontiguousarray(array, DTYPES[datatype]).tobytes()


def to_bf16(array: np.ndarray) -> np.ndarray:
    """The upper halves of float32 as uint16, rounded to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(array, "<f4").view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(bits.view("<f4")), (bits >> 16) | 0x40, rounded).astype("<u2")


def from_json(data: Any, datatype: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """The tensor in a JSON list, flat or nested, row-major. Raises ApiError for what does not fit datatype or shape."""
    count = math.prod(shape)
    if not isinstance(data, list):
        raise ApiError(400, f"{where}: data must be a list")
    if datatype == "BYTES":
        try:
            elements = [element.encode() for element in flat(data)]
        except (AttributeError, RecursionError):
            raise ApiError(400, f"{where}: data of a BYTES tensor must be strings") from None
        if len(elements) != count:
            raise ApiError(400, f"{where}: {len(elements)} elements, its shape has {count}")
        return as_objects(elements, shape)
    try:
        given = np.array(data)
    except (ValueError, OverflowError, RecursionError):
        raise ApiError(400, f"{where}: data is no regular list of numbers") from None
    if datatype == "UINT64" and given.dtype.kind in "fO":  # numpy's common type of 1 and 2^63 is a float
        given = exact_uint64(data, given)
    if given.size != count:
        raise ApiError(400, f"{where}: {given.size} elements, its shape has {count}")
    return fitted(given, datatype, where).reshape(shape)


def exact_uint64(data: list[Any], given: np.ndarray) -> np.ndarray:
    """Nested lists of whole numbers as uint64 where they all fit, else what was given."""
    elements = flat(data)
    if all(type(each) is int and 0 <= each < 1 << 64 for each in elements):
        return np.array(elements, np.uint64)
    return given


def fitted(given: np.ndarray, datatype: str, where: str) -> np.ndarray:
    """Numbers as the datatype. Raises ApiError where that would change them (floats too large become infinite)."""
    dtype = DTYPES[datatype]
    if given.size == 0 or given.dtype == dtype:
        return given.astype(dtype)
    allowed = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[dtype.kind]
    if given.dtype.kind not in allowed:
        raise ApiError(400, f"{where}: data does not fit {datatype}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(given.min()) < limits.min or int(given.max()) > limits.max:
            raise ApiError(400, f"{where}: {datatype} holds {limits.min} to {limits.max}; data goes beyond that")
    with np.errstate(over="ignore"):
        return given.astype(dtype)


def flat(data: list[Any]) -> list[Any]:
    """The elements of nested lists, in their order."""
    if not any(isinstance(each, list) for each in data):
        return data
    return [element for each in data for element in (flat(each) if isinstance(each, list) else [each])]


def to_json(array: np.ndarray, datatype: str, where: str) -> list[Any] | np.ndarray:
    """A tensor as what `orjson` writes as a flat JSON list. Raises ApiError for what JSON cannot carry."""
    if datatype == "BYTES":
        try:
            return [element.decode() for element in array.ravel()]
        except UnicodeDecodeError:
            raise ApiError(
                400, f"{where} holds bytes that are no UTF-8, which is no JSON: ask for binary_data"
            ) from None
    if datatype == "BF16":
        array = (to_bf16(array).astype("<u4") << 16).view("<f4")
    if array.dtype.kind == "f" and not bool(np.isfinite(array).all()):
        raise ApiError(400, f"{where} holds infinity or NaN, which JSON cannot carry: ask for binary_data")
    return np.ascontiguousarray(array).ravel()


def classes(array: np.ndarray, count: int, labels: Sequence[str] = ()) -> np.ndarray:
    """The `count` largest values of the last axis as `value:index` or `value:index:label` (classification
    extension)."""
    count = min(count, array.shape[-1])
    order = np.argsort(-array, axis=-1, kind="stable")[..., :count]
    values = np.take_along_axis(array, order, -1)
    texts = [
        f"{value:f}:{place}" + (f":{labels[place]}" if place < len(labels) else "")
        for value, place in zip(values.ravel().tolist(), order.ravel().tolist(), strict=True)
    ]
    return as_objects([text.encode() for text in texts], order.shape)
