"""The mix of speech acts in a corpus beside the mix of the traffic it is meant for, and what is missing.

A report: {acts, model, corpus, traffic, compared, missing}. `corpus` and `traffic`: {name, rows, sentences, speakers:
{role: {act: count}}, shares: {act: {count, share, interval}}, examples: {act: [sentence]}}; shares are of the speakers
that are `compared` (`user` where both sides have users, else all). `missing`: acts that the traffic has and the corpus
lacks, the largest gap first, each with examples of the traffic and how many sentences would close the gap.
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from soma.base import progress
from soma.base.artefact import write_text
from soma.base.axes import percent
from soma.base.charts import bar_chart
from soma.base.page import HALF, page_environment, page_style, responsive
from soma.data.acts.acts import ACTS, LEARNED, MEANING, ActScorer, Dialogue
from soma.data.acts.rules import ruled

EXAMPLES = 5
AT_ONCE = 256  # rows that the model is given together
GAP = 0.02  # of the sentences: a smaller difference is none that data would be collected for
Z95 = 1.959964


def tell(rows: Iterable[Dialogue], scorer: ActScorer) -> Iterator[list[tuple[str, float]]]:
    """(act, probability) of every sentence of every row: what a rule says (probability 1), else the model's best."""
    stream = iter(rows)
    while chunk := list(islice(stream, AT_ONCE)):
        for dialogue, scores in zip(chunk, scorer.probabilities(chunk), strict=True):
            found = []
            for turn, row in zip(dialogue, scores, strict=True):
                act = ruled(turn.text)
                best = int(row.argmax())
                found.append((act, 1.0) if act else (LEARNED[best], float(row[best])))
            yield found


class Mix:
    """Counts and examples of one side."""

    def __init__(self, name: str) -> None:
        self.name, self.rows = name, 0
        self.speakers: dict[str, Counter[str]] = defaultdict(Counter)
        self.best: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)

    def add(self, dialogue: Dialogue, acts: Sequence[tuple[str, float]]) -> None:
        """Count a row."""
        self.rows += 1
        for turn, (act, sure) in zip(dialogue, acts, strict=True):
            self.speakers[turn.speaker][act] += 1
            found = self.best[turn.speaker, act]
            entry = (sure, turn.text[:300])
            if all(text != entry[1] for _, text in found):  # one text may come with several probabilities
                (heapq.heappush if len(found) < EXAMPLES else heapq.heappushpop)(found, entry)

    def figures(self, compared: str) -> dict[str, Any]:
        """This side of the report."""
        own = [speaker for speaker in self.speakers if compared in ("all", speaker)]
        counts: Counter[str] = sum((self.speakers[speaker] for speaker in own), Counter())
        total = counts.total()
        examples = {
            act: [text for _, text in heapq.nlargest(EXAMPLES, {e for who in own for e in self.best[who, act]})]
            for act in ACTS
        }
        return {
            "name": self.name, "rows": self.rows, "sentences": sum(c.total() for c in self.speakers.values()),
            "speakers": {speaker: {act: c[act] for act in ACTS} for speaker, c in sorted(self.speakers.items())},
            "shares": {
                act: {"count": n, "share": n / max(1, total), "interval": wilson(n, total)}
                for act, n in ((act, counts[act]) for act in ACTS)
            },
            "examples": examples,
        }  # fmt: skip


def count(name: str, rows: Iterable[Dialogue], scorer: ActScorer) -> Mix:
    """The mix of rows."""
    mix = Mix(name)
    kept: list[Dialogue] = []

    def passing() -> Iterator[Dialogue]:
        for row in rows:
            kept.append(row)
            yield row

    with progress.current().task(f"acts of {name}", unit="rows") as task:
        for acts in tell(passing(), scorer):
            mix.add(kept.pop(0), acts)
            task.advance(1)
    return mix


def compare(corpus: Mix, traffic: Mix | None, model: str) -> dict[str, Any]:
    """The report."""
    sides = [corpus, *([traffic] if traffic else [])]
    compared = "user" if all("user" in side.speakers for side in sides) else "all"
    ours = corpus.figures(compared)
    theirs = traffic.figures(compared) if traffic else None
    return {
        "acts": MEANING, "model": model, "compared": compared, "corpus": ours, "traffic": theirs,
        "missing": missing(ours, theirs) if theirs else [],
    }  # fmt: skip


def missing(corpus: Mapping[str, Any], traffic: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Acts whose share in the traffic is larger by GAP or more, with intervals that do not meet.

    `needed`: sentences of the act to add so that shares are equal: (t·n - c) / (1 - t) for c of n in the corpus and a
    share t of the traffic. 10 of 100 against a share of 0.25: (25 - 10) / 0.75 = 20.
    """
    found = []
    total = sum(one["count"] for one in corpus["shares"].values())
    for act in ACTS:
        ours, theirs = corpus["shares"][act], traffic["shares"][act]
        gap = theirs["share"] - ours["share"]
        if gap >= GAP and theirs["interval"][0] > ours["interval"][1]:
            needed = math.ceil(round((theirs["share"] * total - ours["count"]) / max(1e-9, 1 - theirs["share"]), 6))
            found.append(
                {
                    "act": act, "corpus": ours["share"], "traffic": theirs["share"], "gap": gap, "needed": needed,
                    "examples": traffic["examples"][act],
                }
            )  # fmt: skip
    return sorted(found, key=lambda one: -one["gap"])


def wilson(count: int, total: int) -> list[float]:
    """95 % interval of a share (Wilson 1927), as if sentences were independent. 10 of 100: 0.0552 to 0.1744."""
    if not total:
        return [0.0, 1.0]
    share, square = count / total, Z95**2 / total
    middle, half = share + square / 2, Z95 * math.sqrt(share * (1 - share) / total + square / total / 4)
    return [max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))]


# --- For people ---


def shown(report: Mapping[str, Any]) -> list[str]:
    """The report for the screen."""
    sides = [report["corpus"], *([report["traffic"]] if report["traffic"] else [])]
    whose = "sentences of users" if report["compared"] == "user" else "sentences"
    lines = [f"{side['name']}: {side['rows']:,} rows, {side['sentences']:,} sentences" for side in sides]
    lines += ["", f"{'share of ' + whose:<28}" + "".join(f"{side['name'][-16:]:>18}" for side in sides)]
    lines += [f"{act:<28}" + "".join(f"{percent(side['shares'][act]['share']):>18}" for side in sides) for act in ACTS]
    if report["traffic"]:
        lines += ["", "missing in the corpus:" if report["missing"] else "nothing of the traffic is missing"]
    for one in report["missing"]:
        lines.append(
            f"  {one['act']}: {percent(one['corpus'])} of {percent(one['traffic'])}, {one['needed']:,} sentences"
        )
        lines += [f"      {text[:100]}" for text in one["examples"][:3]]
    return lines


def write_page(path: Path, report: Mapping[str, Any]) -> None:
    """The report as one HTML file. Everything from the data is escaped; nothing is loaded from elsewhere."""
    sides = [report["corpus"], *([report["traffic"]] if report["traffic"] else [])]
    charts = [
        responsive(
            lambda width, side=side: bar_chart(  # type: ignore[misc]
                [(act, side["shares"][act]["share"]) for act in ACTS], title=side["name"], width=width,
                format_value=percent, highlight=[one["act"] for one in report["missing"]],
            ),
            HALF,
        )
        for side in sides
    ]  # fmt: skip
    template = page_environment("soma.data.acts").get_template("page.html.jinja")
    write_text(path, template.render(report=report, sides=sides, charts=charts, style=page_style(), acts=ACTS))
