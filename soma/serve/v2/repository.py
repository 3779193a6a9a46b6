"""The model repository: which models there are, in which versions, and loading and unloading them."""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from soma.base.errors import UserError
from soma.serve.errors import ApiError
from soma.serve.v2.model import V2Model

log = logging.getLogger("soma.serve")

NAME = re.compile(r"[^/\x00-\x1f\x7f]+")


@dataclass
class Statistics:
    """What the statistics extension tells of a model: counts, nanoseconds, the last request in Unix milliseconds."""

    succeeded: int = 0
    succeeded_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    last: int = 0

    def observe(self, seconds: float, *, ok: bool) -> None:
        """A request is over."""
        self.last = time.time_ns() // 1_000_000
        if ok:
            self.succeeded, self.succeeded_ns = self.succeeded + 1, self.succeeded_ns + int(seconds * 1e9)
        else:
            self.failed, self.failed_ns = self.failed + 1, self.failed_ns + int(seconds * 1e9)


class Loaded:
    """A model in memory. It is closed when it was let go and its last request is over."""

    def __init__(self, model: V2Model) -> None:
        self.model = model
        self.users = 0
        self.is_retired = False

    def retire(self) -> None:
        """No request comes any more."""
        self.is_retired = True
        self._close_if_idle()

    @contextmanager
    def used(self) -> Iterator[V2Model]:
        """The model, kept for the length of the `with`."""
        self.users += 1
        try:
            yield self.model
        finally:
            self.users -= 1
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self.is_retired and self.users == 0:
            self.model.close()


@dataclass
class Entry:
    """A version of a model. `make` loads it (in a thread); None: it is there for as long as the service."""

    name: str
    version: str
    make: Callable[[], V2Model] | None
    loaded: Loaded | None = None
    state: str = "UNAVAILABLE"
    reason: str = "not loaded"
    statistics: Statistics = field(default_factory=Statistics)

    @property
    def ready(self) -> bool:
        return self.loaded is not None and self.loaded.model.ready

    def put(self, model: V2Model) -> None:
        """Take this model from now on; the one before ends with its last request."""
        before, self.loaded = self.loaded, Loaded(model)
        self.state, self.reason = "READY", ""
        if before is not None:
            before.retire()

    def drop(self, reason: str) -> None:
        """Serve no more."""
        before, self.loaded = self.loaded, None
        self.state, self.reason = "UNAVAILABLE", reason
        if before is not None:
            before.retire()


class Repository:
    """Models by name and version. `find`: makes models of further names (adapters), which are not listed."""

    def __init__(self, find: Callable[[str], V2Model | None] | None = None) -> None:
        self.entries: dict[str, dict[str, Entry]] = {}
        self.find = find
        self.found: dict[str, Entry] = {}
        self.changing = asyncio.Lock()

    def add(self, name: str, make: V2Model | Callable[[], V2Model], version: str = "1") -> Entry:
        """A model, or what loads one when it is asked to. Raises UserError for a name that is taken or none."""
        if not NAME.fullmatch(name):
            raise UserError(f"model name {name!r}: it must not be empty, nor hold a / or a control character")
        if not (version.isascii() and version.isdigit()):
            raise UserError(f"model {name}: version {version!r} is no whole number")
        versions = self.entries.setdefault(name, {})
        if version in versions:
            raise UserError(f"model {name}: version {version} is there twice")
        entry = versions[version] = Entry(name, version, None if isinstance(make, V2Model) else make)
        if isinstance(make, V2Model):
            entry.put(make)
        return entry

    def versions(self, name: str) -> list[Entry]:
        """All versions, the newest last. Raises ApiError 404."""
        if name in self.entries:
            return sorted(self.entries[name].values(), key=lambda entry: int(entry.version))
        if (entry := self._found(name)) is not None:
            return [entry]
        raise ApiError(404, f"unknown model: '{name}' is not found", "model", "model_not_found")

    def _found(self, name: str) -> Entry | None:
        model = self.find(name) if self.find else None
        if model is None:
            self.found.pop(name, None)
            return None
        if name not in self.found:
            self.found[name] = Entry(name, "1", None)
            self.found[name].put(model)
        return self.found[name]

    def get(self, name: str, version: str = "") -> Entry:
        """That version of a model, without one the newest that is loaded. Raises ApiError 404."""
        entries = self.versions(name)
        if version:
            for entry in entries:
                if entry.version == version:
                    return entry
            have = ", ".join(entry.version for entry in entries)
            raise ApiError(404, f"model '{name}' has no version {version!r}; it has {have}", "model", "model_not_found")
        return next((entry for entry in reversed(entries) if entry.loaded is not None), entries[-1])

    def __iter__(self) -> Iterator[Entry]:
        """All versions of all models."""
        for name in self.entries:
            yield from self.versions(name)

    @property
    def ready(self) -> bool:
        """Whether every model that should be served would answer."""
        return all(entry.ready for entry in self if entry.loaded is not None or entry.state == "LOADING")

    async def load(self, name: str) -> None:
        """Load all versions of a model, anew where they are loaded: requests go to the old one until the new one is
        there. Raises ApiError: no such model, one that cannot be loaded (what was loaded stays)."""
        async with self.changing:
            for entry in self.versions(name):
                if entry.make is None:
                    continue
                if entry.loaded is None:
                    entry.state, entry.reason = "LOADING", ""
                try:
                    entry.put(await asyncio.to_thread(entry.make))
                except Exception as error:
                    if not isinstance(error, UserError):
                        log.exception("model %s version %s could not be loaded", name, entry.version)
                    told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}; the log says more"
                    if entry.loaded is None:
                        entry.state, entry.reason = "UNAVAILABLE", told
                    raise ApiError(400, f"failed to load '{name}' version {entry.version}: {told}") from error

    async def unload(self, name: str) -> None:
        """Refuse new requests for a model; running ones end. Raises ApiError: no such model, one that stays."""
        async with self.changing:
            entries = self.versions(name)
            if any(entry.make is None for entry in entries):
                raise ApiError(400, f"'{name}' is there for as long as this service; it cannot be unloaded")
            for entry in entries:
                entry.drop("unloaded")

    def close(self) -> None:
        """Let go of all models."""
        for entry in self:
            if entry.loaded is not None:
                entry.drop("the service ends")
