"""Starting the engine's process. Loads no torch, so that a front can start it first and import its own parts while the
other imports its."""

import os
import socket
import subprocess
import sys

PROGRAM = "import sys; from soma.engine.worker import main; main(int(sys.argv[1]))"

Launched = tuple["subprocess.Popen[bytes]", socket.socket]


def launch() -> Launched:
    """A new engine process, which waits for its first message, and our end of the socket to it.

    It ends when the socket is closed. Its standard output goes to our standard error.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=2,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
    return process, ours
