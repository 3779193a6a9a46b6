"""kill -9 of a process takes along what it has started: nothing holds its standard error any more."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 120.0  # seconds on a busy machine
WAITS = "import sys, time; print('ready', file=sys.stderr, flush=True); time.sleep(600)"
CHILD = "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {code!r}], stdin={stdin}); "
LOOKING = "import sys; sys.platform = 'other'; from soma.base.parent import end_with_parent; end_with_parent(); "

# By what a child ends: the code of the process that starts it and is killed.
PARENTS = {
    "kernel": CHILD.format(
        code=f"from soma.base.parent import end_with_parent; end_with_parent(); {WAITS}", stdin="None"
    ),
    "looking": CHILD.format(code=LOOKING + WAITS, stdin="None"),
    "input": CHILD.format(
        code=f"from soma.base.parent import end_with_input; end_with_input(); {WAITS}", stdin="subprocess.PIPE"
    ),
    "spawn": "from tests.base.test_parent import spawn; spawn('spawn'); import time; ",
    "forkserver": "from tests.base.test_parent import spawn; spawn('forkserver'); import time; ",
    "workers of data": "from tests.base.test_parent import map_both; map_both(); import time; ",
}
ORPHAN = CHILD.format(code=WAITS, stdin="subprocess.PIPE") + "print(child.pid, flush=True); "


def wait_long(number: int = 0) -> None:
    """A child's work."""
    from soma.base.parent import end_with_spawner

    end_with_spawner()
    exec(WAITS)


def spawn(method: str) -> None:
    import multiprocessing

    multiprocessing.get_context(method).Process(target=wait_long).start()


def task(number: int) -> None:
    """Of a worker that has been told by `map_tasks` when to end."""
    exec(WAITS)


def map_both() -> None:
    from soma.data.workers import map_tasks

    list(map_tasks(task, [0, 1], workers=2))


def start(code: str) -> "subprocess.Popen[bytes]":
    """The parent, once its child is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(600)"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("how", PARENTS)
def test_a_child_ends_with_its_parent(how: str) -> None:
    parent = start(PARENTS[how])
    parent.kill()
    parent.communicate(timeout=LIMIT)  # to the end of standard error, which the child has too


def test_another_child_does_not() -> None:
    """The test above would notice."""
    parent = start(ORPHAN)
    assert parent.stdout is not None
    assert parent.stderr is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    try:
        assert select.select([parent.stderr], [], [], 0.5)[0] == []
    finally:
        os.kill(child, signal.SIGKILL)
    parent.communicate(timeout=LIMIT)
