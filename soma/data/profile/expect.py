"""A corpus held against a recipe's expectations: what passed is written down, what did not stops the run."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from soma.base.artefact import read_json, write_json
from soma.base.axes import number
from soma.base.errors import UserError
from soma.data.expect import SHARES, Bounds, signals_needed
from soma.data.profile.anomalies import anomalies
from soma.data.profile.counts import excerpt
from soma.data.profile.scan import Options, Summary, scan
from soma.data.profile.summary import number_figures
from soma.data.signals.config import Signal

EXAMPLES = 3
SHOWN_CHARS = 100


def check_expectations(expect: Mapping[str, Bounds], corpus: Path, out: Path, work: Path) -> None:
    """Write `expectations.json` into `out`: `{"documents", "expectations": [{name, value, low, high, met}]}`.

    Raises UserError with the value, the bound and examples of every one that is not met; nothing is written then.
    """
    # The work folder may hold what a killed run left; parts are small beside the corpus, so they are made again.
    signals = tuple(cast("list[Signal]", signals_needed(expect)))
    summary, parts = scan([str(corpus)], work, Options(signals=signals, bias=False))
    report = read_json(corpus / "report.json")
    unusual = anomalies(parts, summary.sample.drawn()) if "anomalies" in expect else None
    rows, broken = [], []
    for name, (low, high) in expect.items():
        value = figure(name, summary, report, unusual)
        met = (low is None or value >= low) and (high is None or value <= high)
        rows.append({"name": name, "value": value, "low": low, "high": high, "met": met})
        if not met:
            below = low is not None and value < low
            shown = _examples(name, below, summary, report, unusual)
            broken.append(f"  {name} is {number(value, 4)}, expected {_range(low, high)}{shown}")
    if broken:
        raise UserError(
            f"data.expect: {len(broken)} of {len(rows)} expectations are not met\n" + "\n".join(broken) + "\n"
            "Change the data, or the bounds: the corpus is kept, and only what comes after it runs again"
        )
    write_json(out / "expectations.json", {"documents": summary.documents, "expectations": rows})


def _range(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"at least {number(low, 4)}" if high is None else f"at most {number(high, 4)}"
    return f"{number(low, 4)} to {number(high, 4)}"


def figure(name: str, summary: Summary, report: dict[str, Any], unusual: dict[str, Any] | None) -> float:
    """A figure by its name in a recipe (`soma.data.expect`). `report`: the corpus's `report.json`."""
    first, _, rest = name.partition(".")
    if first == "attributes":
        attribute, statistic = rest.split(".")
        return float(number_figures(summary.numbers[attribute])[statistic])
    if first == "characters":
        return summary.characters[rest] / max(1, sum(summary.characters.values()))
    if first in SHARES:
        return summary.categories[SHARES[first]].counts[rest] / summary.documents
    steps = {step["step"]: step["documents"] for step in report["steps"]}
    order = [step["step"] for step in report["steps"]]

    def lost(step: str) -> float:
        """The share of the documents before a step that it took away."""
        before = steps[order[order.index(step) - 1]] if step in steps else 0
        return 1 - steps[step] / before if before else 0.0

    lengths = summary.numbers["chars"]
    figures: dict[str, Callable[[], float]] = {
        "documents": lambda: summary.documents, "bytes": lambda: summary.numbers["bytes"].mean * summary.documents,
        "chars": lambda: lengths.mean * lengths.count,
        "words": lambda: summary.numbers["words"].mean * summary.documents, "mean_length": lambda: lengths.mean,
        "median_length": lambda: lengths.quantile([0.5])[0], "duplicates": lambda: lost("exact"),
        "near_duplicates": lambda: lost("near"),
        "dropped": lambda: max(0.0, 1 - summary.documents / max(1, steps["read"])),
        "validation": lambda: summary.splits.get("validation", Counter())["documents"] / summary.documents,
        "anomalies": lambda: (unusual or {})["above"] / summary.documents,
        "dominant_file": lambda: max(summary.categories["file"].counts.values()) / summary.documents,
    }  # fmt: skip
    return round(float(figures[name]()), 12)


def _examples(name: str, below: bool, summary: Summary, report: dict[str, Any], unusual: dict[str, Any] | None) -> str:
    """Documents that show why a figure is as it is, one a line."""
    first, _, rest = name.partition(".")
    if name in ("duplicates", "near_duplicates", "dropped"):
        words = {"duplicates": ["exact_duplicate"], "near_duplicates": ["near_duplicate"]}.get(name)
        found = [
            (f"{example['source']} ({one['reason']} {example['detail']})", example["excerpt"])
            for one in report["dropped"] if words is None or one["reason"] in words
            for example in one["examples"]
        ]  # fmt: skip
    elif name == "anomalies":
        found = [
            (f"{one['source']} (distance {number(one['score'])})", one["excerpt"])
            for one in (unusual or {})["examples"]
        ]
    else:
        found = [
            (f"{row['source']}{_note(first, rest, row)}", row["excerpt"])
            for row in _ranked(first, rest, below, summary.sample.drawn())
        ]
    lines = [f"    {where}: {' '.join(excerpt(text).split())[:SHOWN_CHARS]}" for where, text in found[:EXAMPLES]]
    return "".join(f"\n{line}" for line in lines)


def _ranked(first: str, rest: str, below: bool, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sampled documents that do most to bring the figure where it is."""
    if first in SHARES and first != "characters":
        group = SHARES[first]
        return [row for row in rows if (row["groups"].get(group) != rest) == below]
    lengths = ("mean_length", "median_length")
    attribute = rest.split(".")[0] if first == "attributes" else "chars" if first in lengths else ""
    if not attribute:
        return []
    return sorted(rows, key=lambda row: row["values"][attribute] * (1 if below else -1))


def _note(first: str, rest: str, row: dict[str, Any]) -> str:
    if first in SHARES and first != "characters":
        return f" ({row['groups'].get(SHARES[first]) or 'unknown'})"
    attribute = rest.split(".")[0] if first == "attributes" else "chars"
    return f" ({number(row['values'][attribute])})"
