"""What the rate limiters must say, from the definitions: each decision looks at all that happened, in fractions."""

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor

from soma.serve.limits.config import Rule


@dataclass
class Event:
    """A call that was let through, or a correction of one (then it has no end of its own)."""

    when: int
    amount: int
    id: str
    corrects: "Event | None" = None


@dataclass
class Oracle:
    """One bucket of one rule."""

    rule: Rule
    events: list[Event] = field(default_factory=list)
    running: int = 0

    def admits(self, now: int, cost: int) -> bool:
        limit, window = self.rule.limit, self.rule.window
        if self.rule.algorithm == "concurrency":
            return self.running + cost <= limit
        if cost > self.capacity:
            return False
        return self.used(now) + cost <= self.capacity if window else False

    @property
    def capacity(self) -> int:
        return self.rule.burst or self.rule.limit

    def used(self, now: int) -> Fraction:
        """What of the capacity is used."""
        return getattr(self, "_" + self.rule.algorithm)(now)

    def _fixed_window(self, now: int) -> Fraction:
        place = now // self.rule.window
        return Fraction(sum(amount for when, amount in self._amounts() if when // self.rule.window == place))

    def _sliding_window_log(self, now: int) -> Fraction:
        return Fraction(sum(amount for when, amount in self._amounts() if now - when < self.rule.window))

    def _sliding_window_counter(self, now: int) -> Fraction:
        place, passed = divmod(now, self.rule.window)
        own = sum(amount for when, amount in self._amounts() if when // self.rule.window == place)
        before = sum(amount for when, amount in self._amounts() if when // self.rule.window == place - 1)
        return own + before * Fraction(self.rule.window - passed, self.rule.window)

    def _amounts(self) -> list[tuple[int, int]]:
        """(when it counts, how much) for windows: a correction upwards whose window is over counts when it is made."""
        rows: list[tuple[int, int]] = []
        for event in self.events:
            if event.corrects is None:
                rows.append((event.when, event.amount))
            elif self._still(event.corrects.when, event.when):
                rows.append((event.corrects.when, event.amount))
            elif event.amount > 0:
                rows.append((event.when, event.amount))
        return rows

    def _still(self, counted: int, now: int) -> bool:
        """Whether what was counted then can still be corrected. Upwards a window of its own is needed."""
        window = self.rule.window
        if self.rule.algorithm == "sliding_window_log":
            return now - counted < window
        return counted // window == now // window

    def _token_bucket(self, now: int) -> Fraction:
        return self._flow(now)

    def _leaky_bucket(self, now: int) -> Fraction:
        return self._flow(now)

    def _flow(self, now: int) -> Fraction:
        """A token bucket's lack and a leaky bucket's water are the same number."""
        level, last = Fraction(0), 0
        for event in [*self.events, Event(now, 0, "")]:
            level = max(Fraction(0), level - Fraction((event.when - last) * self.rule.limit, self.rule.window))
            level, last = max(Fraction(0), level + event.amount), event.when
        return level

    def retry(self, now: int, cost: int) -> int:
        """The first moment at which it would pass, by trying all; ms from now."""
        wait = 0
        while not self.admits(now + wait, cost):
            wait += 1
        return wait

    def delay(self, now: int) -> int:
        used = self.used(now) if self.rule.algorithm == "leaky_bucket" else 0
        return ceil(used * self.rule.window / self.rule.limit)

    def remaining(self, now: int) -> int:
        if self.rule.algorithm == "concurrency":
            return max(0, self.rule.limit - self.running)
        return floor(max(Fraction(0), self.capacity - self.used(now)))

    def add(self, now: int, id_: str, cost: int) -> None:
        self.running += cost
        self.events.append(Event(now, cost, id_))

    def settle(self, now: int, id_: str, used: int) -> None:
        event = next(each for each in self.events if each.id == id_)
        self.running += used - event.amount
        if self.rule.algorithm == "sliding_window_counter" and used < event.amount:
            # Given back in its own window as long as that one counts, also as the one before.
            if now // self.rule.window - event.when // self.rule.window <= 1:
                event.amount = used
        else:
            self.events.append(Event(now, used - event.amount, "", event))
