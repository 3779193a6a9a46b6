"""Tests and effect sizes for two samples, in closed form: no library of statistics is needed.

A test says whether a difference is more than chance; with enough documents everything is. An effect size says whether
it matters; with few documents chance alone makes a large one. A verdict needs both (`soma.data.profile.drift`).
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

NORMAL = NormalDist()


def chi2_tail(x: float, freedom: int) -> float:
    """P(X ≥ x) for a chi-square variable with `freedom` degrees of freedom (Abramowitz and Stegun 26.4.4, 26.4.5).

    `chi2_tail(3.841, 1)` is 0.05.
    """
    if x <= 0 or freedom < 1:
        return 1.0
    half = x / 2
    # Σ half^s e^-half / Γ(s+1) over s = 0, 1, … (even) or 1/2, 3/2, … (odd), the latter with erfc(√half).
    start = 0.0 if freedom % 2 == 0 else 0.5
    terms = [(start + k) * math.log(half) - half - math.lgamma(start + k + 1) for k in range(freedom // 2)]
    total = sum(math.exp(term) for term in terms if term > -745)
    return min(1.0, total + (math.erfc(math.sqrt(half)) if freedom % 2 else 0.0))


def chi2_quantile(share: float, freedom: int) -> float:
    """The value that a share of a chi-square variable lies below. `chi2_quantile(0.95, 1)` is 3.841."""
    low, high = 0.0, 10.0 * freedom + 100
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - chi2_tail(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def kolmogorov_tail(x: float) -> float:
    """P(K ≥ x) for Kolmogorov's distribution: 2 Σ (−1)^(k−1) exp(−2 k² x²) (Smirnov 1948). At 1.358 it is 0.05."""
    if x < 0.2:  # below it the value differs from 1 by less than 1e-12
        return 1.0
    total = sum((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * total))


def ks(left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """Kolmogorov and Smirnov's (D, p) of two samples given as (values ascending, how often each).

    p by the asymptotic distribution with Stephens' correction (J. R. Statist. Soc. B 32, 1970); ties make it too large.
    """
    grid = np.union1d(left[0], right[0])
    shares = []
    for values, times in (left, right):
        ends = np.concatenate([[0], np.cumsum(times)])
        shares.append(ends[np.searchsorted(values, grid, side="right")] / ends[-1])
    distance = float(np.abs(shares[0] - shares[1]).max())
    count = math.sqrt(left[1].sum() * right[1].sum() / (left[1].sum() + right[1].sum()))
    return distance, kolmogorov_tail((count + 0.12 + 0.11 / count) * distance)


def psi(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """(population stability index, p) of two samples counted in the same bins: Σ (q − p) ln(q / p).

    Half a document is added to each bin, so that an empty one costs a finite amount. Without a difference PSI /
    (1/n + 1/m) is about chi-square with bins − 1 degrees of freedom (Yurdakul and Naranjo, J. Risk Model Validation
    14(3), 2020). Bins 50/50 and 60/40 of 1000: 0.0404.
    """
    counts = [np.asarray(side, np.float64) + 0.5 for side in (left, right)]
    shares = [side / side.sum() for side in counts]
    value = float(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum())
    scale = 1 / max(1.0, float(np.sum(left))) + 1 / max(1.0, float(np.sum(right)))
    return value, chi2_tail(value / scale, len(counts[0]) - 1)


def chi_square(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """(Cramér's V, p) of a 2 × k table: V = √(χ² / N). 10 and 20 of 100: χ² 3.922, V 0.140, p 0.0477."""
    table = np.array([left, right], np.float64)
    table = table[:, table.sum(0) > 0]
    total = table.sum()
    if table.shape[1] < 2 or not table.sum(1).all():
        return 0.0, 1.0
    expected = np.outer(table.sum(1), table.sum(0)) / total
    value = float(((table - expected) ** 2 / expected).sum())
    return math.sqrt(value / total), chi2_tail(value, table.shape[1] - 1)


def js_divergence(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Jensen and Shannon's divergence in bits between counts over the last axis, 0 to 1 (Lin 1991)."""
    shares = [side / np.maximum(side.sum(-1, keepdims=True), 1) for side in (left, right)]
    middle = (shares[0] + shares[1]) / 2

    def bits(share: np.ndarray) -> np.ndarray:
        part = np.divide(share, middle, out=np.ones_like(share), where=share > 0)
        return np.asarray((share * np.log2(part)).sum(-1))

    return (bits(shares[0]) + bits(shares[1])) / 2


def holm(values: Sequence[float]) -> list[float]:
    """p-values raised so that each may be held against one level for all of them (Holm 1979). Of 0.01, 0.04: 0.02,
    0.04.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    raised, highest = [1.0] * len(values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - place) * values[index]))
        raised[index] = highest
    return raised


def wilson(hits: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share (Wilson 1927). 10 of 100: 0.0552 to 0.1744. Without any, 0 to 1."""
    if not count:
        return 0.0, 1.0
    z = NORMAL.inv_cdf((1 + level) / 2)
    share, weight = hits / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / weight
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / weight
    return max(0.0, middle - half), min(1.0, middle + half)
