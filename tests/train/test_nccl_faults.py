"""Ranks that are killed, or hang, under one agent of torchrun: the job goes on, or says who is missing and ends.

On GPUs over NCCL; what kill -9 does also on CPUs.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from soma.model.config import ModelConfig
from soma.model.hub import load_model
from tests.train.conftest import SMALL
from tests.train.test_topology import furthest_apart

GPUS = torch.cuda.device_count()
LIMIT = 240.0  # seconds for a job
TIMEOUT = 8.0  # of the layout, where a rank hangs
STEPS, AT = 10, 7

gpus = pytest.mark.skipif(GPUS < 2, reason=f"NCCL wants 2 GPUs, here are {GPUS}")
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=gpus)]


class Jobs:
    """Starts a training stage on GPUs; what it says comes back."""

    def __init__(self, folder: Path, tokens: Path, tokenizer: Path, shape: ModelConfig) -> None:
        self.folder = folder
        self.job = {"tokens": str(tokens), "tokenizer": str(tokenizer), "model": shape.model_dump(mode="json")}

    def run(
        self, name: str, layout: dict[str, Any], fault: str, device: str = "cuda", restarts: int = 0, ranks: int = 2
    ) -> tuple[int, str]:  # fmt: skip
        """Exit status and output of a job's ranks. A name that has run goes on."""
        out = self.folder / name
        out.mkdir(exist_ok=True)
        config = SMALL | {"device": device, "steps": STEPS, "checkpoint_every": 2, "layout": layout}
        if layout.get("pp", 1) > 1:
            config |= {"microbatch_size": 1}
        job = self.job | {
            "config": config, "out": str(out), "work": f"{out}-work", "fault": fault, "at": AT,
            "mark": f"{out}.mark",
        }  # fmt: skip
        place = self.folder / f"{name}.json"
        place.write_text(json.dumps(job))
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            f"--max-restarts={restarts}", "-m", "tests.train.faulty_rank", str(place),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        log = self.folder / f"{name}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"not done after {LIMIT:.0f} s: {log.read_text(errors='replace')}")
        return code, log.read_text(errors="replace")


@pytest.fixture
def jobs(tmp_path: Path, tokens: Path, tokenizer: Path, shape: ModelConfig) -> Jobs:
    return Jobs(tmp_path, tokens, tokenizer, shape)


@pytest.mark.parametrize("layout", [{"fsdp": -1}, {"pp": 2}], ids=["fsdp", "pp"])
@pytest.mark.parametrize("device", DEVICES)
def test_killed_rank(jobs: Jobs, layout: dict[str, Any], device: str) -> None:
    """kill -9 between backward pass and update: torchrun starts all anew, and the weights are the same to the bit."""
    code, text = jobs.run("whole", layout, "", device)
    assert code == 0, text
    code, text = jobs.run("killed", layout, "kill", device, restarts=1)
    assert code == 0, text
    assert (jobs.folder / "killed.mark").exists()
    assert re.search(rf"resumed at step [246] of {STEPS}", text), text
    load_model(jobs.folder / "killed" / "model")
    assert furthest_apart(jobs.folder / "whole", jobs.folder / "killed") == 0.0


@pytest.mark.parametrize("device", DEVICES)
def test_fewer_ranks(jobs: Jobs, device: str) -> None:
    """The job that has lost a rank goes on with the one that is left."""
    layout = {"fsdp": -1}
    code, text = jobs.run("whole", layout, "", device)
    assert code == 0, text
    code, text = jobs.run("job", layout, "kill", device)
    assert code != 0
    code, text = jobs.run("job", layout, "kill", device, ranks=1)
    assert code == 0, text
    assert re.search(rf"resumed at step [246] of {STEPS}", text), text
    assert 0.0 < furthest_apart(jobs.folder / "whole", jobs.folder / "job") < 1e-4


@gpus
@pytest.mark.parametrize(
    ("layout", "fault"),
    [({"fsdp": 2}, "hang"), ({"dp": 2}, "stop"), ({"pp": 2}, "hang")],
    ids=["fsdp-hang", "dp-stop", "pp-hang"],
)
def test_missing_rank_is_named(jobs: Jobs, layout: dict[str, Any], fault: str) -> None:
    """Rank 0 waits on its GPU for rank 1: it says so, and ends in bounded time."""
    code, text = jobs.run("run", layout | {"timeout": TIMEOUT}, fault)
    seconds = time.time() - float((jobs.folder / "run.mark").read_text())
    assert code != 0
    line = re.search(r"^soma: rank 0 waits at (\S+:\d+ in \w+) in (.+) for rank 1, which (.+)$", text, re.MULTILINE)
    assert line is not None, text
    print(line[0], f"({seconds:.1f} s after the fault)")
    assert re.search(r"number \d+ of ranks 0,1|receipt number \d+", line[2]), line[0]
    wanted = "stands at faulty_rank.py" if fault == "hang" else "gives no sign of life"
    assert wanted in line[3], line[0]
    assert seconds < TIMEOUT + 60  # torchrun gives a stopped rank half a minute
