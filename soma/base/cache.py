"""The cache of remote files: content-addressed, verified, shared by processes.

SOMA_CACHE (~/.cache/soma)/
  blobs/<sha256>/<name>   file contents; a file's folder is its hash, its name keeps the suffix
  trees/<hash>/           models: hard links to the blobs of their files
  refs/<hash of URL>.json what a URL was when last seen: {"url" (without secrets), "validator", "size", "sha256", …}
  partial/<hash of URL>   unfinished downloads, resumed if the server still has the same content
"""

import fnmatch
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from soma.base import progress
from soma.base.artefact import building, directory_bytes, file_hash, hash_lines, read_json, write_json
from soma.base.errors import UserError
from soma.base.locks import lock
from soma.base.remote import Absent, Answer, Unreachable, is_http, list_store, reading
from soma.base.secrets import identity_url, redact_url, split_url
from soma.base.units import human_bytes

CACHE_VARIABLE = "SOMA_CACHE"
ATTEMPTS = 4  # a download that breaks off is resumed this often before the person is told
SHOW_FROM = 4 << 20  # bytes from which a download gets a progress bar
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def cache_root() -> Path:
    """The cache's folder: SOMA_CACHE, or ~/.cache/soma."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "soma")


def fetch_file(url: str) -> Path:
    """The local copy of a remote file.

    A server's ETag (or date) decides whether the copy still holds; without either the file is downloaded again. With
    `#sha256=` the copy with that hash is used without asking the server, and a download with another hash is refused.
    """
    plain, wanted = split_url(url)
    if wanted and (copy := _blob(wanted)):
        return copy
    try:
        return _refresh(plain, wanted)
    except Unreachable as error:
        copy = _known_copy(plain)
        if copy is None or (wanted and copy.parent.name != wanted):
            raise _cannot_reach(plain, error) from None
        _notice(plain, error)
        return copy


def fetch_model(url: str) -> Path:
    """A local folder with the files of a model that lies in a remote folder: config, tokenizer, safetensors."""
    plain, wanted = split_url(url)
    parts = urlsplit(plain)
    plain = urlunsplit(parts._replace(path=parts.path.rstrip("/")))
    if wanted:
        raise UserError(f"{redact_url(url)}: #sha256= is for single files; a model's folder has none")
    reference = _reference(_inside(plain, ""))
    with _locked(_inside(plain, "")):
        try:
            blobs = _model_blobs(plain)
        except Unreachable as error:
            record = _read(reference)
            tree = cache_root() / "trees" / record.get("tree", "none")
            if not record or not _whole(tree, record["files"]):
                raise _cannot_reach(plain, error) from None
            _notice(plain, error)
            return tree
        files = {name: path.parent.name for name, path in sorted(blobs.items())}
        tree = cache_root() / "trees" / hash_lines(f"{name} {sha256}" for name, sha256 in files.items())
        if not _whole(tree, files):
            with building(tree) as folder:
                for name, path in blobs.items():
                    os.link(path, folder / name)
        _write(reference, {"url": redact_url(plain), "tree": tree.name, "files": files})
        return tree


@dataclass(frozen=True)
class Cached:
    """One remote file or model that is here. `url` carries no secret; `fetched` is empty for models."""

    url: str
    bytes: int
    fetched: str
    path: Path


def list_cache() -> list[Cached]:
    """What the cache holds, by address; the files of a model count as that model. What is gone is left out."""
    root, found = cache_root(), []
    for owner, _, record in _references():
        blobs = record["files"].values() if "tree" in record else [_blob_name(record)]
        paths = [path for blob in blobs for path in (root / "blobs").glob(blob if "/" in blob else f"{blob}/*")]
        if paths and owner == record["url"]:
            place = root / "trees" / record["tree"] if "tree" in record else paths[0]
            size = sum(path.stat().st_size for path in paths)
            found.append(Cached(owner, size, record.get("fetched", ""), place))
    return sorted(found, key=lambda one: one.url)


def clear_cache(pattern: str = "*") -> int:
    """Forget the addresses that match a shell pattern, with what no other one refers to and (for `*`) unfinished
    downloads; the bytes that this freed."""
    root, kept = cache_root(), set[str]()
    for owner, reference, record in list(_references()):
        if fnmatch.fnmatch(owner, pattern):
            reference.unlink()
        else:
            kept |= set(record["files"].values()) | {record["tree"]} if "tree" in record else {_blob_name(record)}
    freed = 0
    for blob in (root / "blobs").glob("*/*"):
        if not kept & {blob.parent.name, f"{blob.parent.name}/{blob.name}"}:
            freed += blob.stat().st_size
            blob.unlink()
            with suppress(OSError):  # another name of the same content is still in there
                blob.parent.rmdir()
    for tree in (root / "trees").glob("*"):  # links to blobs
        if tree.name not in kept:
            shutil.rmtree(tree)
    if pattern == "*" and (root / "partial").is_dir():
        freed += directory_bytes(root / "partial")
        shutil.rmtree(root / "partial")
    return freed


def _blob_name(record: dict[str, Any]) -> str:
    return f"{record['sha256']}/{record['name']}"


def _references() -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Each reference as (address of the model that it belongs to, or its own; its file; its record)."""
    records = {path: read_json(path) for path in sorted((cache_root() / "refs").glob("*.json"))}
    models = [record["url"] for record in records.values() if "tree" in record]
    for path, record in records.items():
        owner = next((model for model in models if record["url"].startswith(f"{model}/")), record["url"])
        yield owner, path, record


