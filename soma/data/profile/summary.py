"""One version of a corpus in figures: what `soma data report` shows, as JSON.

`figures` gives `{"name", "documents", "bytes", "chars", "splits", "numbers": {name: number_figures}, "categories":
{name: coverage}, "words", "characters", "labels", "schema", "dropped", "duplicates", "near_duplicates", "anomalies",
"bias"}`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soma.data.profile.anomalies import anomalies
from soma.data.profile.bias import coverage
from soma.data.profile.leaks import exact_duplicates, label_balance, near_duplicates
from soma.data.profile.scan import Options, Summary, scan
from soma.data.profile.schema import Fields, describe, file_drift
from soma.data.profile.sketch import Numbers
from soma.data.signals.measure import Scorer

SHARES = {"p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
BINS = 24
WIDE = 50.0  # where the 99th percentile is this many times the first, bins grow by a ratio
WORDS = 100


def profile(
    name: str,
    source: Sequence[str],
    work: Path,
    options: Options,
    near: bool = True,
    scorer: Scorer | None = None,
) -> tuple[Summary, dict[str, Any]]:
    """Read a version and make its figures; `work` is an empty folder for the parts. `near`: look for near-duplicates,
    too.
    """
    summary, parts = scan(source, work / "parts", options)
    found = figures(name, summary, scorer)
    found["duplicates"] = exact_duplicates(parts)
    if near:
        found["near_duplicates"] = near_duplicates(parts, work / "near", options.workers, options.runner)
    found["anomalies"] = anomalies(parts, summary.sample.drawn())
    return summary, found


def figures(name: str, summary: Summary, scorer: Scorer | None = None) -> dict[str, Any]:
    """The figures that the summary alone gives."""
    fields = Fields()
    for _, one in summary.fields:
        fields.merge(one)
    totals = {key: sum(counts[key] for counts in summary.splits.values()) for key in ("documents", "bytes", "chars")}
    dropped = [{"reason": reason, "count": count} for reason, count in summary.dropped.most_common()]
    examples = [dict(zip(("source", "reason", "detail"), one, strict=True)) for one in summary.dropped_examples.drawn()]
    return {
        "name": name, **totals, "splits": {split: dict(counts) for split, counts in sorted(summary.splits.items())},
        "numbers": {key: number_figures(numbers) for key, numbers in sorted(summary.numbers.items())},
        "categories": {key: coverage(one) for key, one in summary.categories.items() if one.count},
        "words": {"total": summary.words.count, "distinct": summary.words.distinct, "error": summary.words.error,
                  "top": [{"word": word, "count": count} for word, count in summary.words.ranked(WORDS)]},
        "characters": dict(sorted(summary.characters.items(), key=lambda item: (-item[1], item[0]))),
        "labels": label_balance(summary.labels),
        "schema": {"rows": fields.rows, "files": len(summary.fields), "fields": describe(fields),
                   "drift": file_drift(summary.fields), "bad_rows": summary.bad_rows} if fields.rows else None,
        "dropped": dropped, "dropped_examples": examples,
        "bias": summary.bias.report(scorer) if summary.bias is not None else None,
    }  # fmt: skip


def number_figures(numbers: Numbers) -> dict[str, Any]:
    """`{"count", "nulls", "mean", "std", "low", "high", "p01" … "p99", "log", "edges", "counts"}`; counts[i] values
    lie in (edges[i], edges[i+1]], the first edge belongs to the first bin."""
    found: dict[str, Any] = {"count": numbers.count, "nulls": numbers.nulls, "mean": numbers.mean, "std": numbers.std}
    if not numbers.count:
        return found | {"low": None, "high": None, "log": False, "edges": [0.0, 1.0], "counts": [0]}
    found |= {"low": numbers.low, "high": numbers.high}
    found |= dict(zip(SHARES, numbers.quantile(list(SHARES.values())), strict=True))
    log = numbers.low >= 0 and found["p99"] > WIDE * max(found["p01"], 0.2) and found["p99"] > WIDE
    values, times = numbers.steps()
    low, high = numbers.low, numbers.high
    if low == high:
        edges = np.array([low, low + 1])
    elif log:
        start = max(1.0, low)
        edges = np.unique(np.concatenate([[low], np.geomspace(start, max(high, start * 2), BINS)]))
    else:
        edges = np.linspace(low, high, BINS + 1)
    place = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(edges) - 2)
    counts = np.bincount(place, times, len(edges) - 1).astype(np.int64)
    return found | {"log": bool(log), "edges": edges.tolist(), "counts": counts.tolist()}
