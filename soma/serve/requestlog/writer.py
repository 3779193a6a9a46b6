"""Rows to Parquet files, in a thread. A file is written under a name that starts with a dot and renamed when it is
whole and on the disk: who reads `*.parquet` never sees half of one, and what kill -9 takes is what no file has yet.

A disk that takes no more stops nothing: rows wait in memory up to a bound for the next try, then they are dropped and
counted.
"""

import logging
import os
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soma.base.errors import UserError
from soma.base.locks import is_alive
from soma.serve.requestlog.redact import redacted

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("soma.serve")

HELD_BYTES = 64 << 20  # of rows that wait for a disk
UNFINISHED = re.compile(r"\.(?P<host>.+)-(?P<pid>\d+)-\d+-\d+\.parquet\.tmp")

TEXT, WHOLE, REAL = "string", "int64", "float64"
REQUESTS = {
    "request_id": TEXT, "choice": "int32", "time": "time", "route": TEXT, "model": TEXT, "key_id": TEXT, "team": TEXT,
    "prompt_version": TEXT, "tags": TEXT, "messages": TEXT, "prompt": TEXT, "completion": TEXT, "finish_reason": TEXT,
    "stream": "bool", "outcome": TEXT, "prompt_tokens": WHOLE, "completion_tokens": WHOLE, "cached_tokens": WHOLE,
    "first_token_ms": REAL, "total_ms": REAL, "redactions": "int32",
}  # fmt: skip
FEEDBACK = {
    "request_id": TEXT, "choice": "int32", "time": "time", "key_id": TEXT, "rating": TEXT, "correction": TEXT,
    "comment": TEXT, "redactions": "int32",
}  # fmt: skip
TABLES = {"requests": REQUESTS, "feedback": FEEDBACK}
Rows = Callable[[], list[dict[str, Any]]]


def schema_of(columns: dict[str, str]) -> "pa.Schema":
    """The Arrow schema; `time` is microseconds since 1970, UTC."""
    import pyarrow as pa

    kinds = {TEXT: pa.string(), WHOLE: pa.int64(), REAL: pa.float64(), "int32": pa.int32(), "bool": pa.bool_(),
             "time": pa.timestamp("us", tz="UTC")}  # fmt: skip
    return pa.schema([(name, kinds[kind]) for name, kind in columns.items()])


class Writer:
    """Takes records from any thread; the rows of one are made in the writer's. `on_written(table, rows)`,
    `on_dropped(reason, records)`, `on_error()` are told.

    Raises UserError where the folder cannot be made or pyarrow is not there.
    """

    def __init__(
        self, folder: Path, *, rotate: float, rotate_bytes: int, redact: bool, on_written: Callable[[str, int], None],
        on_dropped: Callable[[str, int], None], on_error: Callable[[], None],
    ) -> None:  # fmt: skip
        try:
            self.schemas = {table: schema_of(columns) for table, columns in TABLES.items()}
        except ImportError as error:
            raise UserError(f"the request log needs more packages ({error}): pip install 'somacube[gateway]'") from None
        self.folder, self.rotate, self.rotate_bytes, self.redact = folder, rotate, rotate_bytes, redact
        self.on_written, self.on_dropped, self.on_error = on_written, on_dropped, on_error
        self.host, self.number = socket.gethostname(), 0
        for table in TABLES:
            try:
                (folder / table).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder}: {(error.strerror or '').lower()}; the request log belongs there") from None
            self._clean(folder / table)
        self.changed = threading.Condition()
        self.waiting: dict[str, list[Rows]] = {table: [] for table in TABLES}
        self.bytes, self.oldest = 0, 0.0
        self.is_closing = False
        self.thread = threading.Thread(target=self._run, name="soma-request-log", daemon=True)
        self.thread.start()

    def _clean(self, folder: Path) -> None:
        """Remove what processes of this machine left unfinished that are no more."""
        for path in folder.glob(".*.parquet.tmp"):
            found = UNFINISHED.fullmatch(path.name)
            if found and found["host"] == self.host and not is_alive(int(found["pid"])):
                path.unlink(missing_ok=True)

    def put(self, table: str, rows: Rows, size: int) -> None:
        """A record for a table, of about `size` bytes. One for which there is no place is dropped."""
        with self.changed:
            if self.bytes + size > HELD_BYTES + self.rotate_bytes:
                self.on_dropped("no_space", 1)
                return
            if not self.bytes:
                self.oldest = time.monotonic()
            self.waiting[table].append(rows)
            self.bytes += size + 1
            self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.is_closing or self.bytes)
                left = self.oldest + self.rotate - time.monotonic()
                if not self.is_closing and self.bytes < self.rotate_bytes and left > 0:
                    self.changed.wait(left)
                    continue
                taken, size = self.waiting, self.bytes
                self.waiting, self.bytes = {table: [] for table in TABLES}, 0
                ends = self.is_closing
            kept = {table: self._write(table, rows) for table, rows in taken.items()}
            with self.changed:
                if not any(kept.values()):
                    if ends:
                        return
                    continue
                if ends:
                    self.on_dropped("no_space", sum(map(len, kept.values())))
                    return
                self.waiting = {table: kept[table] + self.waiting[table] for table in TABLES}
                self.bytes, self.oldest = self.bytes + size, time.monotonic()
                self.changed.wait_for(lambda: self.is_closing, min(self.rotate, 5.0))  # a disk gets time to recover

    def _made(self, record: Rows) -> list[dict[str, Any]]:
        """A record's rows as they go to the disk. One that cannot be made is our mistake, and costs that one."""
        try:
            return [redacted(row) if self.redact else {**row, "redactions": 0} for row in record()]
        except Exception as error:  # noqa: BLE001  (told in log and metrics; the others must not be lost with it)
            last = traceback.extract_tb(error.__traceback__)[-1]  # the message may quote what was said
            log.error("a record of the request log failed: %s in %s:%s", type(error).__name__, last.name, last.lineno)
            self.on_dropped("failed", 1)
            return []

    def _write(self, table: str, records: list[Rows]) -> list[Rows]:
        """Write a file; the records that could not be written."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [row for record in records for row in self._made(record)]
        if not rows:
            return []
        self.number += 1
        name = f"{self.host}-{os.getpid()}-{time.time_ns()}-{self.number}.parquet"
        folder = self.folder / table
        unfinished = folder / f".{name}.tmp"
        try:
            with open(unfinished, "wb") as file:
                pq.write_table(pa.Table.from_pylist(rows, self.schemas[table]), file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            os.rename(unfinished, folder / name)
            sync_folder(folder)
        except OSError as error:
            log.warning("the request log could not be written: %s", error.strerror or type(error).__name__)
            self.on_error()
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            return records
        self.on_written(table, len(rows))
        return []

    def close(self) -> None:
        """Write what waits."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()
        self.thread.join()


def sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
