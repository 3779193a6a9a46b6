"""Whether a winner is better than what it is held against, or only luckier. Loads no torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

ERRORS = 2.0  # standard errors of the difference that a gain must exceed


@dataclass(frozen=True)
class Verdict:
    """Means over seeds of the recipe as written and of the winner; `gain` is how much lower the winner is."""

    before: float
    after: float
    gain: float
    noise: float  # the gain that chance alone reaches now and then: ERRORS standard errors of the difference
    is_better: bool


def judge(before: Sequence[float], after: Sequence[float]) -> Verdict:
    """Hold a winner's figures over several seeds against the recipe's own; lower is better.

    The standard error is Welch's, sqrt(s²/n + t²/m). Worked number: (2.0, 2.2) against (1.0, 1.4) is a gain of 0.9 with
    noise 2 · sqrt(0.02/2 + 0.08/2) = 0.4472: better. At least two figures each.
    """
    assert min(len(before), len(after)) >= 2, "one figure has no spread"
    gain = statistics.mean(before) - statistics.mean(after)
    noise = ERRORS * math.sqrt(statistics.variance(before) / len(before) + statistics.variance(after) / len(after))
    return Verdict(statistics.mean(before), statistics.mean(after), gain, noise, gain > noise)