def _model_blobs(url: str) -> dict[str, Path]:
    """The files of a remote model. HTTP cannot list, so there the names are the known ones and those of the index."""
    if not is_http(url):
        names = [name for name in list_store(url) if any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)]
        if "config.json" not in names:
            raise UserError(f"{redact_url(url)}: no config.json in this folder, so it is not a model")
        return {name: _refresh(_inside(url, name), None) for name in names}
    blobs = {"config.json": _refresh(_inside(url, "config.json"), None)}
    for name in [*(pattern for pattern in MODEL_FILES[1:] if "*" not in pattern), "model.safetensors"]:
        with suppress(Absent):
            blobs[name] = _refresh(_inside(url, name), None)
    if "model.safetensors" not in blobs:
        index = blobs["model.safetensors.index.json"] = _refresh(_inside(url, "model.safetensors.index.json"), None)
        for shard in sorted(set(read_json(index)["weight_map"].values())):
            if Path(shard).name != shard:
                raise UserError(f"{redact_url(url)}: the index names a file outside the model's folder")
            blobs[shard] = _refresh(_inside(url, shard), None)
    return blobs


def _inside(url: str, name: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path}/{name}"))


def _refresh(url: str, wanted: str | None) -> Path:
    """The copy that the server confirms, or a new download. Raises Unreachable, Absent, UserError."""
    with _locked(url):
        return _try(url, wanted)


def _try(url: str, wanted: str | None) -> Path:
    copy = _known_copy(url)
    if copy and wanted and copy.parent.name != wanted:
        copy = None
    known = _read(_reference(url)).get("validator") if copy else None
    error: Unreachable | None = None
    for attempt in range(ATTEMPTS):
        before = _part(url).stat().st_size if _part(url).exists() else 0
        try:
            return _download(url, wanted, copy, known)
        except Unreachable as broken:
            error = broken
            moved = (_part(url).stat().st_size if _part(url).exists() else 0) > before
            if not moved and not str(broken).startswith(("HTTP 5", "HTTP 429", "the server refused to resume")):
                break
            if attempt + 1 < ATTEMPTS:
                time.sleep(0.2 * 2**attempt)
    assert error is not None
    raise error


