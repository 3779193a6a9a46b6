"""Ending with the process that started this one, also where that was killed with -9 and could tell nobody.

An orphan would go on with work that nobody waits for, and hold the ports, GPUs, memory and locks that the same command
needs when it is given again.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOOK = 1.0  # seconds between two looks at the parent, where the kernel does not tell
ORPHANED = 1  # exit status


def end_with_parent() -> None:
    """For a process that another program has started: kill it as soon as its parent ends.

    On Linux the kernel does that, whatever this process is doing (prctl(2), PR_SET_PDEATHSIG; the parent is the
    *thread* that has started this process). Elsewhere a thread looks every second. A parent that has ended before this
    call is missed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        end_after(look_at(os.getppid()))


def end_with_input() -> None:
    """For a process whose standard input is a pipe that its parent keeps open and never writes to: it ends at once when
    the pipe does."""
    end_after(sys.stdin.buffer.read)


def end_with_spawner() -> None:
    """For a process that `multiprocessing` has started, from a fork server or anew: it ends at once when the process
    that asked for it does. (The pipes that it reads would not tell: it holds both ends.)"""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was not started by multiprocessing"
    end_after(parent.join)


def end_after(wait: Callable[[], object]) -> None:
    """Wait in a thread, then end: not by way of the interpreter, which would wait for other threads."""

    def watch() -> None:
        wait()
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="soma-parent", daemon=True).start()


def look_at(parent: int) -> Callable[[], object]:
    """Waits until this process has another parent."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)

    return wait
