"""The seven acts (Searle 1976, "A classification of illocutionary acts"; verdictives after Austin 1962), and who tells
them apart: a model that is handed in, since this room loads no torch.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

LEARNED = ("assertive", "question", "directive", "commissive", "expressive")  # there are labels for these
ACTS = (*LEARNED, "declaration", "verdictive")  # the last two are told by rules
MEANING = {
    "assertive": "says how things are", "question": "asks for an answer", "directive": "gets somebody to do something",
    "commissive": "binds the speaker to do something", "expressive": "shows what the speaker feels",
    "declaration": "makes it so by saying it", "verdictive": "gives a finding or a judgement",
}  # fmt: skip


class Turn(NamedTuple):
    """What somebody says at once. `act`: its label, None where there is none."""

    speaker: str
    text: str
    act: str | None = None


Dialogue = Sequence[Turn]


class ActScorer(Protocol):
    """A model that tells the learned acts apart: handed in by the caller, in this process or elsewhere."""

    name: str  # stands for the model in what was made with it

    def probabilities(self, dialogues: Sequence[Dialogue]) -> list[np.ndarray]:
        """For each dialogue (turns, len(LEARNED)) float32, rows that sum to 1; a turn sees the ones before it."""
        ...
