"""The page of a sweep: the search over time, each setting against the objective, the winner against the recipe."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soma.base.artefact import write_text
from soma.base.axes import esc, number
from soma.base.charts import Series, line_chart, percentile_strip
from soma.base.page import HALF, page_style
from soma.sweep.space import Range, Space

if TYPE_CHECKING:
    from soma.sweep.search import Outcome

CURVES, NAMED = 24, 5  # learning curves that are drawn, the best ones, and how many of them are told apart


def write_page(path: Path, name: str, objective: str, space: Space, outcome: "Outcome") -> None:
    """One self-contained HTML file."""
    parts = [
        f"<p class='mark'>Soma <span>sweep</span></p><h1>{esc(name)}</h1>",
        *(f"<p>{esc(line)}</p>" for line in outcome.headline()[:-1]),
        _section("The search", [history(outcome.trials, objective), curves(outcome.trials)]),
        _section("Settings", [setting(key, space, outcome.trials, objective) for key in space]),
        _section("The winner", [seeds(outcome.seeds, objective)] if outcome.verdict else []),
        _section("Trials", [table(outcome.trials, list(space), objective)]),
    ]
    write_text(path, PAGE.format(title=esc(name), style=page_style(), body="\n".join(parts)))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>{title} · Soma sweep</title>
<style>{style}</style></head><body>
{body}
</body></html>
"""


def _section(title: str, parts: Sequence[str]) -> str:
    shown = "".join(f"<div>{part}</div>" for part in parts if part)
    return f"<section><h2>{title}</h2><div class='charts'>{shown}</div></section>" if shown else ""


def history(trials: Sequence[dict[str, Any]], objective: str) -> str:
    """Each trial's figure, and the best so far."""
    ended = [trial for trial in trials if trial["value"] is not None]
    best: list[float] = []
    for trial in ended:
        best.append(min([*best[-1:], trial["value"]]))
    numbers = [float(trial["number"]) for trial in ended]
    return line_chart(
        [_dots("trial", numbers, [trial["value"] for trial in ended]), Series("best so far", numbers, best)],
        title="Best figure over the trials", x_label="trial", y_label=objective, width=HALF, height=300,
    )  # fmt: skip


def curves(trials: Sequence[dict[str, Any]]) -> str:
    """Held-out loss over the steps, also of trials that were stopped early."""
    drawn = sorted((trial for trial in trials if len(trial["curve"]) > 1), key=lambda one: one["curve"][-1][1])[:CURVES]
    lines = [
        Series(f"trial {one['number']}", [step for step, _ in one["curve"]], [loss for _, loss in one["curve"]],
               muted=place >= NAMED)
        for place, one in enumerate(drawn)
    ]  # fmt: skip
    if not lines:
        return ""
    lines.reverse()  # the best in front
    return line_chart(lines, title="Held-out loss over the steps", x_label="step", width=HALF, height=300)


def setting(key: str, space: Space, trials: Sequence[dict[str, Any]], objective: str) -> str:
    """The objective against one setting: points over a range, a strip for each choice."""
    values = space[key]
    ended = [trial for trial in trials if trial["value"] is not None and key in trial["values"]]
    if not isinstance(values, Range):
        strips = [
            (str(one), [trial["value"] for trial in ended if trial["values"][key] == one]) for one in values.values
        ]
        return percentile_strip(
            [strip for strip in strips if strip[1]], title=key, x_label=objective, width=HALF, zero=False
        )
    points = _dots(key, [float(trial["values"][key]) for trial in ended], [trial["value"] for trial in ended])
    return line_chart(
        [points], title=key, x_label=key, y_label=objective, width=HALF, height=260, log_x=values.log
    )  # fmt: skip


def seeds(figures: dict[str, list[float]], objective: str) -> str:
    """The recipe as written and the winner over other seeds."""
    return percentile_strip(list(figures.items()), title="With other seeds", x_label=objective, width=HALF, zero=False)


def _dots(name: str, xs: Sequence[float], ys: Sequence[float]) -> Series:
    """Points without a line: a gap after each."""
    return Series(name, [x for one in xs for x in (one, one)], [y for one in ys for y in (one, None)])


def table(trials: Sequence[dict[str, Any]], keys: Sequence[str], objective: str) -> str:
    """Every trial, the best first."""
    head = "".join(f"<th>{esc(name)}</th>" for name in ("trial", "state", objective, *keys))
    worst = float("inf")
    rows = []
    for trial in sorted(trials, key=lambda one: worst if one["value"] is None else one["value"]):
        values = (_cell(trial["values"].get(key)) for key in keys)
        state = trial["state"] + (f": {trial['error']}" if trial["error"] else "")
        cells = [number(trial["value"], 5), *values]
        row = "".join(f"<td>{esc(cell)}</td>" for cell in (state, *cells))
        rows.append(f"<tr><th>{trial['number']}</th>{row}</tr>")
    return f"<div class='table'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _cell(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else json.dumps(value)
