"""What general compressors make of the held-out text: the bars that a language model has to get under.

The documents are concatenated in order and compressed as one stream, so the compressor has everything before a byte
as its context, across documents. That is the strictest comparison: the model starts each document from nothing.
"""

import lzma
import zlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from soma.base import progress


class Compressor(Protocol):
    """What zlib and lzma compressor objects share."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def gzip_compressor() -> Compressor:
    """The bytes of `gzip -9` (without a file name in the header)."""
    return zlib.compressobj(level=9, wbits=31)


def xz_compressor() -> Compressor:
    """The bytes of `xz -9` (preset 9, CRC64)."""
    return lzma.LZMACompressor(format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9)


COMPRESSORS = {"gzip": gzip_compressor, "xz": xz_compressor}


def compressed_size(name: str, texts: Iterable[str]) -> int:
    """Bytes that compressor `name` makes of the UTF-8 of all texts, one after the other."""
    compressor = COMPRESSORS[name]()
    return sum(len(compressor.compress(text.encode("utf-8"))) for text in texts) + len(compressor.flush())


def baselines(names: Sequence[str], texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """`{"xz": {"bytes": compressed, "bits_per_byte": 8 * compressed / original}}` for each compressor.

    Worked number: 1,000 bytes that compress to 250 are 2 bits per byte.
    """
    original = sum(len(text.encode("utf-8")) for text in texts)
    found = {}
    for name in names:
        with progress.current().task(f"{name} -9 on the same bytes", original, "bytes") as task:
            size = compressed_size(name, texts)
            task.advance(original)
        found[name] = {"bytes": size, "bits_per_byte": 8 * size / original if original else 0.0}
    return found
