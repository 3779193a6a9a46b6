"""Feast's feature server as a process of ours: started, watched until it answers, ended with us."""

import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from soma.base import progress
from soma.base.errors import UserError
from soma.serve.features import environment
from soma.serve.features.repo import checked
from soma.serve.listener import listen
from soma.serve.running import healthy

START = 180.0  # seconds: Feast's imports alone take some ten on a busy machine
STOP = 20.0


@contextmanager
def running_feature_server(folder: Path, port: int = 0) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The server on loopback for the length of the `with`; its URL and process.

    port 0 takes a free one. The process reads a pipe from us and ends with it, so kill -9 of this process ends it too.
    Raises UserError with its words if it does not come up.
    """
    listener = listen("127.0.0.1", port)
    port = listener.getsockname()[1]
    listener.close()
    command = [*environment.program(), "serve", str(checked(folder)), str(port)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment.variables()
        )
        assert process.stdin is not None
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_healthy(url, process, said)
            yield url, process
        finally:
            process.stdin.close()
            process.terminate()
            try:
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_healthy(url: str, process: "subprocess.Popen[bytes]", said: IO[bytes]) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        if healthy(url):
            return
        time.sleep(0.1)
    said.seek(0)
    words = said.read().decode(errors="replace").strip()[-1500:] or "it said nothing"
    what = f"is not up after {START:g} s" if process.poll() is None else f"ended with status {process.returncode}"
    raise UserError(f"the feature server {what}: {words}")


def serve(folder: Path, port: int = 6566, ready: Callable[[str], None] | None = None) -> None:
    """Run the server until it ends, or SIGTERM or SIGINT comes. `ready` is called with its URL. Raises UserError."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with running_feature_server(folder, port) as (url, process):
            (ready or (lambda url: progress.current().note(f"features are served at {url}")))(url)
            while not stop.wait(0.2):
                if process.poll() is not None:
                    raise UserError(f"the feature server ended with status {process.returncode}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
