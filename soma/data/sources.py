"""From what the user names to a list of files: folders, globs, the standard library, object stores."""

import difflib
import glob
import hashlib
import io
import os
import platform
import stat
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from soma.base.artefact import hash_lines
from soma.base.errors import UserError
from soma.base.fetch import fetch
from soma.base.remote import StoreFile, Unreachable, open_store, store_errors
from soma.base.secrets import redact_url

# The kinds that are read as something else than plain text are jsonl, parquet, html, warc, wikipedia, wikitext and pdf;
# `python` honours coding cookies.
KINDS = {
    ".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown", ".rst": "rst", ".html": "html",
    ".htm": "html", ".xhtml": "html", ".py": "python", ".pyi": "python", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".json": "jsonl", ".parquet": "parquet", ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".hpp": "cpp",
    ".cu": "cuda", ".rs": "rust", ".go": "go", ".java": "java", ".js": "javascript", ".ts": "typescript",
    ".rb": "ruby", ".sh": "shell", ".sql": "sql", ".tex": "tex", ".org": "org", ".adoc": "asciidoc",
    ".warc": "warc", ".wet": "warc", ".xml": "wikipedia", ".raw": "wikitext", ".tokens": "wikitext", ".pdf": "pdf",
}  # fmt: skip
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz", ".lz4": "lz4"}
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
STDLIB = "stdlib:"
BUFFER = 1 << 20  # bytes read at once from an object store


@dataclass(frozen=True)
class Item:
    """One input file, or some lines of one. `name` is its path relative to the source's root, with slashes.

    `size`: bytes, where known; `path`: the file, where it lies on a local disk; `first_line`, `ranged`: of a range of
    its lines (see `ranges.py`), which `open` then gives alone.
    """

    name: str
    kind: str | None
    compression: str | None
    open: Callable[[], IO[bytes]]
    size: int | None = None
    path: Path | None = None
    first_line: int = 1
    ranged: bool = False

    def content_hash(self) -> str:
        """sha256 hex of the file's bytes, or why it cannot be read."""
        digest = hashlib.sha256()
        try:
            with self.open() as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            return f"unreadable: {type(error).__name__}"
        return digest.hexdigest()


@dataclass(frozen=True)
class Skipped:
    """What a source holds and we do not read: `reason` one word, `detail` a sentence."""

    name: str
    reason: str
    detail: str


def kind_of(name: str) -> tuple[str | None, str | None]:
    """File kind and compression by the name's suffixes: `a.jsonl.gz` → ("jsonl", "gzip"); None where unknown."""
    path = PurePosixPath(name)
    compression = COMPRESSED.get(path.suffix.lower())
    if compression:
        path = PurePosixPath(path.stem)
    return KINDS.get(path.suffix.lower()), compression


def list_items(sources: list[str]) -> Iterator[Item | Skipped]:
    """All files of all sources, in an order that does not depend on the file system.

    Raises UserError for a source that does not exist, with the nearest name that does.
    """
    for source in sources:
        if source == STDLIB:
            yield from _folder(Path(sysconfig.get_path("stdlib")), skip=SKIPPED_FOLDERS | TEST_FOLDERS, only="python")
        elif "://" in source:
            yield from _remote(source)
        else:
            yield from _local(source)


def source_fingerprint(sources: list[str]) -> str:
    """Hash over (name, content hash) of every input file, and over the Python version where `stdlib:` is read."""
    lines = [f"python {platform.python_version()}"] if STDLIB in sources else []
    for item in list_items(sources):
        if isinstance(item, Item):
            lines.append(f"{item.name}\0{item.content_hash()}")
    return hash_lines(sorted(lines))


# --- Local files ---


def _local(source: str) -> Iterator[Item | Skipped]:
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _folder(path)
    elif path.is_file():
        yield _file_item(path, path.name)
    elif path.exists():
        raise UserError(f"{source}: not a file or folder that can be read")
    elif glob.has_magic(source):
        found = sorted(glob.glob(os.path.expanduser(source), recursive=True))
        if not found:
            raise UserError(f"{source}: no file matches this pattern (`**` matches folders of any depth)")
        root = _glob_root(source)
        for name in found:
            if os.path.isfile(name):
                yield _file_item(Path(name), os.path.relpath(name, root).replace(os.sep, "/"))
    else:
        raise UserError(f"{source}: no such file or folder{_nearest(path)}")


