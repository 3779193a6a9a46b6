"""Whether version B of a corpus is another than version A: attribute by attribute, with a test and an effect size each.

A verdict (`small`, `medium`, `large`) needs both: the test's p, raised by Holm for all attributes together, below
`LEVEL`, and an effect at a published threshold. The words of size are Cohen's.

* Numbers: Kolmogorov and Smirnov's D (p by its distribution) and the population stability index over A's deciles. PSI
  0.1 is medium and 0.25 large (Siddiqi, Credit Risk Scorecards, 2006). D of two normal distributions that lie d
  deviations apart is 2 Φ(d/2) − 1, so Cohen's d of 0.2, 0.5, 0.8 (Statistical Power Analysis, 1988) is a D of 0.080,
  0.197, 0.311.
* Categories: Cramér's V of the 2 × k table, which is Cohen's w there: 0.1, 0.3, 0.5 (1988), p by chi-square; PSI
  beside it.
* Words: Jensen and Shannon's divergence of the unigram distributions (Lin 1991). Words come in bursts, so the test
  deals whole documents of both samples anew `DEALS` times (Koplenig, 2019, warns of tests over tokens). Its effect is
  the divergence above what dealing makes; no threshold is published: those here lie between what was measured on
  corpora (docs/lab.md).
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from soma.data.profile.leaks import pooled
from soma.data.profile.scan import Summary, word_key
from soma.data.profile.schema import Fields
from soma.data.profile.significance import chi_square, holm, js_divergence, ks, psi
from soma.data.profile.sketch import Categories, Numbers

LEVEL = 0.01
SIZES = ("small", "medium", "large")
PSI_BOUNDS = (None, 0.1, 0.25)
D_BOUNDS = tuple(2 * NormalDist().cdf(d / 2) - 1 for d in (0.2, 0.5, 0.8))
V_BOUNDS = (0.1, 0.3, 0.5)
JS_BOUNDS = (0.01, 0.05, 0.1)  # bits above chance: halves of one corpus at most 0.004, C4 and WikiText 0.13
DEALS = 199
VOCABULARY = 5000
FEWEST = 20  # documents of a side; below it nothing is said
LISTED = 15


def size_of(value: float, bounds: Sequence[float | None]) -> int:
    """How many of the words of size an effect has earned: 0 to 3."""
    return max((place + 1 for place, bound in enumerate(bounds) if bound is not None and value >= bound), default=0)


def drift(a: Summary, b: Summary, seed: int = 0) -> dict[str, Any]:
    """`{"verdict", "attributes": [{name, kind, p, verdict, …}], "words", "fields": {new, missing, changed}, "level"}`.

    `verdict`: the largest of all; `none` where nothing is both significant and large enough; `unknown` where a side
    has fewer than `FEWEST` documents.
    """
    rows = [_number(name, a.numbers[name], b.numbers[name]) for name in sorted(a.numbers.keys() & b.numbers.keys())]
    rows += [_category(name, a.categories[name], b.categories[name]) for name in a.categories if name != "file"]
    rows += [_labels(a, b, field) for field in sorted(a.labels.keys() & b.labels.keys())]
    words = word_drift(a, b, seed)
    judged = [row for row in [*rows, words] if row["p"] is not None]
    for row, raised in zip(judged, holm([row["p"] for row in judged]), strict=True):
        row["p_holm"] = raised
        row["verdict"] = SIZES[row["size"] - 1] if row["size"] and raised < LEVEL else "none"
    few = min(a.documents, b.documents) < FEWEST
    worst = max((SIZES.index(row["verdict"]) for row in judged if row["verdict"] != "none"), default=-1)
    rows.sort(key=lambda row: (-_rank(row), row["kind"], row["name"]))
    return {
        "verdict": "unknown" if few else SIZES[worst] if worst >= 0 else "none", "level": LEVEL, "attributes": rows,
        "words": words, "fields": field_drift(a, b), "documents": [a.documents, b.documents],
    }  # fmt: skip


def _rank(row: dict[str, Any]) -> float:
    verdict = row["verdict"]
    return (SIZES.index(verdict) + 1 if verdict in SIZES else 0) + min(row.get("effect") or 0.0, 0.99)


def _unknown(name: str, kind: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "p": None, "p_holm": None, "size": 0, "verdict": "unknown", "effect": None}


def _number(name: str, a: Numbers, b: Numbers) -> dict[str, Any]:
    row = _unknown(name, "number")
    if min(a.count, b.count) < FEWEST:
        return row
    steps = a.steps(), b.steps()
    distance, p = ks(*steps)
    edges = np.unique(a.quantile([share / 10 for share in range(1, 10)]))
    counts = [
        np.bincount(np.searchsorted(edges, values), times, len(edges) + 1) for values, times in steps
    ]  # bin k holds what is above edge k − 1, up to edge k
    index, p_psi = psi(counts[0].tolist(), counts[1].tolist())
    size = size_of(distance, D_BOUNDS)
    if p_psi < LEVEL:
        size = max(size, size_of(index, PSI_BOUNDS))
    return row | {
        "p": p, "effect": distance, "size": size, "ks": distance, "psi": index, "psi_p": p_psi,
        "mean": [a.mean, b.mean], "median": [*a.quantile([0.5]), *b.quantile([0.5])],
    }  # fmt: skip


def _category(name: str, a: Categories, b: Categories, kind: str = "category") -> dict[str, Any]:
    row = _unknown(name, kind)
    if min(a.count, b.count) < FEWEST:
        return row
    left, right, names = pooled(a, b)
    v, p = chi_square(left, right)
    index, p_psi = psi(left, right)
    shares = [np.array(side, np.float64) / max(1, sum(side)) for side in (left, right)]
    order = np.argsort(-np.abs(shares[1] - shares[0]), kind="stable")[:LISTED]
    changed = [{"name": names[i], "a": float(shares[0][i]), "b": float(shares[1][i])} for i in order.tolist()]
    return row | {
        "p": p, "effect": v, "size": size_of(v, V_BOUNDS), "v": v, "psi": index, "psi_p": p_psi, "changed": changed,
        "new": [name for name, _ in b.ranked() if not a.counts[name]][:LISTED],
        "missing": [name for name, _ in a.ranked() if not b.counts[name]][:LISTED],
    }  # fmt: skip


def _labels(a: Summary, b: Summary, field: str) -> dict[str, Any]:
    sides = []
    for summary in (a, b):
        together = Categories()
        for counts in summary.labels[field].values():
            together.merge(counts)
        sides.append(together)
    return _category(f"label {field}", sides[0], sides[1], kind="label")


# --- Words ---


def word_drift(a: Summary, b: Summary, seed: int = 0) -> dict[str, Any]:
    """The unigram distributions: `js` in bits over all words of both, `chance`: its mean over the dealt samples,
    `changed`: the words that make most of it, `new` and `missing` ones."""
    row = _unknown("words", "words")
    left, right = a.words, b.words
    names = sorted({*left.counts, *right.counts})
    if min(a.documents, b.documents) < FEWEST or not names:
        return row | {"js": None, "changed": [], "new": [], "missing": []}
    counts = np.array([[side.counts[name] for name in names] for side in (left, right)], np.float64)
    whole = float(js_divergence(counts[0], counts[1]))
    p, chance, seen = _dealt(a, b, names, counts, seed)
    excess = max(0.0, seen - chance)
    shares = counts / counts.sum(1, keepdims=True)
    middle = shares.mean(0)
    parts = sum(np.where(s > 0, s * np.log2(np.where(s > 0, s, 1) / middle), 0) for s in shares) / 2
    order = np.argsort(-parts, kind="stable")[:LISTED]
    changed = [{"name": names[i], "a": float(shares[0][i]), "b": float(shares[1][i])} for i in order.tolist()]
    return row | {
        "p": p, "effect": excess, "size": size_of(excess, JS_BOUNDS), "js": whole, "sample_js": seen, "chance": chance,
        "changed": changed,
        "new": [name for name, _ in right.ranked() if not left.counts[name]][:LISTED],
        "missing": [name for name, _ in left.ranked() if not right.counts[name]][:LISTED],
    }  # fmt: skip


def _dealt(a: Summary, b: Summary, names: list[str], counts: np.ndarray, seed: int) -> tuple[float, float, float]:
    """(p, mean divergence of documents dealt at random, that of the samples) over the most frequent words of both.

    The samples are taken equally large, since the divergence of unequal ones is larger by chance.
    """
    top = np.argsort(-(counts / counts.sum(1, keepdims=True)).sum(0), kind="stable")[:VOCABULARY]
    keys = np.array([word_key(names[i]) for i in top.tolist()], np.uint64)
    order = np.argsort(keys)
    samples = [summary.sample.drawn() for summary in (a, b)]
    count = min(map(len, samples))
    bags = [row["words"] for sample in samples for row in sample[:count]]
    rows, columns, times = [], [], []
    for number, (hashes, occurrences) in enumerate(bags):
        place = np.minimum(np.searchsorted(keys[order], hashes), len(keys) - 1)
        known = keys[order][place] == hashes
        rows.append(np.full(known.sum(), number))
        columns.append(order[place[known]])
        times.append(occurrences[known])
    row_K, column_K, time_K = (np.concatenate(parts) for parts in (rows, columns, times))
    everything = np.bincount(column_K, time_K, len(keys))
    generator = np.random.default_rng(seed)
    found = []
    for deal in range(DEALS + 1):
        side = np.zeros(2 * count, bool)
        side[generator.permutation(2 * count)[:count] if deal else slice(count)] = True
        chosen = side[row_K]
        mine = np.bincount(column_K[chosen], time_K[chosen], len(keys))
        found.append(float(js_divergence(mine, everything - mine)))
    seen, dealt = found[0], np.array(found[1:])
    # The tail of a normal distribution: counting dealt samples gives no p below 1 / DEALS, too coarse for many tests.
    far = (seen - float(dealt.mean())) / max(float(dealt.std()), 1e-12)
    return min(1.0, 0.5 * math.erfc(far / math.sqrt(2))), float(dealt.mean()), seen


# --- Fields ---


def field_drift(a: Summary, b: Summary) -> dict[str, Any]:
    """Fields that came, went, or changed their types."""
    sides = []
    for summary in (a, b):
        together = Fields()
        for _, fields in summary.fields:
            together.merge(fields)
        sides.append(together)
    if not (sides[0].rows and sides[1].rows):
        return {"new": [], "missing": [], "changed": []}
    left, right = (side.types for side in sides)
    changed = []
    for path in sorted(left.keys() & right.keys()):
        before, after = set(left[path]), set(right[path])
        if before != after:
            changed.append({"path": path, "a": sorted(before), "b": sorted(after)})
    return {
        "new": sorted(right.keys() - left.keys()),
        "missing": sorted(left.keys() - right.keys()),
        "changed": changed,
    }
