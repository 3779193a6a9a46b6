"""Arrays in files: there whole or not at all, and mapped rather than read."""

import os
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


def save_array(path: Path, array: np.ndarray) -> None:
    """`array` as a .npy file, written under another name first, so that a killed run leaves no half of it.

    It is not forced onto the disk: it is work on the way, and hundreds of them would wait for the disk one by one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            # Not the file itself: numpy would write by way of C's and lose the error of the last block, so that on a
            # full disk a shortened array looks whole (numpy 2.4: 1,048,696 bytes asked for, 1,048,576 there, no error).
            np.save(SimpleNamespace(write=file.write), array, allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def map_array(path: Path) -> Any:
    """A .npy file as a read-only memory map; one without elements is read, for it cannot be mapped."""
    array = np.load(path, mmap_mode=None if path.stat().st_size <= 4096 else "r", allow_pickle=False)
    return array


def array_hash(array: np.ndarray) -> str:
    """sha256 hex of an array's values."""
    return sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
