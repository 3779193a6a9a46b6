"""A training stage under `torchrun`, on a rank of which something happens in mid-step: to be started as a program.

    torchrun … -m tests.train.faulty_rank JOB.json

JOB.json: `config`, a TrainConfig; `model`, a ModelConfig; the folders `tokens`, `tokenizer`, `out` and `work`; `fault`:
"kill" (kill -9), "hang" (its code goes no further), "stop" (none of its threads does) or "" on the last rank, once,
between the backward pass and the update of step `at`; `mark`, the file that then says that it has happened.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soma.base import progress
from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.train.config import TrainConfig
from soma.train.loop import Trainer
from soma.train.parallel import ranks
from soma.train.trainer import train


def hang() -> None:
    """As a file system that does not answer would."""
    while True:
        time.sleep(1)


def happen(fault: str, mark: Path) -> None:
    """The fault."""
    mark.write_text(str(time.time()))
    if fault == "hang":
        hang()
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])


def main(job: dict[str, Any]) -> None:
    """The stage."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    rank, mark, clip = ranks.join(), Path(job["mark"]), Trainer.clip

    def faulty(self: Trainer) -> Tensor:
        is_it = rank == int(os.environ["WORLD_SIZE"]) - 1 and self.at.done + 1 == job["at"]
        if job["fault"] and is_it and not mark.exists():
            happen(job["fault"], mark)
        return clip(self)

    Trainer.clip = faulty  # type: ignore[method-assign]
    try:
        with progress.use(progress.choose()):
            train(
                TrainConfig(**job["config"]), Path(job["out"]), Path(job["work"]), tokens=Path(job["tokens"]),
                tokenizer=Path(job["tokenizer"]), model=ModelConfig(**job["model"]),
            )  # fmt: skip
    except UserError as error:
        print(f"soma: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    ranks.leave()


main(json.loads(Path(sys.argv[1]).read_text()))
