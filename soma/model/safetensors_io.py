"""Safetensors files, read and written one tensor at a time straight from and into memory that is already there.

The safetensors library maps whole files, so a load holds the file's pages and the model; reading each tensor into its
place holds one copy, and a broken file can be described exactly. Format: 8 bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, the data (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soma.base.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # as in the reference implementation


class SafetensorsFile:
    """An open safetensors file. `tensors`: name → (dtype name, shape, first byte, byte after the last)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = open(path, "rb")  # noqa: SIM115  (closed by close)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            self.tensors = self._read_header()
        except BaseException:
            self.file.close()
            raise

    def _read_header(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        size = os.fstat(self.file.fileno()).st_size
        length = int.from_bytes(self.file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{self.path}: truncated or not a safetensors file ({size} bytes; the header is not whole)")
        if length > MAX_HEADER:
            raise UserError(f"{self.path}: not a safetensors file (header of {length} bytes)")
        try:
            header = json.loads(self.file.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path}: not a safetensors file (its header is not valid)") from None
        self.start = 8 + length
        for name, (dtype, shape, begin, end) in tensors.items():
            if dtype not in DTYPES:
                raise UserError(f"{self.path}: tensor {name!r} has dtype {dtype}, which is not supported")
            if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
                raise UserError(
                    f"{self.path}: tensor {name!r}: {end - begin} bytes do not fit shape {list(shape)} {dtype}"
                )
            if self.start + end > size:
                raise UserError(
                    f"{self.path}: truncated: tensor {name!r} ends at byte {self.start + end}, the file has {size}"
                )
        return tensors

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """A tensor, on the CPU; into `out` if given (contiguous, same shape and dtype)."""
        dtype, shape, begin, end = self.tensors[name]
        if out is None:
            out = torch.empty(shape, dtype=DTYPES[dtype])
        self.file.seek(self.start + begin)
        view = raw_bytes(out)
        done = 0
        while done < end - begin:
            count = self.file.readinto(view[done:])
            if not count:
                raise UserError(f"{self.path}: truncated while tensor {name!r} was read")
            done += count
        return out

    def mapped(self, name: str) -> Tensor:
        """The tensor in the file itself: only the parts that are looked at are read. Not to be written to."""
        dtype, shape, begin, end = self.tensors[name]
        if begin == end:
            return torch.empty(shape, dtype=DTYPES[dtype])
        data = np.memmap(self.path, np.uint8, "c", self.start + begin, (end - begin,))
        return torch.from_numpy(data).view(DTYPES[dtype]).view(shape)

    def close(self) -> None:
        self.file.close()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_safetensors(
    path: Path, specs: list[tuple[str, torch.dtype, tuple[int, ...]]], tensors: Iterable[Tensor]
) -> None:
    """Write tensors in the order of `specs` (name, dtype, shape), one at a time; the file appears when it is whole."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in specs:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for (name, dtype, shape), tensor in zip(specs, tensors, strict=True):
                assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
                file.write(raw_bytes(tensor.contiguous()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
