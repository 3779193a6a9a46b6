"""Counts of the calls that run, in a file that is mapped into memory: what `kill -9` leaves behind.

A call has a slot of 128 bytes. A token that comes back from the engine raises a number in it before anybody is told of
the token. That is a store to memory that the kernel owns, no system call: when the process is killed at any point, the
file has every token up to that point. When the machine loses power it has what the kernel wrote back before; the boot
id at the file's head tells, and such counts are estimates.

The file's lock is held for as long as its process lives; who gets the lock of another's file knows that one is dead.
"""

import fcntl
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from soma.serve.calls import Usage

MAGIC = b"SOMASLT1"
HEAD = mmap.ALLOCATIONGRANULARITY  # magic, boot id
SLOT = 128
WORDS = SLOT // 8
CHUNK = 512 * SLOT  # by which the file grows; a multiple of the page
FREE, OPEN, SENT, ENDED = range(4)  # states of a slot
STATE, PROMPT, COMPLETION, CACHED, OUTCOME, ESTIMATED = range(6)  # words of a slot
ID_AT, ID_BYTES = 48, 80
OUTCOMES = ("ok", "error", "abort", "refused", "killed")
SUFFIX = ".slots"


def boot_id() -> bytes:
    """Which boot of this machine's kernel it is; 36 characters."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


class Slot:
    """One call's counts: the `Meter` of `soma.serve.calls`. What comes after `end` no longer counts."""

    def __init__(
        self, journal: "Journal", words: memoryview, text: memoryview, call_id: str, prompt: int, estimated: bool
    ) -> None:  # fmt: skip
        self.journal, self.words, self.text = journal, words, text
        self.lock, self.runs, self.is_free = threading.Lock(), True, False
        name = call_id.encode()
        assert 0 < len(name) <= ID_BYTES
        text[:] = name.ljust(ID_BYTES, b"\0")
        for place, value in ((PROMPT, prompt), (COMPLETION, 0), (CACHED, 0), (OUTCOME, 0), (ESTIMATED, estimated)):
            words[place] = int(value)
        words[STATE] = OPEN

    @property
    def completion_tokens(self) -> int:
        """What has come back so far."""
        return self.words[COMPLETION]

    def sent(self) -> None:
        with self.lock:
            if self.runs:
                self.words[STATE] = SENT

    def made(self, tokens: int) -> None:
        with self.lock:
            if self.runs:
                self.words[COMPLETION] += tokens

    def end(self, usage: Usage) -> None:
        """The call has ended with that."""
        with self.lock:
            self.runs = False
            for place, value in (
                (PROMPT, usage.prompt_tokens), (COMPLETION, usage.completion_tokens), (CACHED, usage.cached_tokens),
                (OUTCOME, OUTCOMES.index(usage.outcome)), (ESTIMATED, usage.estimated),
            ):  # fmt: skip
                self.words[place] = int(value)
            self.words[STATE] = ENDED

    def free(self) -> None:
        """The ledger has it: the slot is for others."""
        with self.lock:
            if self.is_free:
                return
            self.runs, self.is_free = False, True
            self.words[STATE] = FREE
        self.journal.give_back(self)


class Journal:
    """The slots of this process, in FOLDER/INSTANCE.slots."""

    def __init__(self, folder: Path, instance: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / (instance + SUFFIX)
        # Complete and locked before it has its name: nobody takes it for a dead one's.
        unfinished = self.path.with_suffix(".new")
        self.file = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        os.write(self.file, (MAGIC + boot_id()).ljust(HEAD, b"\0"))
        unfinished.rename(self.path)
        self.lock = threading.Lock()
        self.size = HEAD
        self.unused: list[tuple[memoryview, memoryview]] = []

    def open(self, call_id: str, prompt_tokens: int, *, estimated: bool = False) -> Slot:
        """A slot for a call. estimated: what will be counted are not quite tokens."""
        with self.lock:
            if not self.unused:
                self._grow()
            views = self.unused.pop()
        return Slot(self, *views, call_id, prompt_tokens, estimated)

    def _grow(self) -> None:
        os.posix_fallocate(self.file, self.size, CHUNK)  # a full disk is an error here, not a SIGBUS later
        data = memoryview(mmap.mmap(self.file, CHUNK, offset=self.size))
        self.size += CHUNK
        words = data.cast("Q")
        for start in range(0, CHUNK, SLOT):
            place = start // 8
            self.unused.append((words[place : place + WORDS], data[start + ID_AT : start + ID_AT + ID_BYTES]))

    def give_back(self, slot: Slot) -> None:
        with self.lock:
            self.unused.append((slot.words, slot.text))

    def close(self, *, remove: bool) -> None:
        """Let go of the file; remove it if the ledger has all that is in it."""
        if remove:
            self.path.unlink()
        fcntl.flock(self.file, fcntl.LOCK_UN)  # the maps have duplicates of the descriptor
        os.close(self.file)


@dataclass(frozen=True)
class Counts:
    """What a dead process's slot tells of a call."""

    was_sent: bool
    usage: Usage


class DeadJournal:
    """The file of a process that is no more, locked while it is read."""

    def __init__(self, path: Path, file: int) -> None:
        self.path, self.file = path, file
        data = os.pread(file, os.fstat(file).st_size, 0)
        self.is_whole = data[:8] == MAGIC and data[8 : 8 + 36] == boot_id()
        self.counts = dict(self._slots(data)) if data[:8] == MAGIC else {}

    @classmethod
    def take(cls, path: Path) -> "DeadJournal | None":
        """None if its process lives, or another one is reading it, or it is gone."""
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        return cls(path, file)

    @property
    def instance(self) -> str:
        return self.path.name.removesuffix(SUFFIX)

    def _slots(self, data: bytes) -> "list[tuple[str, Counts]]":
        found = []
        for start in range(HEAD, len(data) - SLOT + 1, SLOT):
            words = memoryview(data)[start : start + ID_AT].cast("Q")
            if words[STATE] == FREE:
                continue
            name = data[start + ID_AT : start + ID_AT + ID_BYTES].rstrip(b"\0").decode(errors="replace")
            was_sent = words[STATE] != OPEN
            outcome = OUTCOMES[words[OUTCOME] % len(OUTCOMES)] if words[STATE] == ENDED else "killed"
            usage = Usage(words[PROMPT] if was_sent else 0, words[COMPLETION], words[CACHED], outcome,
                          (was_sent and bool(words[ESTIMATED])) or not self.is_whole)  # fmt: skip
            found.append((name, Counts(was_sent, usage)))
        return found

    def close(self, *, remove: bool) -> None:
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self.file)
