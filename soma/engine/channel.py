"""Messages between a front and its engine process, over a pair of connected sockets. Loads no torch.

A frame is eight bytes of length (little endian) and a pickled list of messages. Whoever puts a message never waits: a
thread writes, and takes everything that has gathered since its last frame into the next one, so that the events of a
step travel together and a slow reader gets fewer, larger frames. Pickle is safe here: the socket has no name, and the
only two processes that hold an end of it are a parent and its own child.
"""

import pickle
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

Message = tuple[Any, ...]
HEAD = 8


class Channel:
    """One end. `prepare`, if given, is applied to each message on the writing thread, before it is pickled."""

    def __init__(self, sock: socket.socket, prepare: Callable[[Message], Message] | None = None) -> None:
        self.sock, self.prepare = sock, prepare
        self.outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.writer = threading.Thread(target=self._write, name="soma-channel", daemon=True)
        self.writer.start()

    def put(self, *message: Any) -> None:
        """Send a message soon. One to a side that is gone is dropped: the reader of this side learns of it."""
        self.outbox.put(message)

    def _write(self) -> None:
        open_ = True
        while open_:
            messages = [self.outbox.get()]
            with suppress(queue.Empty):
                while True:
                    messages.append(self.outbox.get_nowait())
            if None in messages:
                open_ = False
                messages = messages[: messages.index(None)]
            wanted = [message for message in messages if message is not None]
            if not wanted:
                continue
            frame = pickle.dumps([self.prepare(message) for message in wanted] if self.prepare else wanted, 5)
            with suppress(OSError):
                self.sock.sendall(len(frame).to_bytes(HEAD, "little") + frame)

    def __iter__(self) -> Iterator[list[Message]]:
        """Frames, each a list of messages, until the other side ends or is killed."""
        while (head := read_exactly(self.sock, HEAD)) is not None:
            frame = read_exactly(self.sock, int.from_bytes(head, "little"))
            if frame is None:
                return
            yield pickle.loads(frame)

    def flush(self) -> None:
        """Send what was put; nothing can be put afterwards."""
        self.outbox.put(None)
        self.writer.join(5)

    def close(self) -> None:
        """Send what was put, then hang up."""
        self.flush()
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def read_exactly(sock: socket.socket, size: int) -> bytes | None:
    """So many bytes; None at the end, also where it comes in the middle."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        try:
            got = sock.recv_into(view[done:])
        except OSError:
            return None
        if got == 0:
            return None
        done += got
    return bytes(data)
