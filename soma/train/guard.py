"""Two guards of a run: the loss must not diverge, the time must not run out. Loads no torch."""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

MEAN_DECAY = 0.95  # of the running mean: it looks back over some 20 steps
SETTLE_STEPS = 20  # steps before the running mean counts
LOSS_FLOOR = 0.7  # nats: below it a multiple of the mean says nothing (DPO starts at ln 2 and goes to 0)


@dataclass
class DivergenceGuard:
    """Stops a run whose loss is not finite, or has left the path for good.

    The rule: a loss diverges when it is above `factor` × max(best running mean, 0.7) for `steps` steps on end. The mean
    is exponential (0.95, bias-corrected) and counts from step 20 on; its best is its lowest value so far.
    """

    factor: float
    steps: int
    mean: float = 0.0
    seen: int = 0
    best: float = math.inf
    streak: int = 0

    def check(self, loss: float) -> str | None:
        """Take the loss of a step; the reason to stop, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        limit = self.factor * max(self.best, LOSS_FLOOR)
        self.streak = self.streak + 1 if loss > limit else 0
        if self.streak >= self.steps:
            return (
                f"the loss diverges: {loss:.4g}, above {limit:.4g} ({self.factor:g} × the best running mean "
                f"{self.best:.4g}) for {self.streak} steps"
            )
        self.seen += 1
        self.mean = MEAN_DECAY * self.mean + (1 - MEAN_DECAY) * loss
        if self.seen >= SETTLE_STEPS:
            self.best = min(self.best, self.mean / (1 - MEAN_DECAY**self.seen))
        return None

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"mean": self.mean, "seen": self.seen, "best": self.best, "streak": self.streak}

    def restore(self, state: dict[str, float]) -> None:
        """Take back `state()`."""
        self.mean, self.seen = state["mean"], int(state["seen"])
        self.best, self.streak = state["best"], int(state["streak"])


UNMEASURED_STEPS = 2  # a process's first steps compile and warm caches
MEASURED_STEPS = 5  # steps that a decision rests on
MARGIN = 0.97  # a new total aims at this share of the budget, so that noise does not decide anew


@dataclass
class TimeGuard:
    """Shrinks the number of steps when the run would take more than `max_seconds`.

    `spent` is what earlier processes took up to the checkpoint that this one started from. The cost of a step is the
    mean over this process (evaluations and checkpoints included), but at least the median of its recent steps.
    """

    max_seconds: float
    spent: float = 0.0
    taken: int = 0
    measured: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    def record(self, seconds: float) -> None:
        """A step, with all that happened beside it, took so long."""
        self.taken += 1
        self.spent += seconds
        if self.taken > UNMEASURED_STEPS:
            self.measured += seconds
            self.recent.append(seconds)

    def decide(self, done: int, steps: int, closing_steps: float) -> int | None:
        """A smaller total for a run that has `done` of `steps` steps, or None to leave it.

        `closing_steps`: what comes after the last step (evaluation), as a number of steps.
        10 of 1000 steps done in 10 s at 1 s each, 100 s allowed, nothing after: 10 + 0.97·100 - 10 = 97 steps.
        """
        if self.spent >= self.max_seconds:
            return done if done < steps else None
        if len(self.recent) < MEASURED_STEPS:
            return None
        cost = max(self.measured / (self.taken - UNMEASURED_STEPS), statistics.median(self.recent))
        if self.spent + (steps - done + closing_steps) * cost <= self.max_seconds:
            return None
        left = (MARGIN * self.max_seconds - self.spent) / cost - closing_steps
        return min(steps - 1, done + max(0, math.floor(left)))
