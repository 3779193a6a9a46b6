"""Locks between processes: advisory `flock`, which the kernel lets go of when its holder dies, kill -9 included."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soma.base import progress


class Busy(RuntimeError):  # noqa: N818
    """Another live process holds the lock. `pid` says which, when it has written it down."""

    def __init__(self, path: Path, pid: str) -> None:
        super().__init__(f"{path.name} is in use" + (f" by process {pid}" if pid else ""))
        self.pid = pid


class Lock:
    """A held lock. `share` lets other readers in while it keeps writers out."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def share(self) -> None:
        """Turn an exclusive lock into a shared one: what was being made is whole and is now only read."""
        fcntl.flock(self.handle, fcntl.LOCK_SH)


@contextmanager
def lock(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[Lock]:
    """Hold the lock file `path`, made if absent.

    shared: several may hold it so at once, none of them beside an exclusive holder. wait=False raises `Busy` at once
    where it would have to wait. The file may be removed by its exclusive holder; a waiter then locks the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquire(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait)
    try:
        yield Lock(handle)
    finally:
        os.close(handle)


def _acquire(path: Path, mode: int, wait: bool) -> int:
    told = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(handle, 32, 0).decode(errors="replace").strip()
                if not wait:
                    raise Busy(path, pid) from None
                if not told:
                    told = True
                    progress.current().note(f"waiting for {path.stem}" + (f" (process {pid} has it)" if pid else ""))
                fcntl.flock(handle, mode)
            if _still_there(path, handle):
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _still_there(path: Path, handle: int) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def is_alive(pid: int) -> bool:
    """Whether a process of this number is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
