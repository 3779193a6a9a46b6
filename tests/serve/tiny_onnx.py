"""An ONNX file written by hand: y = relu(x) + x over rows of any number, so that the tests need no exporter."""

from pathlib import Path


def number(value: int) -> bytes:
    made = bytearray()
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def field(place: int, value: bytes | str | int) -> bytes:
    """A field of a protobuf message: a whole number, or bytes with their length."""
    if isinstance(value, int):
        return number(place << 3) + number(value)
    data = value.encode() if isinstance(value, str) else value
    return number(place << 3 | 2) + number(len(data)) + data


def tensor_info(name: str, kind: int, sizes: list[int | str]) -> bytes:
    """ValueInfoProto; a size that is a text may be any."""
    shape = b"".join(field(1, field(1, size) if isinstance(size, int) else field(2, size)) for size in sizes)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, shape)))


def node(kind: str, inputs: list[str], output: str) -> bytes:
    return b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)


def write_onnx(path: Path, width: int = 3) -> Path:
    """ModelProto of onnx.proto3, opset 13; element type 1 is float."""
    nodes = field(1, node("Relu", ["x"], "r")) + field(1, node("Add", ["r", "x"], "y"))
    ends = field(11, tensor_info("x", 1, ["rows", width])) + field(12, tensor_info("y", 1, ["rows", width]))
    path.write_bytes(field(1, 8) + field(8, field(1, "") + field(2, 13)) + field(7, nodes + field(2, "g") + ends))
    return path
