"""The calls that run and what they have made, in a file that is mapped into memory: what `kill -9` leaves behind.

A call has a slot of 1 KiB: its row of the ledger with a checksum, written before the call is sent anywhere, and its
counts. A token that comes back from the engine raises a number in it before anybody is told of the token. All of that
are stores to memory that the kernel owns, no system call: when the process is killed at any point, the file has
everything up to that point. When the machine loses power it has the rows that `Journal.sync` wrote, and of the counts
what the kernel wrote back before; the boot id at the file's head tells, and such counts are estimates. A slot is free
again when the database has the call's end, so the file grows with the calls that run and not with those that ended.

The file's lock is held for as long as its process lives; who gets the lock of another's file knows that one is dead.
"""

import fcntl
import mmap
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

from soma.serve.calls import Usage

MAGIC = b"SOMASLT2"
SIZES = {MAGIC: 1024, b"SOMASLT1": 128}  # of a slot; the first format had no rows
HEAD = mmap.ALLOCATIONGRANULARITY  # magic, boot id
SLOT = SIZES[MAGIC]
CHUNK = 128 * SLOT  # by which the file grows; a multiple of the page
FREE, OPEN, SENT, ENDED = range(4)  # states of a slot
STATE, PROMPT, COMPLETION, CACHED, OUTCOME, ESTIMATED = range(6)  # words of a slot
ID_AT, ID_BYTES = 48, 80
WORDS = ID_AT // 8
ROW_AT = ID_AT + ID_BYTES  # length and checksum of what follows, the row
ROW_HEAD = struct.Struct("<II")
ROW_BYTES = SLOT - ROW_AT - ROW_HEAD.size
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
        self.journal, self.words, self.text = journal, words, text  # text: the id, then the row
        self.lock, self.runs, self.is_free = threading.Lock(), True, False
        name = call_id.encode()
        assert 0 < len(name) <= ID_BYTES
        text[: ID_BYTES + ROW_HEAD.size] = name.ljust(ID_BYTES + ROW_HEAD.size, b"\0")
        for place, value in ((PROMPT, prompt), (COMPLETION, 0), (CACHED, 0), (OUTCOME, 0), (ESTIMATED, estimated)):
            words[place] = int(value)
        words[STATE] = OPEN

    def forget(self) -> None:
        """Nothing became of the call: its row is not to be found here."""
        self.text[ID_BYTES : ID_BYTES + ROW_HEAD.size] = bytes(ROW_HEAD.size)

    @property
    def completion_tokens(self) -> int:
        """What has come back so far."""
        return self.words[COMPLETION]

    def write(self, row: bytes) -> bool:
        """Keep the call's row of the ledger here, whole or not at all; whether it has room."""
        if len(row) > ROW_BYTES:
            return False
        start = ID_BYTES + ROW_HEAD.size
        self.text[start : start + len(row)] = row
        self.text[ID_BYTES:start] = ROW_HEAD.pack(len(row), checksum(bytes(self.text[:ID_BYTES]), row))
        return True

    def sent(self) -> None:
        with self.lock:
            if self.runs:
                self.words[STATE] = SENT

    def cached(self, tokens: int) -> None:
        with self.lock:
            if self.runs:
                self.words[CACHED] += tokens

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


def checksum(name: bytes, row: bytes) -> int:
    """Of a row and the id that stands before it; never 0."""
    return zlib.crc32(row, zlib.crc32(name)) or 1


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
        """A slot for a call. estimated: what will be counted are not quite tokens. Raises OSError: the disk is full."""
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
            self.unused.append((words[place : place + WORDS], data[start + ID_AT : start + SLOT]))

    def sync(self) -> None:
        """Everything that is written so far is on the disk when this returns. Raises OSError."""
        os.fdatasync(self.file)

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
    """What a dead process's slot tells of a call. row: of the ledger, if that was not left to the database."""

    was_sent: bool
    usage: Usage
    row: bytes | None


class DeadJournal:
    """The file of a process that is no more, locked while it is read."""

    def __init__(self, path: Path, file: int) -> None:
        self.path, self.file = path, file
        data = os.pread(file, os.fstat(file).st_size, 0)
        self.is_whole = data[:8] in SIZES and data[8 : 8 + 36] == boot_id()
        self.counts = dict(self._slots(data, SIZES[data[:8]])) if data[:8] in SIZES else {}

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

    def _slots(self, data: bytes, size: int) -> "list[tuple[str, Counts]]":
        """Of slots in use. After another boot the states are as old as may be, so whole rows count by themselves: the
        database knows which of them have ended."""
        found = []
        for start in range(HEAD, len(data) - size + 1, size):
            words = memoryview(data)[start : start + ID_AT].cast("Q")
            row = row_in(data[start + ID_AT : start + size])
            if words[STATE] == FREE and (self.is_whole or row is None):
                continue
            name = data[start + ID_AT : start + ROW_AT].rstrip(b"\0").decode(errors="replace")
            was_sent = words[STATE] != OPEN or not self.is_whole
            outcome = OUTCOMES[words[OUTCOME] % len(OUTCOMES)] if words[STATE] == ENDED else "killed"
            usage = Usage(words[PROMPT] if was_sent else 0, words[COMPLETION], words[CACHED], outcome,
                          (was_sent and bool(words[ESTIMATED])) or not self.is_whole)  # fmt: skip
            found.append((name, Counts(was_sent, usage, row)))
        return found

    def close(self, *, remove: bool) -> None:
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self.file)


def row_in(text: bytes) -> bytes | None:
    """The row in a slot's text, if a whole one is there."""
    head = text[ID_BYTES : ID_BYTES + ROW_HEAD.size]
    if len(head) < ROW_HEAD.size:
        return None
    length, known = ROW_HEAD.unpack(head)
    row = text[ID_BYTES + ROW_HEAD.size :][:length]
    whole = len(row) == length and known == checksum(text[:ID_BYTES], row)
    return row if whole else None
