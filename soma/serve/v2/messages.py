"""gRPC messages to requests, and answers to gRPC messages."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from soma.serve.errors import ApiError
from soma.serve.v2 import datatypes, inference_pb2
from soma.serve.v2.front import InferRequest, Output, Running

pb: Any = inference_pb2  # its classes are made when it is imported: no checker sees them
# Where InferTensorContents carries a datatype; FP16 and BF16 travel raw alone.
CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
CARRIED = {"bool_contents": "?", "int_contents": "<i4", "int64_contents": "<i8", "uint_contents": "<u4",
           "uint64_contents": "<u8", "fp32_contents": "<f4", "fp64_contents": "<f8"}  # fmt: skip


# Fields whose elements have a fixed size: their numbers in InferTensorContents and bytes of an element.
FIXED = {"bool_contents": (1, 1), "fp32_contents": (6, 4), "fp64_contents": (7, 8)}


def packed_head(field: str, count: int) -> bytes:
    """What stands before the elements of a packed repeated field: its tag, and its length as a varint."""
    number, size = FIXED[field]
    left, made = count * size, bytearray([number << 3 | 2])
    while left > 127:
        made.append(left & 127 | 128)
        left >>= 7
    return bytes([*made, left])


def parameters_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """A map of InferParameter or ModelRepositoryParameter as plain values; those without a value are left out."""
    found = {}
    for key, parameter in message.items():
        if (kind := parameter.WhichOneof("parameter_choice")) is not None:
            found[key] = getattr(parameter, kind)
    return found


def read_request(message: Any) -> InferRequest:
    """A ModelInferRequest with its tensors. Raises ApiError."""
    made = InferRequest(message.model_name, message.model_version, message.id, parameters_of(message.parameters))
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise ApiError(400, f"raw_input_contents has {len(raw)} entries for {len(message.inputs)} inputs")
    for place, tensor in enumerate(message.inputs):
        where = f"input '{tensor.name}'"
        if tensor.name in made.inputs:
            raise ApiError(400, f"{where} is there twice")
        refuse_shared_memory(tensor, where)
        kind = datatypes.known(tensor.datatype, where)
        shape = datatypes.known_shape(list(tensor.shape), where)
        if raw:
            if tensor.contents.ByteSize():  # MLServer sends them, empty
                raise ApiError(400, f"{where}: contents must be empty where raw_input_contents is used")
            array = datatypes.from_raw(raw[place], kind, shape, where)
        else:
            array = read_contents(tensor.contents, kind, shape, where)
        made.inputs[tensor.name], made.datatypes[tensor.name] = array, kind
    for output in message.outputs:
        refuse_shared_memory(output, f"output '{output.name}'")
        made.outputs[output.name] = parameters_of(output.parameters)
    return made


def refuse_shared_memory(tensor: Any, where: str) -> None:
    if "shared_memory_region" in tensor.parameters:
        raise ApiError(400, f"{where}: shared memory is not supported")


def read_contents(contents: Any, kind: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """A tensor in the field of its datatype. Raises ApiError."""
    if kind not in CONTENTS:
        raise ApiError(400, f"{where}: {kind} must be sent in raw_input_contents")
    field = CONTENTS[kind]
    if other := [name.name for name, _ in contents.ListFields() if name.name != field]:
        raise ApiError(400, f"{where}: {kind} belongs in {field}, found {', '.join(other)}")
    given = getattr(contents, field)
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if len(given) != count:
        raise ApiError(400, f"{where}: {len(given)} elements, its shape has {count}")
    if kind == "BYTES":
        return datatypes.as_objects(list(given), shape)
    if field in FIXED and count:  # its bytes lie in the message as one block: no loop over elements
        start = len(packed_head(field, count))
        block = contents.SerializeToString()[start : start + count * FIXED[field][1]]
        return datatypes.fitted(np.frombuffer(block, CARRIED[field]), kind, where).reshape(shape)
    return datatypes.fitted(np.fromiter(given, CARRIED[field], count), kind, where).reshape(shape)


def as_response(running: Running, outputs: Iterable[Output], *, raw: bool) -> Any:
    """A ModelInferResponse. raw: tensors as raw_output_contents, the way a request with raw tensors wants them; else in
    the field of their datatype where they all have one."""
    outputs = list(outputs)
    raw = raw or any(output.datatype not in CONTENTS for output in outputs)
    made = pb.ModelInferResponse(
        model_name=running.entry.name, model_version=running.entry.version, id=running.request.id
    )  # fmt: skip
    for output in outputs:
        tensor = made.outputs.add(name=output.name, datatype=output.datatype, shape=output.array.shape)
        if raw:
            made.raw_output_contents.append(datatypes.to_raw(output.array, output.datatype))
        elif (field := CONTENTS[output.datatype]) in FIXED and output.array.size:
            block = np.ascontiguousarray(output.array, CARRIED[field]).tobytes()
            tensor.contents.MergeFromString(packed_head(field, output.array.size) + block)
        else:
            getattr(tensor.contents, CONTENTS[output.datatype]).extend(output.array.ravel().tolist())
    return made
