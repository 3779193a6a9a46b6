"""Token shards that lie in an object store or behind HTTP, brought here while they are trained on.

`StreamedStore` is a `TokenStore` over a URL. index.json and the offsets are read at the start (8 bytes a document); a
shard's ids and mask come when they are first asked for, or before, by a prefetch thread that is told which documents
are next. A file is whole and has the sha256 of index.json before it is read, however often the network broke off.

Files lie in a folder by their sha256, shared by the ranks of a machine, and together stay under a ceiling: the least
recently used go first. A removed file that is still mapped lives on until it is unmapped, which is why a process maps
at most `MAPPED` of them.
"""

import hashlib
import json
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from soma.base.cache import cache_root
from soma.base.errors import UserError
from soma.base.locks import Busy, lock
from soma.base.remote import Unreachable, reading
from soma.base.secrets import redact_url
from soma.base.units import human_bytes
from soma.data.config import StreamConfig
from soma.data.store import TokenStore, checked_index, checked_offsets, map_file, part

ATTEMPTS = 6
FIRST_WAIT = 0.1  # seconds before the second attempt; each further wait is twice as long
MAPPED = 6
POLL = 0.05  # seconds between looks at a file that another process is fetching


class NoRoomError(Exception):
    """The ceiling leaves no room without removing what is wanted sooner."""


