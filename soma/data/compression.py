"""Compressed files as they were before, with a limit on how much they may swell."""

import bz2
import gzip
import io
import lzma
from typing import IO, Any

BOMB_BYTES, BOMB_RATIO = 64 << 20, 400  # text is seldom packed to a tenth; gzip can pack zeros to a thousandth


def decompress(raw: IO[bytes], compression: str | None) -> IO[bytes]:
    """The file as it was before `gzip`, `zstd`, `bzip2`, `xz` or `lz4`. Reading raises BombError where it swells too
    much."""
    if compression is None:
        return raw
    counted: Any = _Counted(raw)
    file: Any
    if compression == "gzip":
        file = gzip.GzipFile(fileobj=counted)
    elif compression == "bzip2":
        file = bz2.BZ2File(counted)
    elif compression == "xz":
        file = lzma.LZMAFile(counted)  # noqa: SIM115  (what the caller closes is the file below)
    else:
        import pyarrow

        file = io.BufferedReader(pyarrow.CompressedInputStream(counted, compression), 1 << 20)
    return io.BufferedReader(_Guarded(file, counted), 1 << 20)


class BombError(ValueError):
    """A compressed file that swells beyond what text does."""


class _Counted:
    """A file that counts the bytes read from it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw, self.count, self.closed = raw, 0, False

    def read(self, size: int = -1) -> bytes:
        data = self.raw.read(size)
        self.count += len(data)
        return data

    def seekable(self) -> bool:
        return False

    def readable(self) -> bool:
        return True


class _Guarded(io.RawIOBase):
    """A decompressed file that is watched."""

    def __init__(self, file: Any, counted: _Counted) -> None:
        self.file, self.counted, self.total = file, counted, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read1(len(buffer))  # what is there: an error later on must not swallow it
        self.total += len(data)
        if self.total > BOMB_BYTES and self.total > BOMB_RATIO * self.counted.count:
            raise BombError(f"{self.counted.count:,} bytes swell to more than {BOMB_RATIO} times as many")
        buffer[: len(data)] = data
        return len(data)
