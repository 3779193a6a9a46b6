"""The program of the ranks other than 0: what `soma.engine.parallel.group` starts and talks to.

Messages in:  ("load", plan, rank), ("join", port), ("start", blocks, block size), ("measure", batch, utilization),
              ("step", batch), ("ping",).
Messages out: ("done", result) for all but steps, ("pong",) at once, whatever this process computes, ("failed", text, is
              the user's mistake) before it ends.
"""

import logging
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

from soma.base.errors import UserError
from soma.base.parent import end_with_parent
from soma.engine.parallel.part import Part
from soma.engine.parallel.wire import first_line, read, write

log = logging.getLogger("soma.engine")


class Rank:
    """Does what rank 0 says until it hangs up."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.inbox = sock, queue.SimpleQueue[tuple[Any, ...]]()
        threading.Thread(target=self._read, name="soma-rank-reader", daemon=True).start()

    def _read(self) -> None:
        """The end of rank 0 is the end of this process, whatever it is doing (Gloo's own end crashes now and then)."""
        while (message := read(self.sock)) is not None:
            if message[0] == "ping":
                write(self.sock, "pong")
            else:
                self.inbox.put(message)
        os._exit(0)

    def run(self) -> None:
        try:
            _, plan, rank = self.inbox.get()
            part = Part(plan, rank)
            write(self.sock, "done", None)
            while True:
                kind, *arguments = self.inbox.get()
                if kind == "step":
                    part.step(*arguments)
                else:
                    write(self.sock, "done", getattr(part, kind)(*arguments))
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("a rank failed")
            said = str(error) if isinstance(error, UserError) else first_line(error)
            write(self.sock, "failed", said, isinstance(error, UserError))
            sys.stderr.flush()
            os._exit(1)


def main(descriptor: int) -> None:
    """Signals meant for all are left to the front. Rank 0 takes this process along even while it is stopped."""
    os.set_inheritable(descriptor, False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    Rank(socket.socket(fileno=descriptor)).run()