class ShardCache:
    """Files by their sha256 in a folder, together at most `ceiling` bytes."""

    def __init__(self, folder: Path, ceiling: int) -> None:
        self.folder, self.ceiling = folder, ceiling
        self.fetched = 0  # bytes that this process downloaded
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha: str) -> Path:
        return self.folder / sha

    def get(self, url: str, sha: str, size: int, keep: frozenset[str] | None = None) -> Path:
        """The local file of a URL, downloaded if it is not here.

        keep: files that must not be removed for it; `NoRoomError` where that leaves no room. None: whatever was used
        least recently goes. Raises UserError where the file cannot be had, is not the one that index.json names, or is
        larger than the ceiling.
        """
        path = self.path(sha)
        while not self._used(path):
            try:
                with lock(self.folder / "locks" / sha, wait=False):
                    if not path.exists():
                        self._room(sha, size, keep, url)
                        self._download(url, path, sha, size)
            except Busy:
                time.sleep(POLL)
            except NoRoomError:  # what cannot be removed is still coming in; it can be when it is whole
                if keep is not None:
                    raise
                time.sleep(POLL)
        return path

    @staticmethod
    def _used(path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _room(self, sha: str, size: int, keep: frozenset[str] | None, url: str) -> None:
        """Reserve the space of a file, removing others for it."""
        if size > self.ceiling:
            raise UserError(
                f"{redact_url(url)}: has {human_bytes(size)}, the cache holds {human_bytes(self.ceiling)}: raise "
                "stream.cache_gb, or make smaller shards"
            )
        with lock(self.folder / "locks" / "room"):
            there = []
            for entry in os.scandir(self.folder):
                if entry.is_file():
                    with suppress(FileNotFoundError):
                        there.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
            total = sum(one for _, one, _ in there)
            for _, one, path in sorted(there):
                if total + size <= self.ceiling:
                    break
                if path.suffix == ".part":
                    gone = path.stem == sha or self._abandoned(path)
                else:
                    gone = keep is None or path.name not in keep
                if gone:
                    path.unlink(missing_ok=True)
                    total -= one
            if total + size > self.ceiling:
                raise NoRoomError(f"{human_bytes(self.ceiling)} are taken")
            with open(self.path(sha).with_suffix(".part"), "wb") as file:
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)

    def _abandoned(self, path: Path) -> bool:
        """Whether who began this download is gone."""
        try:
            with lock(self.folder / "locks" / path.stem, wait=False):
                return True
        except Busy:
            return False

    def _download(self, url: str, path: Path, sha: str, size: int) -> None:
        partial = path.with_suffix(".part")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._write(url, partial, size)
                found = hashlib.sha256(partial.read_bytes()).hexdigest() if size < 1 << 20 else _sha256(partial)
                if partial.stat().st_size == size and found == sha:
                    partial.rename(path)
                    return
                problem = f"its sha256 is not the one in index.json ({sha[:12]}…): it is damaged there or on the way"
            except Unreachable as error:
                problem = str(error)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            if attempt < ATTEMPTS:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        partial.unlink(missing_ok=True)
        raise UserError(f"{redact_url(url)}: could not be fetched in {ATTEMPTS} attempts: {problem}")

    def _write(self, url: str, partial: Path, size: int) -> None:
        """Download into the reserved file; what breaks off goes on where it was if the content is still the same."""
        place, validator = 0, None
        for attempt in range(2):
            try:
                with reading(url, offset=place, partial=validator) as answer, open(partial, "r+b") as file:
                    file.seek(answer.offset)
                    place, validator = answer.offset, answer.validator
                    for chunk in answer.chunks:
                        if place + len(chunk) > size:
                            raise Unreachable(f"more than the {size} bytes that index.json names")
                        file.write(chunk)
                        place += len(chunk)
                        self.fetched += len(chunk)
                    if place < size:
                        raise Unreachable(f"ended after {place} of {size} bytes")
                    return
            except Unreachable:
                if attempt or validator is None or place in (0, size):
                    raise


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Prefetcher:
    """A thread that fetches what is wanted next, in that order, as far as the ceiling allows."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self.wanted: list[tuple[str, str, int]] = []
        self.changed = threading.Condition()
        self.stopped = False
        self.thread: threading.Thread | None = None

    def want(self, files: list[tuple[str, str, int]]) -> None:
        """Replace the list of (URL, sha256, bytes)."""
        with self.changed:
            self.wanted = files
            self.changed.notify()
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="soma-prefetch", daemon=True)
            self.thread.start()

    def stop(self) -> None:
        """End the thread; a download that is going on is finished first."""
        with self.changed:
            self.stopped = True
            self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                while not self.wanted and not self.stopped:
                    self.changed.wait()
                if self.stopped:
                    return
                files, self.wanted = self.wanted, []
            for place, (url, sha, size) in enumerate(files):
                if self.wanted or self.stopped:  # there is a newer list
                    break
                try:
                    self.cache.get(url, sha, size, keep=frozenset(one[1] for one in files[:place]))
                except (NoRoomError, UserError, OSError):
                    break  # who needs the file asks for it again, and gets the error


class StreamedStore(TokenStore):
    """A split of a tokens folder at a URL. `waited` counts the seconds in which `gather` stood still for the network.

    Raises UserError as `TokenStore` does, and where the store cannot be read.
    """

    def __init__(self, url: str, split: str, config: StreamConfig) -> None:
        self.url, self.ahead = url.rstrip("/"), config.ahead
        folder = Path(config.folder) if config.folder else cache_root() / "shards"
        self.cache = ShardCache(folder, int(config.cache_gb * 1e9))
        self.mapped: OrderedDict[str, np.ndarray] = OrderedDict()
        self.waited = 0.0
        self.asked: list[int] = []
        self.prefetcher = Prefetcher(self.cache)
        weakref.finalize(self, self.prefetcher.stop)
        self._read(remote_index(self.url), redact_url(self.url), split)

    def fits(self) -> bool:
        """Whether the whole split could lie here."""
        token_bytes = self.dtype.itemsize + int(self.masked)
        return self.tokens * token_bytes + 8 * (self.documents + len(self.shards)) <= self.cache.ceiling

    def _file(self, facts: dict[str, Any], role: str) -> tuple[str, np.dtype[Any], int, str]:
        name, dtype, count, sha = part(facts, role, self.dtype)
        return f"{self.url}/{name}", dtype, count, sha

    def _offsets(self, facts: dict[str, Any]) -> np.ndarray:
        url, dtype, count, sha = self._file(facts, "offsets")
        path = self.cache.get(url, sha, count * dtype.itemsize)
        return checked_offsets(facts, np.fromfile(path, dtype), f"{redact_url(self.url)}/")

    def arrays(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        """A shard's ids and, in masked data, its mask; waits for them if they are not here."""
        facts = self.shards[number].facts
        return self._map(facts, "ids"), self._map(facts, "mask") if self.masked else None

    def _map(self, facts: dict[str, Any], role: str) -> np.ndarray:
        url, dtype, count, sha = self._file(facts, role)
        if sha not in self.mapped:
            start = time.perf_counter()
            while sha not in self.mapped:
                path = self.cache.get(url, sha, count * dtype.itemsize)
                with suppress(UserError):  # another process made room with it in this very moment
                    self.mapped[sha] = map_file(path, dtype, count, None)
            self.waited += time.perf_counter() - start
            if len(self.mapped) > MAPPED:
                self.mapped.popitem(last=False)
        self.mapped.move_to_end(sha)
        return self.mapped[sha]

    def want(self, documents: Iterable[np.ndarray]) -> None:
        """Fetch the shards of the documents that come next, at most `ahead` beyond those of the first group."""
        shards = list(islice(self._shards_of(documents), self.ahead + 1))
        if shards == self.asked:
            return
        self.asked = shards
        roles = ("ids", "mask") if self.masked else ("ids",)
        files = []
        for number in shards:
            for role in roles:
                url, dtype, count, sha = self._file(self.shards[number].facts, role)
                files.append((url, sha, count * dtype.itemsize))
        self.prefetcher.want(files)

    def _shards_of(self, documents: Iterable[np.ndarray]) -> Iterator[int]:
        seen: set[int] = set()
        for group in islice(documents, self.ahead + 1):
            owner = np.searchsorted(self.first_tokens, self.starts[group], side="right") - 1
            for number in np.unique(owner).tolist():
                if number not in seen:
                    seen.add(number)
                    yield number


def remote_index(url: str) -> dict[str, Any]:
    """index.json of a tokens folder at a URL. UserError where it is absent, unreachable or of another version."""
    where = f"{url.rstrip('/')}/index.json"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with reading(where) as answer:
                content = b"".join(answer.chunks)
            return checked_index(json.loads(content), redact_url(where))
        except Unreachable as error:
            if attempt == ATTEMPTS:
                raise UserError(f"{redact_url(where)}: cannot be reached ({error})") from None
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        except ValueError:
            raise UserError(f"{redact_url(where)}: not JSON; this is not a tokens folder") from None
    raise AssertionError("the last attempt returns or raises")
