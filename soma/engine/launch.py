"""Starting the engine's process. Loads no torch, so that a front can start it first and import its own parts while the
other imports its."""

import os
import socket
import subprocess
import sys

from soma.base.machine import cores

PROGRAM = "import sys; from soma.engine.worker import main; main(int(sys.argv[1]))"

Launched = tuple["subprocess.Popen[bytes]", socket.socket]


def launch(share: int = 1, program: str | None = None) -> Launched:
    """A new engine process, which waits for its first message, and our end of the socket to it.

    It ends when the socket is closed. Its standard output goes to our standard error. `share`: how many engines have
    this machine's cores between them; each gets as many threads as that leaves it, unless OMP_NUM_THREADS says.
    program: another one, for a process that is started like an engine's.
    """
    ours, theirs = socket.socketpair()
    threads = {} if share == 1 else {"OMP_NUM_THREADS": str(max(1, cores() // share))}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", program or PROGRAM, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=2,
            env={**threads, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
    return process, ours
