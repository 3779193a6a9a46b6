"""Messages between rank 0 and one other rank, over a pair of connected sockets: 8 bytes of length, a pickled tuple.

Written by the thread that has something to say, without a queue: a step should not wait for another thread to wake up.
Pickle is safe here as in `soma.engine.channel`: the socket has no name, and parent and child hold its two ends.
"""

import pickle
import socket
from typing import Any

from soma.engine.channel import HEAD, read_exactly


def write(sock: socket.socket, *message: Any) -> None:
    """Send a message. Raises OSError if the other side is gone."""
    body = pickle.dumps(message, 5)
    sock.sendall(len(body).to_bytes(HEAD, "little") + body)


def read(sock: socket.socket) -> tuple[Any, ...] | None:
    """The next message; None when the other side has ended, also in the middle of one."""
    head = read_exactly(sock, HEAD)
    body = None if head is None else read_exactly(sock, int.from_bytes(head, "little"))
    return None if body is None else pickle.loads(body)


def first_line(error: Exception) -> str:
    """An error without torch's stack of C++ frames."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
