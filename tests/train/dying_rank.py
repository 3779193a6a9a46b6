"""`soma`, but a rank whose environment says so kills itself, once, between the backward pass and the update of a step.

SOMA_TEST_KILL: "rank", or "agent" for the torchrun process above it as well. SOMA_TEST_MARK: the file that says that it
has happened. SOMA_TEST_RANKS: as many must be there before it has.
"""

import os
import signal
import time
from pathlib import Path

from torch import Tensor

from soma.cli import main
from soma.train.loop import Trainer

STEP = 7
mark = Path(os.environ["SOMA_TEST_MARK"])
clip = Trainer.clip


def die(self: Trainer) -> Tensor:
    """The step is computed, its update not taken."""
    victim = os.environ.get("SOMA_TEST_KILL")
    if victim and self.at.done + 1 == STEP and not mark.exists():
        mark.touch()
        if victim == "agent":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(self)


while not mark.exists() and os.environ["WORLD_SIZE"] != os.environ["SOMA_TEST_RANKS"]:
    time.sleep(0.05)  # the other agent is still starting: this one's ranks are started anew when it has come
Trainer.clip = die  # type: ignore[method-assign]
main()
