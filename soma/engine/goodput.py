"""How many tokens to draft for whom, so that a step gives the most tokens a second.

A verified draft costs what a larger step takes longer, and gives the tokens that are accepted. Both are measured while
the engine runs: steps by their number of tokens, acceptance by request. Tokens are drafted as long as the expected
tokens a second rise: for one request on hardware that waits for memory that is many, in a full batch none (the rule
of SmartSpec, Liu et al. 2024, arXiv:2406.14066). Loads no torch.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

import numpy as np

MARGIN = 1.05  # drafts must promise so much more than none
STALE = 256  # steps after which a size that did not occur again counts as unknown
RECENT = 5
GROWTH = 2  # a step with drafts is at most so much larger than those whose time is known
SIZES = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, *(64 << shift for shift in range(1, 12))]


class StepCosts:
    """Seconds of a step by its number of tokens. Others on the machine only ever add time: the least of the last few
    steps of about a size counts."""

    def __init__(self) -> None:
        self.steps = 0
        self.seen: dict[int, tuple[int, int, deque[float]]] = {}  # size class: tokens, when, seconds

    def observe(self, tokens: int, seconds: float) -> None:
        self.steps += 1
        place = bisect_right(SIZES, tokens)
        _, _, recent = self.seen.get(place, (0, 0, deque(maxlen=RECENT)))
        recent.append(seconds)
        self.seen[place] = tokens, self.steps, recent

    @property
    def largest(self) -> int:
        """The largest size that is known."""
        return max((tokens for tokens, _, _ in self._fresh()), default=0)

    def seconds(self, tokens: np.ndarray) -> np.ndarray:
        """Of steps of so many tokens. Between known sizes in proportion, beyond the largest as much as that: what is
        unknown is worth a try."""
        known = sorted((size, min(recent)) for size, _, recent in self._fresh())
        if not known:
            return np.ones(len(tokens))
        sizes, costs = zip(*known, strict=True)
        return np.interp(tokens, sizes, np.maximum.accumulate(costs))

    def _fresh(self) -> list[tuple[int, int, deque[float]]]:
        return [entry for entry in self.seen.values() if self.steps - entry[1] < STALE]


class Acceptance:
    """The share of a request's draft tokens that were right, the last ones counting most."""

    def __init__(self) -> None:
        self.hits, self.trials = 1.0, 2.0

    @property
    def rate(self) -> float:
        return self.hits / self.trials

    def learn(self, drafted: int, accepted: int) -> None:
        """Of a draft the first `accepted` were right; then one was wrong, if there are more."""
        self.hits = 0.9 * self.hits + accepted
        self.trials = 0.9 * self.trials + accepted + (accepted < drafted)

    def fade(self) -> None:
        """Nothing was drafted: what is known is worth a little less."""
        self.hits += 0.01 * (1.0 - self.hits)
        self.trials += 0.01 * (2.0 - self.trials)


def draft_lengths(
    rates: Sequence[float], most: Sequence[int], base: int, limit: int, costs: StepCosts,
    draft_costs: StepCosts | None = None,
) -> list[int]:  # fmt: skip
    """Tokens to draft for each request that would make one token in a step of `base` tokens without drafts.

    rates: each request's `Acceptance.rate`; of k drafted tokens rate + rate² + … + rate^k are expected to be right.
    most: tokens that can be drafted. limit: of all together. draft_costs: of a round of the draft model by its number
    of requests; a round gives one token each.
    """
    lengths = [0] * len(rates)
    limit = min(limit, (GROWTH - 1) * max(costs.largest, base))
    longest = min(max(most, default=0), limit)
    if longest <= 0:
        return lengths
    places_K = np.arange(longest)
    rates_S1, most_S1 = np.array(rates)[:, None], np.array(most)[:, None]
    gains_SK = np.where(places_K < most_S1, rates_S1 ** (places_K + 1), 0.0)
    best, chosen = MARGIN * len(rates) / float(costs.seconds(np.array([base]))[0]), None
    rounds = range(1, longest + 1) if draft_costs is not None else [longest]
    drafting = 0.0
    for depth in rounds:
        if draft_costs is not None:
            active = int((most_S1 >= depth).sum())
            drafting += float(draft_costs.seconds(np.array([active]))[0]) if draft_costs.seen else 0.0
        flat = gains_SK[:, :depth].ravel()
        order = np.argsort(-flat, kind="stable")[:limit]  # within a request gains fall: earlier places come first
        order = order[flat[order] > 0]
        if not len(order):
            break
        tokens = len(rates) + flat[order].cumsum()
        speed = tokens / (costs.seconds(base + 1 + np.arange(len(order))) + drafting)
        top = int(speed.argmax())
        if speed[top] > best:
            best, chosen = float(speed[top]), order[: top + 1] // depth
    if chosen is not None:
        lengths = np.bincount(chosen, minlength=len(rates)).tolist()
    return lengths