def _download(url: str, wanted: str | None, copy: Path | None, known: str | None) -> Path:
    part = _part(url)
    state = _read(part.with_name(part.name + ".json"))
    offset = part.stat().st_size if part.exists() and state.get("validator") else 0
    if not offset:
        part.unlink(missing_ok=True)
    try:
        with reading(url, known=known, offset=offset, partial=state.get("validator")) as answer:
            if answer.unchanged:
                assert copy is not None, "nothing was said to be known"
                return copy
            _write(part.with_name(part.name + ".json"), {"validator": answer.validator})
            _receive(url, answer, part)
    except Unreachable as error:
        if "refused to resume" in str(error):
            part.unlink(missing_ok=True)
        raise
    sha256, size = file_hash(part), part.stat().st_size
    if wanted and sha256 != wanted:
        part.unlink()
        raise UserError(f"{redact_url(url)}: its sha256 is {sha256}, not {wanted} as asked for; nothing was kept")
    blob = _blob_folder(sha256) / _file_name(url)
    blob.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, blob)
    part.with_name(part.name + ".json").unlink()
    record = {"url": redact_url(url), "validator": answer.validator, "size": size, "sha256": sha256, "name": blob.name}
    _write(_reference(url), record | {"fetched": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    return blob


def _receive(url: str, answer: Answer, part: Path) -> None:
    """Append the answer's chunks to the partial file, which is on disk when this returns, and whole."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as file:
        file.truncate(answer.offset)
        show = answer.size is not None and answer.size >= SHOW_FROM
        with progress.current().task(f"fetch {_file_name(url)}", answer.size, "B") if show else _silent() as task:
            task.skip(answer.offset)
            for chunk in answer.chunks:
                file.write(chunk)
                task.advance(len(chunk))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if answer.size is not None and size != answer.size:
        raise Unreachable(f"the transfer ended after {human_bytes(size)} of {human_bytes(answer.size)}")


@contextmanager
def _silent() -> Iterator[progress.Task]:
    yield progress.Task(progress.Reporter(), "", None, "")


def _known_copy(url: str) -> Path | None:
    """The whole, unharmed copy that this URL had when last seen."""
    record = _read(_reference(url))
    if not record:
        return None
    copy = _blob(record["sha256"], record["name"])
    if copy is None:
        progress.current().note(f"{redact_url(url)}: the cached copy is damaged or gone; it is fetched again")
    return copy


def _blob(sha256: str, name: str | None = None) -> Path | None:
    """The cached file with this content, its bytes checked; a damaged one is removed."""
    for path in sorted(_blob_folder(sha256).glob(name or "*")):
        if file_hash(path) == sha256:
            return path
        path.unlink()
    return None


def _whole(tree: Path, files: dict[str, str]) -> bool:
    return all((tree / name).is_file() and file_hash(tree / name) == sha256 for name, sha256 in files.items())


def _blob_folder(sha256: str) -> Path:
    return cache_root() / "blobs" / sha256


def _hash(url: str) -> str:
    return hashlib.sha256(identity_url(url).encode()).hexdigest()


def _reference(url: str) -> Path:
    return cache_root() / "refs" / f"{_hash(url)}.json"


def _part(url: str) -> Path:
    return cache_root() / "partial" / _hash(url)


@contextmanager
def _locked(url: str) -> Iterator[None]:
    with lock(cache_root() / "locks" / f"{_hash(url)}.lock"):
        yield


def _file_name(url: str) -> str:
    name = unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2]
    return name if name not in ("", ".", "..") else "file"


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


def _notice(url: str, error: Unreachable) -> None:
    progress.current().note(f"{redact_url(url)}: cannot be reached ({error}); using the cached copy")


def _cannot_reach(url: str, error: Unreachable) -> UserError:
    return UserError(
        f"{redact_url(url)}: cannot be reached ({error}) and there is no whole copy in the cache {cache_root()}. Check "
        "the network and the address and run this again (what has arrived is kept and resumed), or give a local path"
    )
