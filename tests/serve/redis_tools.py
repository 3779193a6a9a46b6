"""A Redis of one's own, in a temporary folder, that can be stopped, killed and started again."""

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from types import TracebackType

import pytest
import redis

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")


def free_ports(number: int) -> list[int]:
    """So many ports, none of them twice."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [int(probe.getsockname()[1]) for probe in probes]


class RedisServer:
    """redis-server without persistence, from `with` to its end."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> bool:
        """False where somebody else listens at its port."""
        self.process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self.folder.name],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while self.process.poll() is None:
            try:
                if self.client.ping():
                    return True
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        return False

    def __enter__(self) -> "RedisServer":
        self.folder = tempfile.TemporaryDirectory()
        for self.port in free_ports(5):
            self.client = redis.Redis(port=self.port)
            if self.start():
                return self
        raise AssertionError("redis-server ends at once")

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.client.close()
        self.kill()
        self.folder.cleanup()
