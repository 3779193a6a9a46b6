"""The page of `soma data report`: one self-contained HTML file, drawn from the figures of one or two versions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from soma.base.artefact import write_text
from soma.base.axes import number, percent
from soma.base.charts import Series, bar_chart, histogram, line_chart, share_bar
from soma.base.page import HALF, page_environment, page_style, responsive

Json = dict[str, Any]
# What attributes are called on the page; the others as they are, with spaces.
NAMES = {
    "chars": "Characters", "bytes": "Bytes", "lines": "Lines", "words": "Words", "distinct_words": "Distinct words",
    "plain_words": "Words that are more than symbols", "mean_word_chars": "Mean length of a word",
    "alpha_words": "Share of words with a letter", "stop_words": "Stop words that occur (of 8)",
    "language_probability": "Certainty of the language",
}  # fmt: skip
GROUPS = {
    "language": "Languages",
    "domain": "Domains",
    "script": "Scripts",
    "kind": "Kinds of document",
    "file": "Files",
}
SHOWN = 12


def write_page(path: Path, report: Json) -> None:
    """Write the report of `soma.data.profile.report` as a page."""
    write_text(path, render(report))


def render(report: Json) -> str:
    """The page as HTML. Everything from the data is escaped; nothing is loaded from elsewhere."""
    environment = page_environment("soma.data.profile")
    environment.filters |= {"title": title, "between": between, "signed": signed, "p": p_value}
    sides = [report["a"], *([report["b"]] if report.get("b") else [])]
    return environment.get_template("page.html.jinja").render(
        report=report, sides=sides, a=sides[0], b=sides[1] if len(sides) > 1 else None, style=page_style(),
        overview=[side_charts(side) for side in sides], numbers=number_charts(sides), groups=group_charts(sides),
        tones=[tone_charts(side) for side in sides], labels=[label_charts(side) for side in sides],
        drift=drift_charts(report.get("drift")),
    )  # fmt: skip


def title(name: str) -> str:
    """`distinct_words` → `Distinct words`."""
    return NAMES.get(name, name.replace("_", " ").capitalize())


def between(interval: Sequence[float] | None, digits: int = 3) -> str:
    """`0.12 to 0.18`, or a dash."""
    return f"{number(interval[0], digits)} to {number(interval[1], digits)}" if interval else "–"


def signed(value: float | None) -> str:
    """A number with its sign."""
    return "–" if value is None else f"{'+' if value > 0 else '−' if value < 0 else ''}{number(abs(value))}"


def p_value(value: float | None) -> str:
    """`< 0.0001` below that."""
    return "–" if value is None else "< 0.0001" if value < 1e-4 else number(value, 2)


def side_charts(side: Json) -> list[Markup]:
    """Splits and characters of a version."""
    splits = [(name, counts["documents"]) for name, counts in side["splits"].items()]
    characters = [(name.replace("_", " "), count) for name, count in side["characters"].items()]
    charts: list[Callable[[int], str]] = [lambda width: share_bar(characters, title="Characters", width=width)]
    if len(splits) > 1:
        charts.insert(0, lambda width: share_bar(splits, title="Documents by split", width=width))
    return [responsive(draw, HALF) for draw in charts]


def number_charts(sides: Sequence[Json]) -> list[tuple[str, Markup, list[Json]]]:
    """(name, chart, figures of each version) of every attribute that varies: lengths first."""
    found = []
    names = sorted(
        sides[0]["numbers"], key=lambda name: (list(NAMES).index(name) if name in NAMES else len(NAMES), name)
    )
    for name in names:
        facts = [side["numbers"][name] for side in sides if name in side["numbers"]]
        if any(one["count"] and one["low"] != one["high"] for one in facts):
            draw = _histogram(name, facts[0]) if len(facts) == 1 else _cumulative(name, sides)
            found.append((name, responsive(draw, HALF), facts))
    return found


def _histogram(name: str, facts: Json) -> Callable[[int], str]:
    log = facts["log"]
    return lambda width: histogram(
        facts["edges"], facts["counts"], title=title(name), width=width, log_x=log, marks=[("median", facts["p50"])]
    )


def _cumulative(name: str, sides: Sequence[Json]) -> Callable[[int], str]:
    """The share of documents at or below a value, of both versions."""
    facts = [(side["name"], side["numbers"][name]) for side in sides if side["numbers"].get(name, {}).get("count")]
    top = max(one["high"] for _, one in facts)
    lines = [Series(side, *cumulative(one, top)) for side, one in facts]
    log = any(one["log"] for _, one in facts)
    return lambda width: line_chart(
        lines, title=title(name), y_label="share of documents at or below", width=width, height=240, log_x=log,
        zero=True, format_y=percent,
    )  # fmt: skip


def cumulative(facts: Json, top: float) -> tuple[list[float], list[float]]:
    """(values, share of documents at or below each) up to `top`; a single value is a step, not a slope."""
    if facts["low"] == facts["high"]:
        return [facts["low"], facts["low"], top], [0.0, 1.0, 1.0]
    total, below, ys = max(1, sum(facts["counts"])), 0, [0.0]
    for count in facts["counts"]:
        below += count
        ys.append(below / total)
    return [*facts["edges"], top], [*ys, 1.0]


def group_charts(sides: Sequence[Json]) -> list[tuple[str, list[Markup]]]:
    """(name, a chart of each version) of the categories."""
    found = []
    for name, words in GROUPS.items():
        charts = []
        for side in sides:
            facts = side["categories"].get(name)
            if facts and facts["top"] and (facts["distinct"] > 1 or name in ("language", "script")):
                charts.append(responsive(_bars(facts, words if len(sides) == 1 else f"{words}, {side['name']}"), HALF))
        if charts:
            found.append((name, charts))
    return found


def _bars(facts: Json, words: str) -> Callable[[int], str]:
    items = [(one["name"], one["share"]) for one in facts["top"][:SHOWN]]
    note = f"{facts['distinct']:,} in all, as many as {number(facts['effective'])} of one size"
    return lambda width: bar_chart(items, title=words, width=width, format_value=percent, note=note)


def tone_charts(side: Json) -> dict[str, Markup]:
    """Share of documents that mention each group, by axis."""
    found = {}
    for axis in (side.get("bias") or {}).get("axes", []):
        items = [(one["group"], one["share"]) for one in axis["groups"]]
        if items:
            found[axis["axis"]] = responsive(_share_bars(items), HALF)
    return found


def _share_bars(items: Sequence[tuple[str, float | None]]) -> Callable[[int], str]:
    return lambda width: bar_chart(items, title="Documents that mention them", width=width, format_value=percent)


def label_charts(side: Json) -> dict[str, Markup]:
    """Labels of each field by share."""
    return {
        one["field"]: responsive(_label_bars([(row["label"], row["share"]) for row in one["labels"][:SHOWN]]), HALF)
        for one in side["labels"]
    }


def _label_bars(items: Sequence[tuple[str, float | None]]) -> Callable[[int], str]:
    return lambda width: bar_chart(items, title="Share of documents", width=width, format_value=percent)


def drift_charts(drift: Json | None) -> list[Markup]:
    """The effect of each attribute that was judged."""
    if not drift:
        return []
    rows = [(title(row["name"]), row["effect"]) for row in drift["attributes"] if row.get("effect") is not None]
    named = [title(row["name"]) for row in drift["attributes"] if row["verdict"] not in ("none", "unknown")]
    rows = sorted(rows, key=lambda item: -(item[1] or 0))[:20]
    return [
        responsive(
            lambda width: bar_chart(
                rows, title="Effect by attribute (D of numbers, V of categories)", width=width,
                highlight=named or ["no attribute"],
            )
        )
    ]  # fmt: skip
