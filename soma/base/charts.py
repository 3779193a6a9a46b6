"""Small SVG charts for reports and documents: no plotting library, no JavaScript, legible in light and dark.

Every function returns one `<svg>` element as text. Colours come from CSS variables in `STYLE`, which a page includes
once; `standalone(svg)` makes a file of its own. Values may be None, NaN or infinite (a gap); text is escaped. Colours
are Okabe and Ito's ("Color Universal Design", 2008), darkened or lightened for contrast, and never the only sign.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from soma.base.axes import Scale, esc, finite, fit_scale, number, percent, shorten, spread, text_width, tick_labels, xy

FONT = 12.0
TITLE_HEIGHT = 30.0
POINTS = 400  # a line of more points is thinned: nobody sees more on a screen
COLOURS = 7

# Variables and rules for all charts of a page. Fills and strokes are numbered like the colours.
STYLE = """
:root {
  --c-ink: #1d2126; --c-soft: #5d6670; --c-grid: #e3e6ea; --c-paper: #ffffff; --c-muted: #c3cad2;
  --c-0: #0067a5; --c-1: #c4500a; --c-2: #007d5b; --c-3: #a4508b; --c-4: #8a6d00; --c-5: #2b8fd0; --c-6: #5d6670;
}
@media screen and (prefers-color-scheme: dark) { :root {
  --c-ink: #e7eaee; --c-soft: #9da7b3; --c-grid: #2c333c; --c-paper: #15181d; --c-muted: #4a5460;
  --c-0: #5fb4ee; --c-1: #f0965a; --c-2: #3fc79c; --c-3: #dd93c6; --c-4: #dcc04a; --c-5: #9bd3f7; --c-6: #9da7b3;
} }
.chart { display: block; width: 100%; height: auto; font: 12px/1.2 system-ui, sans-serif; }
.chart text { fill: var(--c-ink); }
.chart .title { font-weight: 600; font-size: 13px; }
.chart .soft { fill: var(--c-soft); }
.chart .end { text-anchor: end; }
.chart .mid { text-anchor: middle; }
.chart .grid { stroke: var(--c-grid); }
.chart .axis { stroke: var(--c-soft); }
.chart .dots { stroke-dasharray: 2 3; }
.chart .median { stroke-width: 2.5; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.chart .thin { stroke-width: 1.5; stroke-dasharray: 5 4; }
.chart .band { opacity: 0.16; }
.chart .dot { opacity: 0.45; }
.chart .hit { fill: transparent; }
.chart .gap { stroke: var(--c-paper); }
.chart .edge { fill: none; stroke: var(--c-muted); stroke-width: 1.5; }
.chart .node { fill: var(--c-paper); stroke: var(--c-0); stroke-width: 1.5; }
.chart .kept { stroke: var(--c-muted); stroke-dasharray: 4 3; }
.chart .mono { font-family: ui-monospace, monospace; }
.chart .fm { fill: var(--c-muted); }
.chart .sm { stroke: var(--c-muted); }
""" + "".join(
    f".chart .f{index} {{ fill: var(--c-{index}); }}\n.chart .s{index} {{ stroke: var(--c-{index}); }}\n"
    for index in range(COLOURS)
)


@dataclass(frozen=True)
class Series:
    """One line: `xs` and `ys` of the same length. `band` draws noisy values as a mean with their range around it;
    `muted` puts the line into the background, in grey and without its name.
    """

    name: str
    xs: Sequence[float | None]
    ys: Sequence[float | None]
    band: bool = False
    dashed: bool = False
    muted: bool = False


def standalone(svg: str) -> str:
    """A chart as an SVG file of its own, with its style in it."""
    opened = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return opened.replace(">", f"><style>{STYLE}</style>", 1)


def figure(width: float, height: float, title: str, body: Sequence[str]) -> str:
    """An `<svg>` that scales with its place, with a title line above the body."""
    heading = f'<text class="title" x="0" y="14">{esc(shorten(title, width, 13))}</text>' if title else ""
    return (
        f'<svg class="chart" viewBox="0 0 {xy(width)} {xy(height)}" style="max-width:{xy(width)}px" role="img" '
        f'aria-label="{esc(title)}">{heading}{"".join(body)}</svg>'
    )


def nothing(width: float, title: str, text: str = "no data") -> str:
    """A chart that says that there is nothing to draw."""
    return figure(width, 90, title, [f'<text class="soft mid" x="{xy(width / 2)}" y="55">{esc(text)}</text>'])


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """One line of text."""
    return f'<text class="{kind}" x="{xy(x)}" y="{xy(y)}">{esc(words)}</text>'


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line of a style in `STYLE`."""
    return f'<line class="{kind}" x1="{xy(x1)}" y1="{xy(y1)}" x2="{xy(x2)}" y2="{xy(y2)}"/>'


def rect(kind: str, x: float, y: float, width: float, height: float, words: str = "") -> str:
    """A rectangle of a style in `STYLE`, with what shows when the pointer rests on it."""
    place = f'x="{xy(x)}" y="{xy(y)}" width="{xy(width)}" height="{xy(height)}"'
    return f'<rect class="{kind}" {place}>{tip(words)}</rect>' if words else f'<rect class="{kind}" {place}/>'


def dot(kind: str, x: float, y: float, radius: float, words: str = "") -> str:
    """A dot of a style in `STYLE`, with what shows when the pointer rests on it."""
    place = f'cx="{xy(x)}" cy="{xy(y)}" r="{xy(radius)}"'
    return f'<circle class="{kind}" {place}>{tip(words)}</circle>' if words else f'<circle class="{kind}" {place}/>'


def tip(words: str) -> str:
    """What shows when the pointer rests on the element around it."""
    return f"<title>{esc(words)}</title>"


# --- Lines ---


def segments(series: Series, log_x: bool = False, log_y: bool = False) -> list[list[tuple[float, float]]]:
    """The drawable stretches of a series: split where a value is missing or a log axis cannot show it."""
    found: list[list[tuple[float, float]]] = [[]]
    for raw_x, raw_y in zip(series.xs, series.ys, strict=True):
        x, y = finite(raw_x), finite(raw_y)
        if x is None or y is None or (log_x and x <= 0) or (log_y and y <= 0):
            if found[-1]:
                found.append([])
        else:
            found[-1].append((x, y))
    return [segment for segment in found if segment]


def bucketed(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of `count` buckets of neighbouring points."""
    count = min(count, len(points))
    found = []
    for index in range(count):
        part = points[index * len(points) // count : (index + 1) * len(points) // count]
        ys = [y for _, y in part]
        mean = sum(y / len(ys) for y in ys)
        found.append((part[len(part) // 2][0], min(max(mean, min(ys)), max(ys)), min(ys), max(ys)))
    return found


def _line(
    colour: int | str, series: Series, parts: list[list[tuple[float, float]]], to_x: Scale, to_y: Scale
) -> list[str]:  # fmt: skip
    """The marks of one series: its band, its line, and points to rest the pointer on."""
    body, shown = [], []
    for part in parts:
        if series.band and len(part) > 2:
            buckets = bucketed(part, 120)
            upper = [f"{xy(to_x(x))},{xy(to_y(high))}" for x, _, _, high in buckets]
            lower = [f"{xy(to_x(x))},{xy(to_y(low))}" for x, _, low, _ in reversed(buckets)]
            body.append(f'<polygon class="band f{colour}" points="{" ".join(upper + lower)}"/>')
            part = [(x, mean) for x, mean, _, _ in buckets]
        elif len(part) > POINTS:
            part = [(x, mean) for x, mean, _, _ in bucketed(part, POINTS)]
        places = " ".join(f"{xy(to_x(x))},{xy(to_y(y))}" for x, y in part)
        body.append(f'<polyline class="line s{colour}{" thin" if series.dashed else ""}" points="{places}"/>')
        if len(part) == 1:
            body.append(dot(f"f{colour}", to_x(part[0][0]), to_y(part[0][1]), 3))
        shown += part
    for x, y in shown[:: max(1, len(shown) // 60)]:
        body.append(dot("hit", to_x(x), to_y(y), 7, f"{series.name}: {number(y, 4)} at {number(x, 4)}"))
    return body


def line_chart(
    series: Sequence[Series],
    *,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    width: float = 480,
    height: float = 270,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    format_y: Callable[[float], str] | None = None,
    marks: Sequence[tuple[str, float]] = (),
) -> str:
    """Lines with their names at their ends. `marks` are (name, y) reference lines across the chart."""
    parts = [segments(one, log_x, log_y) for one in series]
    points = [point for segment_list in parts for segment in segment_list for point in segment]
    levels = [(name, level) for name, level in marks if finite(level) is not None and not (log_y and level <= 0)]
    if not points:
        return nothing(width, title)
    ends = {
        index: found[-1][-1][1]
        for index, (one, found) in enumerate(zip(series, parts, strict=True))
        if found and not one.muted
    }
    labelled = len(series) > 1
    widest = max((text_width(series[index].name) for index in ends), default=0)
    right = min(widest + 10, width * 0.3) if labelled else 14
    top, bottom = (TITLE_HEIGHT if title else 8) + (18 if y_label else 4), height - (40 if x_label else 24)
    to_y = fit_scale([y for _, y in points] + [y for _, y in levels], bottom, top, log=log_y, zero=zero, pad=0.04)
    ticks = to_y.ticks(max(3, int((bottom - top) / 36)))
    labels = [format_y(tick) for tick in ticks] if format_y else tick_labels(ticks, log=log_y)
    left = max((text_width(label) for label in labels), default=0) + 8
    to_x = fit_scale([x for x, _ in points], left, width - right, log=log_x)
    body = [text(0, top - 12, y_label, "soft")] if y_label else []
    for tick, label in zip(ticks, labels, strict=True):
        body.append(line("grid", left, to_y(tick), width - right, to_y(tick)))
        body.append(text(left - 6, to_y(tick) + 4, label, "soft end"))
    body += _x_axis(to_x, bottom, x_label, height)
    for name, level in levels:
        body.append(line("axis dots", left, to_y(level), width - right, to_y(level)))
        body.append(text(width - right, to_y(level) - 5, f"{name} {number(level)}", "soft end"))
    bright = [index for index, one in enumerate(series) if not one.muted]
    colours = {index: place % COLOURS for place, index in enumerate(bright)}
    for index, (one, segment_list) in enumerate(zip(series, parts, strict=True)):
        body += _line(colours.get(index, "m"), one, segment_list, to_x, to_y)
    if labelled:
        for index, y in zip(ends, spread([to_y(y) for y in ends.values()], 15, top, bottom), strict=True):
            body.append(text(width - right + 6, y + 4, shorten(series[index].name, right - 6), f"f{colours[index]}"))
    return figure(width, height, title, body)


def _x_axis(scale: Scale, y: float, label: str, height: float) -> list[str]:
    """The line at the bottom with ticks and what they count."""
    ticks = scale.ticks(max(2, int((scale.end - scale.start) / 80)))
    body = [line("axis", scale.start, y, scale.end, y)]
    written = -FONT
    for tick, words in zip(ticks, tick_labels(ticks, log=scale.log), strict=True):
        x, half = scale(tick), text_width(words) / 2
        body.append(line("axis", x, y, x, y + 4))
        if x - half > written + FONT / 2:  # a label that would touch the one before is left out
            body.append(text(x, y + 17, words, "soft mid"))
            written = x + half
    if label:
        body.append(text((scale.start + scale.end) / 2, height - 4, label, "soft mid"))
    return body


# --- Bars ---


def bar_chart(
    items: Sequence[tuple[str, float | None]],
    *,
    title: str = "",
    width: float = 480,
    format_value: Callable[[float | None], str] = number,
    highlight: Collection[str] = (),
    note: str = "",
) -> str:
    """Horizontal bars from zero, their length proportional to the value, the value at the end. With `highlight`, the
    bars that are not named step back.
    """
    if not items:
        return nothing(width, title)
    values = [finite(value) for _, value in items]
    words = [format_value(value) for value in values]
    left = min(max(text_width(name) for name, _ in items) + 16, width * 0.42)
    room = max(text_width(word) for word in words) + 8
    known = [value for value in values if value is not None]
    negative = room if min(known, default=0.0) < 0 else 0
    scale = fit_scale(known, left + negative, width - room, zero=True)
    top, row = (TITLE_HEIGHT if title else 4), 26
    body = []
    for index, ((name, _), value, word) in enumerate(zip(items, values, words, strict=True)):
        y = top + index * row
        colour = "f0" if not highlight or name in highlight else "fm"
        start, end = sorted((scale(0.0), scale(value or 0.0)))
        body.append(f"<g>{tip(f'{name}: {word}')}{text(left - 8, y + 15, shorten(name, left - 8), 'end')}")
        body.append(rect(f"bar {colour}", start, y + 2, end - start, 18))
        body.append(text(start - 6 if (value or 0) < 0 else end + 6, y + 15, word, "end" if (value or 0) < 0 else ""))
        body.append("</g>")
    height = top + len(items) * row + (20 if note else 0)
    if note:
        body.append(text(0, height - 4, shorten(note, width), "soft"))
    return figure(width, height, title, body)


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    *,
    title: str = "",
    x_label: str = "",
    width: float = 480,
    height: float = 220,
    log_x: bool = False,
    marks: Sequence[tuple[str, float]] = (),
) -> str:
    """Bars over bins: `edges` has one value more than `counts`. `marks` are (name, x) lines such as a median.

    Edges that fall or are not finite give a chart without data. On a log axis a first bin from zero is drawn as wide as
    the next one.
    """
    if len(edges) != len(counts) + 1:
        raise ValueError(f"a histogram of {len(counts)} bins needs {len(counts) + 1} edges, got {len(edges)}")
    heights = [finite(count) or 0.0 for count in counts]
    places = [place for edge in edges if (place := finite(edge)) is not None]
    if not any(heights) or len(places) < len(edges) or any(a > b for a, b in pairwise(places)):
        return nothing(width, title)
    if log_x and places[0] <= 0 and len(places) > 2 and places[1] > 0:
        places[0] = places[1] * (places[1] / places[2])
    if places[0] >= places[-1] or (log_x and places[0] <= 0):
        return nothing(width, title)
    top, bottom = (TITLE_HEIGHT if title else 8) + (18 if marks else 4), height - (40 if x_label else 24)
    to_y = fit_scale(heights, bottom, top, zero=True, pad=0.02)
    ticks = to_y.ticks(4)
    labels = tick_labels(ticks)
    left = max(text_width(label) for label in labels) + 8
    to_x = fit_scale(places, left, width - 10, log=log_x)
    body = []
    for tick, label in zip(ticks, labels, strict=True):
        body.append(line("grid", left, to_y(tick), width - 10, to_y(tick)))
        body.append(text(left - 6, to_y(tick) + 4, label, "soft end"))
    for index, count in enumerate(heights):
        start, end = to_x(places[index]), to_x(places[index + 1])
        words = f"{number(finite(edges[index]))} to {number(finite(edges[index + 1]))}: {number(count, 4)}"
        body.append(rect("bar f0", start, to_y(count), max(end - start - 1, 0.5), bottom - to_y(count), words))
    body += _x_axis(to_x, bottom, x_label, height)
    for name, level in marks:
        value = finite(level)
        if value is not None and to_x.low <= value <= to_x.high:
            x = to_x(value)
            body.append(line("axis dots", x, top - 14, x, bottom))
            side = "end" if x > width * 0.6 else ""
            body.append(text(x - 5 if side else x + 5, top - 6, f"{name} {number(value)}", f"soft {side}"))
    return figure(width, height, title, body)


def share_bar(
    items: Sequence[tuple[str, float | None]],
    *,
    title: str = "",
    width: float = 480,
    format_value: Callable[[float | None], str] = number,
) -> str:
    """One bar cut into shares, with a legend of names, values and per cent. Beyond seven, the smallest are one."""
    known = [(name, value) for name, raw in items if (value := finite(raw)) is not None and value > 0]
    known.sort(key=lambda item: -item[1])
    if not known:
        return nothing(width, title)
    if len(known) > COLOURS:
        rest = known[COLOURS - 1 :]
        known = [*known[: COLOURS - 1], (f"{len(rest)} others", sum(value for _, value in rest))]
    largest = known[0][1]
    total = sum(value / largest for _, value in known)
    top = TITLE_HEIGHT if title else 2
    body, x = [], 0.0
    columns = max(1, int(width // 220))
    for index, (name, value) in enumerate(known):
        share = value / largest / total
        words = f"{name}: {format_value(value)} ({percent(share)})"
        body.append(rect(f"bar f{index} gap", x, top, share * width, 26, words))
        x += share * width
        column, line = index % columns, index // columns
        at_x, at_y = column * width / columns, top + 48 + line * 20
        detail = f"{percent(share)} · {format_value(value)}"
        space = width / columns - 22 - text_width(detail)
        body.append(rect(f"f{index}", at_x, at_y - 10, 11, 11))
        body.append(
            f'<text x="{xy(at_x + 17)}" y="{xy(at_y)}">{esc(shorten(name, max(space, 40)))} '
            f'<tspan class="soft">{esc(detail)}</tspan></text>'
        )
    return figure(width, top + 42 + 20 * -(-len(known) // columns), title, body)


# --- Distributions ---


def quantile(ordered: Sequence[float], share: float) -> float:
    """The `share` quantile of sorted values, linear between neighbours: of 1, 2, 3, 4 the median is 2.5."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentile_strip(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    title: str = "",
    x_label: str = "",
    width: float = 480,
    format_value: Callable[[float], str] = number,
    log_x: bool = False,
    zero: bool = True,
) -> str:
    """One strip a row on a common axis: a dot for each value, a bar from the median to the 99th percentile.

    zero: the axis begins there, where it is not logarithmic.
    """
    kept = [(name, sorted(v for raw in values if (v := finite(raw)) is not None and not (log_x and v <= 0)))
            for name, values in rows]  # fmt: skip
    kept = [(name, values) for name, values in kept if values]
    if not kept:
        return nothing(width, title)
    left = min(max(text_width(name) for name, _ in kept) + 12, width * 0.34)
    top, row = (TITLE_HEIGHT if title else 4), 44
    bottom = top + row * len(kept)
    height = bottom + (40 if x_label else 24)
    scale = fit_scale(
        [v for _, values in kept for v in values], left, width - 12, log=log_x, zero=zero and not log_x, pad=0.03
    )
    body = []
    for index, (name, values) in enumerate(kept):
        y = top + index * row + 30
        middle, most, extreme = (quantile(values, share) for share in (0.5, 0.9, 0.99))
        body.append(text(left - 10, y + 4, shorten(name, left - 10), "end"))
        body.append(line("grid", left, y, width - 12, y))
        body.append(rect("f0 band", scale(middle), y - 8, scale(extreme) - scale(middle), 16))
        for value in values[:: max(1, len(values) // 200)]:
            body.append(dot("f0 dot", scale(value), y, 3.5, format_value(value)))
        body.append(line("median s1", scale(middle), y - 9, scale(middle), y + 9))
        words = f"p50 {format_value(middle)} · p90 {format_value(most)} · p99 {format_value(extreme)}"
        body.append(text(max(0.0, min(left, width - text_width(words))), y - 14, words, "soft"))
    return figure(width, height, title, body + _x_axis(scale, bottom, x_label, height))
