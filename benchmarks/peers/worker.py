"""A peer in a process of its own: one JSON request a line on standard input, one JSON answer a line on standard output.

Thread pools of two engines in one process spin against each other, and their libraries need not go together.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parent


PATIENCE = 180.0  # seconds after which a call is given up, and the process with it


class Worker:
    """`peers/SCRIPT.py` run by `python`, ready once constructed. Calls block; `close` ends the process.

    Raises RuntimeError where the process ends or does not answer in `PATIENCE` seconds.
    """

    def __init__(self, python: str, script: str, *arguments: object) -> None:
        command = [python, str(PEERS / f"{script}.py"), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def __call__(self, name: str, **arguments: Any) -> Any:
        """Call `name` over there; raises RuntimeError where it failed."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        guard = threading.Timer(PATIENCE, self.process.kill)
        guard.start()
        line = self.process.stdout.readline()
        guard.cancel()
        if not line:
            script = Path(self.process.args[1]).name  # type: ignore[index]
            raise RuntimeError(f"{script} ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def answer_requests(calls: Mapping[str, Callable[..., Any]]) -> None:
    """In the worker: say that it is ready, then answer until the input ends. What libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps("ready"), file=out)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(calls[request.pop("call")](**request)), file=out)
