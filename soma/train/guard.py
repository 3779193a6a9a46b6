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
MEASURED_STEPS = 5  # steps that an early decision rests on
MARGIN = 0.97  # a new total aims at this share of the budget …
UNUSED = 0.94  # … and one that was cut grows again when it would use less than this
MEANINGFUL = 0.25  # share of the budget before the first decision
GROSS = 2.0  # a projected use of so many budgets, or of one so-many-th after a cut, is decided on at once
SPACING = 0.15  # share of what is left between two decisions: 0.25, 0.36, 0.46, 0.54, … of the budget


@dataclass
class TimeGuard:
    """Fits the number of steps to `max_seconds` when the run would take longer.

    `spent` is what earlier processes took up to the checkpoint that this one started from. A step costs the median of
    the last 20, plus the mean of what happened beside the steps (evaluations, checkpoints). It decides at marks that
    lie closer together as the budget runs out, the first after a quarter of it, or at once when the projection is
    grossly off. A total that was cut may grow again, up to what was planned.
    """

    max_seconds: float
    spent: float = 0.0
    taken: int = 0
    beside: float = 0.0
    mark: float | None = None  # seconds spent at which the next decision is due
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=20))

    def record(self, step: float, beside: float = 0.0) -> None:
        """A step took `step` seconds, and what was done after it `beside` seconds."""
        self.taken += 1
        self.spent += step + beside
        if self.taken > UNMEASURED_STEPS:
            self.beside += beside
            self.recent.append(step)

    def decide(self, done: int, steps: int, planned: int, closing_steps: float) -> int | None:
        """Another total for a run that has `done` of `steps` steps (`planned` at first), or None to leave it.

        `closing_steps`: what comes after the last step (evaluation), as a number of steps.
        10 of 1000 steps done in 10 s at 1 s each, 100 s allowed, nothing after: 1000 s are ten budgets, so
        10 + 0.97·100 - 10 = 97 steps.
        """
        if self.spent >= self.max_seconds:
            return done if done < steps else None
        if not self.recent:
            return None
        cost = statistics.median(self.recent) + self.beside / (self.taken - UNMEASURED_STEPS)
        projected = self.spent + (steps - done + closing_steps) * cost
        if self.mark is None:
            self.mark = max(MEANINGFUL * self.max_seconds, self.spent)
        measured = len(self.recent) >= MEASURED_STEPS
        due = self.spent >= self.mark and (measured or self.spent > self.max_seconds / 2)
        cut = steps < planned
        gross = projected > GROSS * self.max_seconds or (cut and projected < self.max_seconds / GROSS)
        if not due and not (measured and gross) and not (cut and done == steps):
            return None
        self.mark = max(self.mark, self.spent + SPACING * (self.max_seconds - self.spent))
        least = UNUSED * self.max_seconds if cut else 0.0
        if least <= projected <= self.max_seconds:
            return None
        left = (MARGIN * self.max_seconds - self.spent) / cost - closing_steps
        total = min(planned, done + max(0, math.floor(left)))
        return total if total != steps else None
