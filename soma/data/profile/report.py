"""`soma data report A [B]`: the profile of one version, or of two and what drifted between them."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soma.data.profile.drift import drift
from soma.data.profile.scan import Options
from soma.data.profile.summary import profile
from soma.data.signals.measure import Scorer

FORMAT, VERSION = "soma-data-report", 1


def data_report(
    a: Sequence[str],
    b: Sequence[str] = (),
    options: Options | None = None,
    near: bool = True,
    scorer: Scorer | None = None,
    work: Path | None = None,
) -> dict[str, Any]:
    """`{"format", "version", "a", "b", "drift"}`, the figures of `soma.data.profile.summary` and
    `soma.data.profile.drift`.

    `a`, `b`: a corpus folder each, or sources as in a recipe. `work`: where the parts are written (a temporary folder;
    it takes about as much room as the text does compressed). Raises UserError where there is no document.
    """
    options = options or Options()
    with tempfile.TemporaryDirectory(prefix="soma-profile-", dir=work) as folder:
        summaries, found = [], []
        for side, source in zip("ab", (a, b), strict=True):
            if source:
                summary, figures = profile(_name(source), source, Path(folder) / side, options, near, scorer)
                summaries.append(summary)
                found.append(figures)
    report: dict[str, Any] = {"format": FORMAT, "version": VERSION, "a": found[0], "b": None, "drift": None}
    if len(found) > 1:
        if found[0]["name"] == found[1]["name"]:
            found[0]["name"], found[1]["name"] = f"A: {found[0]['name']}", f"B: {found[1]['name']}"
        report |= {"b": found[1], "drift": drift(summaries[0], summaries[1])}
    return report


def _name(source: Sequence[str]) -> str:
    """How a version is called on the page: its last two folders, or the first source and how many more."""
    parts = [part for part in str(source[0]).rstrip("/").split("/") if part]
    more = f" and {len(source) - 1} more" if len(source) > 1 else ""
    return "/".join(parts[-2:]) + more
