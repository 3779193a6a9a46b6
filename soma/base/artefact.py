"""Artefact folders: written to a temporary place, renamed when whole, named and compared by hash.

An artefact is a directory. `run.json` in it holds lineage (inputs, config, versions, times); it and everything under
`logs/` and `checkpoint/` lie outside the content hash, so two runs that did the same work have equal hashes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soma.base.errors import UserError

OUTSIDE_CONTENT = ("run.json", "logs", "checkpoint")
CHUNK = 1 << 20


def json_hash(value: Any) -> str:
    """sha256 hex of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 hex of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def content_files(directory: Path) -> Iterator[Path]:
    """Files of an artefact that count as content, sorted by their path relative to it."""
    found = []
    for root, folders, names in os.walk(directory):
        if Path(root) == directory:
            folders[:] = [name for name in folders if name not in OUTSIDE_CONTENT]
            names = [name for name in names if name not in OUTSIDE_CONTENT]
        found += [Path(root) / name for name in names]
    yield from sorted(found, key=lambda path: path.relative_to(directory).as_posix())


def content_hash(directory: Path) -> str:
    """sha256 over the relative names and bytes of an artefact's content files.

    What a file's writer cannot make the same twice must not be content: put it under `logs/` or `checkpoint/`.
    """
    digest = hashlib.sha256()
    for path in content_files(directory):
        digest.update(f"{path.relative_to(directory).as_posix()}\0{file_hash(path)}\n".encode())
    return digest.hexdigest()


def directory_bytes(directory: Path) -> int:
    """Bytes that a folder's files take, links not followed."""
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file() and not path.is_symlink())


def write_json(path: Path, value: Any) -> None:
    """Write JSON to `path` all at once: readers see the old file or the new one, never half of it."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file all at once (temporary file, fsync, rename)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read JSON, naming the file and line if it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def sync_tree(directory: Path) -> None:
    """fsync every file and folder below `directory`, so that a rename after it publishes only what is on disk."""
    for root, _, names in os.walk(directory):
        for name in [*names, "."]:
            path = os.path.join(root, name)
            if os.path.islink(path):
                continue
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def publish(temporary: Path, final: Path) -> None:
    """Make a whole temporary folder the artefact `final` in one rename; an older `final` is replaced."""
    sync_tree(temporary)
    if final.exists():
        old = final.with_name(f".{final.name}.old-{os.getpid()}")
        os.rename(final, old)
        os.rename(temporary, final)
        shutil.rmtree(old)
    else:
        final.parent.mkdir(parents=True, exist_ok=True)
        os.rename(temporary, final)


@contextmanager
def building(final: Path) -> Iterator[Path]:
    """Build a folder in a temporary place beside `final`; it becomes `final` only if the block ends well."""
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def hash_lines(lines: Iterable[str]) -> str:
    """sha256 hex over lines in the order given."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
