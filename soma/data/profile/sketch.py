"""Statistics that are gathered part by part and merged, in memory that does not grow with the data.

Every sketch gives the same for any order of its values (the sums of `Numbers` up to rounding), is exact while there are
few distinct values, and states its error beyond that. `add` takes values, `merge` another sketch.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

EXACT = 2048  # distinct numbers that are counted one by one
ACCURACY = 0.005  # of a quantile beyond that, relative
TOP = 20_000  # categories that are counted
SMALLEST = 1024  # hashes that estimate how many are distinct: a standard error of 3 %
TINY = 1e-9  # smaller numbers count as zero in the logarithmic bins
GAMMA = (1 + ACCURACY) / (1 - ACCURACY)


class Numbers:
    """Count, mean, deviation, range and quantiles of numbers; NaN and infinities are counted apart.

    Up to `EXACT` distinct values quantiles are exact, then within `ACCURACY` of the value: DDSketch (Masson, Rim and
    Lee, VLDB 2019), whose bins of constant ratio merge without loss.
    """

    def __init__(self) -> None:
        self.count, self.nulls, self.not_finite = 0, 0, 0
        self.mean, self.squares = 0.0, 0.0  # squares: sum of squared distances from the mean
        self.low, self.high = math.inf, -math.inf
        self.values: Counter[float] | None = Counter()
        self.bins: Counter[int] = Counter()  # 0: tiny; the sign of a bin is that of its values

    def add(self, values: Any, nulls: int = 0) -> None:
        """Numbers, an array or a list."""
        values_N = np.asarray(values, np.float64)
        kept_N = values_N[np.isfinite(values_N)]
        self.nulls += nulls
        self.not_finite += len(values_N) - len(kept_N)
        if not len(kept_N):
            return
        other = Numbers()
        other.count, other.mean = len(kept_N), float(kept_N.mean())
        other.squares = float(((kept_N - other.mean) ** 2).sum())
        other.low, other.high = float(kept_N.min()), float(kept_N.max())
        distinct, times = np.unique(kept_N, return_counts=True)
        if len(distinct) <= EXACT and self.values is not None:
            other.values = Counter(dict(zip(distinct.tolist(), times.tolist(), strict=True)))
        else:
            other.values, other.bins = None, _binned(distinct, times)
        self.merge(other)

    def merge(self, other: "Numbers") -> None:
        """Take in what another has seen."""
        self.nulls, self.not_finite = self.nulls + other.nulls, self.not_finite + other.not_finite
        total = self.count + other.count
        if other.count:
            apart = other.mean - self.mean
            self.squares += other.squares + apart * apart * self.count * other.count / total
            self.mean += apart * other.count / total
            self.count = total
            self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if self.values is not None and other.values is not None:
            self.values.update(other.values)
            if len(self.values) <= EXACT:
                return
            self.bins, self.values = _bins_of(self), None
        else:
            self.bins, self.values = _bins_of(self) + _bins_of(other), None

    @property
    def std(self) -> float:
        """Standard deviation of the sample, 0 for fewer than two values."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def steps(self) -> tuple[np.ndarray, np.ndarray]:
        """(values ascending, how often each): the values themselves, or the middles of the bins."""
        if self.values is not None:
            found = sorted(self.values.items())
        else:
            found = sorted((_middle(number, self.low, self.high), times) for number, times in self.bins.items())
        return np.array([v for v, _ in found], np.float64), np.array([n for _, n in found], np.int64)

    def quantile(self, shares: Sequence[float]) -> list[float]:
        """The smallest value that at least this share lies at or below, for each share; NaN without values."""
        if not self.count:
            return [math.nan] * len(shares)
        values, times = self.steps()
        ends = np.cumsum(times)
        places = np.searchsorted(ends, np.asarray(shares) * ends[-1] - 1e-9)
        return [float(value) for value in values[np.minimum(places, len(values) - 1)]]


def _binned(distinct: np.ndarray, times: np.ndarray) -> Counter[int]:
    """DDSketch's bins: number k > 0 holds values in (γ^(k-1), γ^k] from `TINY` on, −k the negative ones."""
    size = np.abs(distinct)
    numbers = np.zeros(len(distinct), np.int64)
    large = size > TINY
    numbers[large] = np.maximum(1, np.ceil(np.log(size[large] / TINY) / math.log(GAMMA)).astype(np.int64))
    numbers *= np.sign(distinct).astype(np.int64)
    used, place = np.unique(numbers, return_inverse=True)
    sums = np.bincount(place, times).astype(np.int64)
    return Counter(dict(zip(used.tolist(), sums.tolist(), strict=True)))


