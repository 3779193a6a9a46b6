"""torchrun agents in elastic mode, `--nnodes=1:2`; kill -9 hits a rank, or an agent with its rank, in mid-step."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soma.model.hub import load_model
from soma.train.parallel.launch import OWN_STORE
from tests.train.test_topology import ENVIRONMENT, furthest_apart, write_recipe

LIMIT = 240.0  # seconds for a whole run on a busy machine
STEPS = 10


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Agents:
    """Two torchrun agents, as on two nodes, one rank each; `kill` is what happens to the second's."""

    def __init__(self, recipe: Path, runs: Path, mark: Path, kill: str) -> None:
        conf = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=5"
        port = free_port()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", f"--rdzv-conf={conf}",
            "--local-addr=127.0.0.1", "-m", "tests.train.dying_rank", "train", str(recipe), "--runs", str(runs),
            "--set", "train.layout.fsdp=-1",
        ]  # fmt: skip
        self.logs = [runs.parent / f"{runs.name}-{agent}.log" for agent in range(2)]
        self.processes: list[subprocess.Popen[bytes]] = []
        environment = ENVIRONMENT | OWN_STORE | {"SOMA_TEST_MARK": str(mark), "SOMA_TEST_RANKS": "2"}
        for agent, own in enumerate(({}, {"SOMA_TEST_KILL": kill})):
            with open(self.logs[agent], "wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        command, env=environment | own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
            if agent == 0:  # the first keeps the store of the rendezvous
                wait_for_listener(port)

    def close(self) -> None:
        """End what is left of them, ranks and all."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()

    def text(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-6000:] for log in self.logs)


def wait_for_listener(port: int) -> None:
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def started() -> Iterator[list[Agents]]:
    """What a test starts; ended with it."""
    agents: list[Agents] = []
    yield agents
    for one in agents:
        one.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is POSIX")
def test_killed_rank(tmp_path: Path, started: list[Agents]) -> None:
    """The job goes on from the last checkpoint, on the ranks that are left. On two again it ends with the bits of an
    undisturbed run; on one, whose agent alone lived, within another layout's bound.
    """
    recipe = write_recipe(tmp_path, steps=STEPS)
    made: dict[str, Path] = {}
    for name, kill in (("undisturbed", ""), ("rank", "rank"), ("agent", "agent")):
        runs, mark = tmp_path / name, tmp_path / f"{name}.mark"
        agents = Agents(recipe, runs, mark, kill)
        started.append(agents)
        assert agents.processes[0].wait(LIMIT) == 0, agents.text()
        assert mark.exists() == bool(kill)
        # The checkpoint of step 6 may still have been on its way to the disk.
        resumed = any(f"resumed at step {step} of {STEPS}" in agents.text() for step in (4, 6))
        assert resumed == bool(kill), agents.text()
        made[name] = (runs / "tiny" / "train").resolve()
        load_model(made[name] / "model")
    assert made["undisturbed"].name == made["agent"].name
    assert furthest_apart(made["undisturbed"], made["rank"]) == 0.0
    assert 0.0 < furthest_apart(made["undisturbed"], made["agent"]) < 1e-4
