"""A service whose model lies over two processes: it answers, says what it cannot do, and leaves nothing behind."""

import signal
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from http_tools import LONG, open_stream, post, wait_for

from soma.base.errors import UserError
from soma.serve.options import ServeOptions
from soma.serve.running import running_service
from soma.serve.server import serve


def test_two_ranks_behind_a_front_that_is_killed(tiny_folder: Path) -> None:
    """While they compute, one of them even stopped: the kernel takes that along with the other."""
    with running_service(tiny_folder, tensor_parallel=2, grace=1) as url:
        port = urlsplit(url).port
        (front,) = [
            process
            for process in psutil.Process().children()
            if any(link.laddr.port == port and link.status == "LISTEN" for link in process.net_connections())
        ]
        (zero,) = front.children()
        (rank,) = zero.children()
        status, value = post(url, "/v1/completions", {**LONG, "max_tokens": 5})
        assert (status, value["usage"]["completion_tokens"]) == (200, 5)
        status, value = post(url, "/v1/embeddings", {"model": "tiny", "input": "hello"})
        assert (status, value["error"]["code"]) == (400, "no_embeddings")
        link, _ = open_stream(url)
        rank.send_signal(signal.SIGSTOP)
        front.kill()
        for process in (zero, rank):  # where nobody takes orphans in, they stay as zombies
            assert wait_for(lambda one=process: not one.is_running() or one.status() == psutil.STATUS_ZOMBIE)
        link.close()


def test_wrong_numbers(tiny_folder: Path) -> None:
    for options in ({"tensor_parallel": 0}, {"pipeline_parallel": -1}, {"tensor_parallel": 2, "in_process": True}):
        with pytest.raises(UserError, match="parallel"):
            serve(tiny_folder, ServeOptions(**options))  # type: ignore[arg-type]