def _bins_of(numbers: Numbers) -> Counter[int]:
    if numbers.values is None:
        return numbers.bins
    distinct = np.fromiter(numbers.values, np.float64, len(numbers.values))
    return _binned(distinct, np.fromiter(numbers.values.values(), np.int64, len(distinct)))


def _middle(number: int, low: float, high: float) -> float:
    """The value that is within `ACCURACY` of all in a bin."""
    size = 0.0 if number == 0 else TINY * 2 * GAMMA ** abs(number) / (GAMMA + 1)
    return min(max(math.copysign(size, number), low), high)


class Categories:
    """How often each category occurs, and how many there are.

    Exact up to `top` categories. Beyond that the least frequent go: a mergeable Misra-Gries summary (Agarwal et al.,
    PODS 2012), whose counts are short by `error` at most. `distinct`: exact up to `SMALLEST`, then from the smallest
    hashes (Bar-Yossef et al., RANDOM 2002), with a standard error of 3 %.
    """

    def __init__(self, top: int = TOP) -> None:
        self.top, self.count, self.nulls, self.error = top, 0, 0, 0
        self.counts: Counter[str] = Counter()
        self.hashes: np.ndarray = np.zeros(0, np.uint64)

    def add(self, values: Iterable[str | None]) -> None:
        """Categories, one for each occurrence."""
        counts = Counter(values)
        self.nulls += counts.pop(None, 0)
        self.add_counts({name: times for name, times in counts.items() if name is not None})

    def add_counts(self, counts: Mapping[str, int]) -> None:
        """Categories with how often each occurs."""
        new = [name for name in counts if name not in self.counts]
        self.count += sum(counts.values())
        self.counts.update(counts)
        if new:
            digests = b"".join(blake2b(name.encode("utf-8", "replace"), digest_size=8).digest() for name in new)
            self._hashes(np.frombuffer(digests, np.uint64))
        self._shorten()

    def merge(self, other: "Categories") -> None:
        """Take in what another has seen."""
        self.count, self.nulls = self.count + other.count, self.nulls + other.nulls
        self.error += other.error
        self.counts.update(other.counts)
        self._hashes(other.hashes)
        self._shorten()

    def _hashes(self, more: np.ndarray) -> None:
        self.hashes = np.unique(np.concatenate([self.hashes, more]))[:SMALLEST]

    def _shorten(self) -> None:
        if len(self.counts) <= 2 * self.top:  # not every time, so that it costs little
            return
        cut = sorted(self.counts.values(), reverse=True)[self.top]
        self.counts = Counter({name: times - cut for name, times in self.counts.items() if times > cut})
        self.error += cut

    @property
    def distinct(self) -> int:
        """How many different categories there are."""
        if len(self.hashes) < SMALLEST:
            return len(self.hashes)
        if not self.error:
            return len(self.counts)
        return round((SMALLEST - 1) / (float(self.hashes[-1]) / 2**64))

    def ranked(self, count: int | None = None) -> list[tuple[str, int]]:
        """The most frequent, ties by name."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:count]


class Sample:
    """`size` rows drawn at random without knowing how many will come: those whose hash is smallest.

    The same rows for any order and any parts, since a row is drawn by its key and `seed` alone.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.rows: dict[bytes, Any] = {}
        self.last: bytes | None = None  # where the drawn rows end, as far as is known

    def place(self, key: str) -> bytes:
        """Where a row stands in the order of drawing."""
        return blake2b(f"{self.seed}:{key}".encode("utf-8", "replace"), digest_size=10).digest()

    def wants(self, key: str) -> bool:
        """Whether a row could be drawn: what costs something to make is not made for the others."""
        return self.last is None or self.place(key) <= self.last

    def add(self, key: str, row: Any) -> None:
        """A row by its key; equal keys are one row."""
        self.rows[self.place(key)] = row
        if len(self.rows) > 2 * self.size:
            self._cut()

    def merge(self, other: "Sample") -> None:
        """Take in what another has drawn."""
        self.rows |= other.rows
        self._cut()

    def _cut(self) -> None:
        self.rows = {key: self.rows[key] for key in sorted(self.rows)[: self.size]}
        if len(self.rows) == self.size:
            self.last = max(self.rows)

    def drawn(self) -> list[Any]:
        """The sample, in the order of drawing."""
        self._cut()
        return [self.rows[key] for key in sorted(self.rows)]
