"""One large file in ranges of bytes that begin at line starts, so that several workers share it.

A range reads as the lines that it holds: rows keep their line numbers, plain text is cut where `readers` cuts the whole
file, and all ranges one after the other give what the file gives. Only what lies uncompressed on a local disk is
split: of a compressed stream or a table no byte but the first is a place to begin, and a far file would be read twice.
"""

import codecs
import io
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from soma.data import readers
from soma.data.sources import Item

# Kinds that are no lines, and Python, whose first lines name the encoding of all others.
WHOLE = {"parquet", "html", "warc", "wikipedia", "wikitext", "pdf", "python"}
CHUNK = 1 << 20  # bytes read at once while lines are counted


def split_item(item: Item, range_bytes: int) -> list[Item]:
    """The file in ranges of at least `range_bytes` bytes, each up to the end of a line; the file itself where it is
    smaller, of another kind, compressed, not on a local disk or cannot be read.

    Where a range begins depends on what stands before it alone: a file that grew at its end keeps its first ranges.
    """
    if item.path is None or item.compression or item.kind in WHOLE or item.size is None or item.size <= range_bytes:
        return [item]
    try:
        with item.open() as file:
            bounds = list(_bounds(file, range_bytes, _step(item, range_bytes))) if _has_lines(item, file) else []
    except OSError:
        return [item]  # whoever reads it says why
    if len(bounds) < 2:
        return [item]
    return [
        replace(item, open=partial(_open_range, item.path, start, end), size=end - start, first_line=line, ranged=True)
        for start, end, line in bounds
    ]


def _step(item: Item, range_bytes: int) -> int:
    """Bytes after which a line end is looked for: plain text is cut exactly where its reader cuts it."""
    return range_bytes if item.kind == "jsonl" else readers.PIECE_BYTES


def _has_lines(item: Item, file: IO[bytes]) -> bool:
    """Whether lines can be read one by one: not in one JSON array, nor in UTF-16. Leaves the file at its start."""
    first = file.readline(readers.LINE_BYTES)
    file.seek(0)
    if item.kind == "jsonl":
        return not readers.is_array(item, first)
    return not first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _bounds(file: IO[bytes], range_bytes: int, step: int) -> Iterator[tuple[int, int, int]]:
    """(first byte, end, number of the first line) of each range; every byte is read once."""
    start, line = 0, 1
    while True:
        end, lines, ended = start, 0, False
        while end - start < range_bytes or not ended:
            size, newlines, ended = _piece(file, step)
            end, lines = end + size, lines + newlines
            if not size:
                break
        if end > start:
            yield start, end, line
        if not size:
            return
        start, line = end, line + lines


def _piece(file: IO[bytes], step: int) -> tuple[int, int, bool]:
    """(bytes, newlines, whether it ends a line) of `step` bytes and what is left of their last line, if that is no
    more than `step` bytes."""
    size, newlines, last = 0, 0, b""
    while size < step and (data := file.read(min(CHUNK, step - size))):
        size, newlines, last = size + len(data), newlines + data.count(b"\n"), data
    if size == step and (data := file.readline(step)):
        size, newlines, last = size + len(data), newlines + data.endswith(b"\n"), data
    return size, newlines, last.endswith(b"\n")


def _open_range(path: Path, start: int, end: int) -> IO[bytes]:
    return io.BufferedReader(_Range(path, start, end), CHUNK)


class _Range(io.RawIOBase):
    """The bytes of a file from `start` to before `end`."""

    def __init__(self, path: Path, start: int, end: int) -> None:
        self.file, self.left = io.FileIO(path), end - start
        self.file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(min(len(buffer), self.left)) or b""
        self.left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()
