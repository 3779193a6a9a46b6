"""`soma` for two ranks whose torchrun is killed with -9, by rank 0, where SOMA_TEST_AT says.

SOMA_TEST_AT: "start" before anything is imported; "step" between backward pass and update; "checkpoint" when all files
of one are there but the last. What a rank would do then it never comes to do: it waits, until somebody ends it.
SOMA_TEST_MARK: with `-0` behind it the file that says that it has happened, after which this is plain `soma`.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from soma import cli

STEP = 5
place = os.environ["SOMA_TEST_AT"]
own, first, second = (Path(f"{os.environ['SOMA_TEST_MARK']}-{rank}") for rank in (os.environ["RANK"], 0, 1))


def kill_and_wait() -> None:
    """Rank 0 kills when rank 1 is here too; at a checkpoint rank 1 never is."""
    while own == first and place != "checkpoint" and not second.exists():
        time.sleep(0.05)
    own.touch()
    if own == first:
        print("left alone", flush=True)
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


if not first.exists():
    if place == "start":
        cli.app = kill_and_wait  # type: ignore[assignment]
    else:
        from soma.train import checkpoint
        from soma.train.loop import Trainer

        clip, manifest = Trainer.clip, checkpoint.manifest

        def clip_or_die(self: Trainer) -> Any:
            if place == "step" and self.at.done + 1 == STEP:
                kill_and_wait()
            return clip(self)

        def manifest_or_die(directory: Path, known: Any) -> Any:
            if place == "checkpoint" and f"{STEP - 1:08d}" in directory.name:
                kill_and_wait()
            return manifest(directory, known)

        Trainer.clip = clip_or_die  # type: ignore[method-assign]
        checkpoint.manifest = manifest_or_die
cli.main()
