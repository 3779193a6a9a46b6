"""A chart of named points on a plane, in the manner of `charts`."""

from collections.abc import Sequence

from soma.base.axes import fit_scale, text_width
from soma.base.charts import TITLE_HEIGHT, dot, figure, line, nothing, text

FONT = 11.0


def word_map(
    names: Sequence[str], points: Sequence[tuple[float, float]], *, title: str = "", x_label: str = "",
    y_label: str = "", width: float = 1000,
) -> str:  # fmt: skip
    """Points with their names; the pointer shows every name, a name that would lie on an earlier one is not written."""
    if not names:
        return nothing(width, title)
    height = TITLE_HEIGHT + width * 0.7
    bottom = height - 24
    to_x = fit_scale([x for x, _ in points], 8, width - 60, pad=0.03)
    to_y = fit_scale([y for _, y in points], bottom - 8, TITLE_HEIGHT + 20, pad=0.03)
    body = [line("axis", 0, bottom, width, bottom), line("axis", 0, TITLE_HEIGHT + 8, 0, bottom)]
    body += [text(width, bottom + 16, x_label, "soft end"), text(6, TITLE_HEIGHT + 12, y_label, "soft")]
    written: list[tuple[float, float, float]] = []
    for name, (x, y) in zip(names, points, strict=True):
        left, base = to_x(x), to_y(y)
        body.append(dot("f0", left, base, 2.5, name))
        right = left + 6 + text_width(name, FONT)
        if right <= width and not any(
            left < other[1] and right > other[0] and abs(base - other[2]) < FONT + 1 for other in written
        ):
            written.append((left, right, base))
            body.append(text(left + 5, base + 4, name))
    return figure(width, height, title, body)