def _file_item(path: Path, name: str) -> Item:
    kind, compression = kind_of(name)
    # What is named one by one is read as text whatever its suffix; see `_folder` for what is found in folders.
    return Item(name, kind or "text", compression, _opener(path), path.stat().st_size, path)


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    return partial(_open_file, path)


def _open_file(path: Path) -> IO[bytes]:
    return open(path, "rb")


def _folder(root: Path, skip: set[str] = SKIPPED_FOLDERS, only: str | None = None) -> Iterator[Item | Skipped]:
    """Files below `root`. Hidden names and `skip` are passed over, links followed, each real folder entered once.

    Raises UserError where `root` itself may not be read; a folder below it is set aside.
    """
    seen: set[tuple[int, int]] = set()
    locked: list[OSError] = []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=locked.append):
        yield from _locked(root, locked)
        facts = os.stat(folder)
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        for name in sorted(names):
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            kind, compression = kind_of(name)
            if name.startswith(".") or (only and kind != only):
                continue
            if problem := _unfit(path, kind):
                yield Skipped(relative, *problem)
            else:
                yield Item(relative, kind, compression, _opener(path), path.stat().st_size, path)
    yield from _locked(root, locked)


def _locked(root: Path, errors: list[OSError]) -> Iterator[Skipped]:
    """What is known of folders that could not be read; empties the list."""
    for error in errors:
        folder, why = Path(error.filename), (error.strerror or "cannot be read").lower()
        if folder == root:
            raise UserError(f"{root}: this folder cannot be read ({why}); change its rights, or name another")
        yield Skipped(folder.relative_to(root).as_posix(), "unreadable", f"a folder: {why}")
    errors.clear()


def _unfit(path: Path, kind: str | None) -> tuple[str, str] | None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "unreadable", f"{error.strerror}"
    if not stat.S_ISREG(mode):
        return "unreadable", "not a regular file"
    if kind is None:
        return (
            "unknown_kind",
            f"files ending in {path.suffix or 'nothing'} are not read from folders; name the file to read it as text",
        )
    return None


def _glob_root(pattern: str) -> Path:
    """The folder part before the first wildcard."""
    fixed = []
    for part in Path(pattern).expanduser().parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed) if fixed else Path(".")


def _nearest(path: Path) -> str:
    """` (nearest: …)` with the closest existing name beside the missing part of `path`."""
    missing = path
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    try:
        names = sorted(os.listdir(missing.parent))
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {missing.parent / close[0]}?"
    return f"; {missing.parent} holds {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else ""


# --- Object stores and the web ---


def _remote(source: str) -> Iterator[Item | Skipped]:
    """A single address goes through the verified cache; patterns and folders are listed with fsspec."""
    scheme = source.split("://", 1)[0]
    if scheme in ("http", "https") and not glob.has_magic(source):
        path = fetch(source, kind="file")
        yield _file_item(path, PurePosixPath(source.split("?", 1)[0]).name)
        return
    names, base, system = _listed(source)
    if not names:
        raise UserError(f"{redact_url(source)}: nothing there")
    for name in names:
        relative = name[len(base) :].lstrip("/")
        kind, compression = kind_of(relative)
        if kind is None and len(names) > 1:
            yield Skipped(
                relative,
                "unknown_kind",
                "files of this kind are not read from folders; name the file to read it as text",
            )
        else:
            if scheme == "file":
                yield _file_item(Path(name), relative)
            else:
                yield Item(relative, kind or "text", compression, partial(_open_stored, system, name, source))


def _open_stored(system: Any, name: str, source: str) -> IO[bytes]:
    return io.BufferedReader(StoreFile(system, name, source), BUFFER)


def _listed(source: str) -> tuple[list[str], str, Any]:
    """Names of the files that an address of an object store stands for, the folder part of them, the file system."""
    try:
        with store_errors(source):
            system, root = open_store(source)
            if glob.has_magic(source):
                names, base = sorted(system.glob(root)), root.split("*", 1)[0].rsplit("/", 1)[0]
            elif system.isdir(root):
                names, base = sorted(system.find(root)), root.rstrip("/")
            elif system.exists(root):
                names, base = [root], root.rsplit("/", 1)[0]
            else:
                names, base = [], root
            return [name for name in names if system.isfile(name)], base, system
    except Unreachable as error:
        raise UserError(
            f"{redact_url(source)}: cannot be listed ({error}). Check the network and the address, or give a local path"
        ) from None
