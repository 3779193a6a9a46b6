"""A full disk, whoever says so: Python, Arrow, libraries in Rust, SQLite."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
# What libraries say that keep the number of the error to themselves: those in Rust; SQLite.
WORDS = re.compile(r"No space left on device|Disk quota exceeded|database or disk is full")


def full(error: BaseException) -> BaseException | None:
    """The error among those behind `error` that says that the disk is full, if one does."""
    for one in chain(error):
        if (isinstance(one, OSError) and one.errno in FULL) or WORDS.search(str(one)):
            return one
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def claim(path: Path) -> None:
    """Take the whole size of a file from the disk, holes too. Raises OSError where it is full. Writing to a hole by way
    of a map would end the process there (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
