"""The service as a subprocess, for the length of a `with`."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from soma.base.errors import UserError
from soma.serve.http_server import GRACE
from soma.serve.options import ServeOptions


def main(options: str) -> None:
    """What the subprocess of `running_service` runs: `serve` with options from JSON, the URL on standard output."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from soma.serve.server import serve

    given = json.loads(options)
    try:
        serve(given.pop("model_ref"), ServeOptions(**given), ready=lambda url: print(url, flush=True))
    except UserError as error:
        sys.exit(str(error))


@contextmanager
def running_service(
    model_ref: str | Path, *, log: Path | None = None, timeout: float = 300.0, **options: Any
) -> Iterator[str]:
    """The service on `model_ref` in a subprocess, from healthy to the end of the `with`; yields its base URL.

    log: where the service's own words go. options: of `ServeOptions`; a free port unless given. The subprocess reads a
    pipe from us and ends with it, so kill -9 of this process ends it too. Raises UserError with the service's words if
    it does not come up within `timeout` seconds.
    """
    arguments = json.dumps({"model_ref": str(model_ref), "port": 0, **options})
    first = "import sys; from soma.base.parent import end_with_input; end_with_input()"
    code = f"{first}; from soma.serve.running import main; main(sys.argv[1])"
    with open(log, "w+b") if log else tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", code, arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        try:
            yield _wait_healthy(process, said, timeout)
        finally:
            process.terminate()
            try:
                process.wait(timeout=options.get("grace", GRACE) + 10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()


def _wait_healthy(process: "subprocess.Popen[bytes]", said: IO[bytes], timeout: float) -> str:
    """The URL that the service prints, once its health check answers."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout
    os.set_blocking(process.stdout.fileno(), False)
    url = ""
    while time.monotonic() < deadline and process.poll() is None:
        url = url or (process.stdout.readline() or b"").decode().strip()
        if url and healthy(url):
            return url
        time.sleep(0.05)
    said.seek(0)
    words = said.read().decode(errors="replace").strip()[-2000:] or "it said nothing"
    what = f"is not up after {timeout:g} s" if process.poll() is None else f"ended with status {process.returncode}"
    raise UserError(f"the service {what}: {words}")


def healthy(url: str) -> bool:
    """Whether the service at `url` answers its health check."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url + "/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
