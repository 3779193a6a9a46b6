"""The charts' geometry follows the data, and no input breaks them or the page around them."""

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soma.base.axes import (
    finite,
    fit_scale,
    linear_ticks,
    log_ticks,
    nice_step,
    number,
    shorten,
    spread,
    tick_labels,
    time_span,
)
from soma.base.charts import (
    STYLE,
    Series,
    bar_chart,
    bucketed,
    histogram,
    line_chart,
    percentile_strip,
    quantile,
    share_bar,
    standalone,
)  # fmt: skip

Element = ElementTree.Element
odd = st.one_of(st.none(), st.floats(), st.floats(1e-320, 1e-290), st.integers(-(10**20), 10**20))


def parse(svg: str) -> Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    for element in root.iter():
        for name in ("x", "y", "width", "height", "cx", "cy", "x1", "x2", "y1", "y2"):
            if name in element.attrib:
                assert abs(float(element.attrib[name])) < 1e5, (name, element.attrib)
                assert name not in ("width", "height") or float(element.attrib[name]) >= 0
        for pair in element.attrib.get("points", "").split():
            assert all(abs(float(part)) < 1e5 for part in pair.split(","))
    return root


def rects(root: Element, kind: str = "bar") -> list[Element]:
    return [element for element in root.iter("rect") if kind in element.attrib["class"].split()]


def points(root: Element) -> list[list[tuple[float, float]]]:
    found = []
    for element in root.iter("polyline"):
        pairs = [pair.split(",") for pair in element.attrib["points"].split()]
        found.append([(float(x), float(y)) for x, y in pairs])
    return found


def words(root: Element) -> str:
    return " ".join("".join(element.itertext()) for element in root.iter("text"))


# --- numbers, ticks ---


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345, "12.3k"), (0.00123, "0.00123"), (None, "–"), (float("nan"), "–"), (0, "0"), (9800, "9,800"),
        (9999.7, "10k"), (999_999, "1M"), (-2.5e6, "-2.5M"), (1.0, "1"), (1e-7, "1e-7"), (3.14159, "3.14"),
        (1e30, "1e30"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (75, "1 min 15 s"), (7500, "2 h 05 min"), (4, "4 s"), (59.99, "1 min 00 s")],
)
def test_time_spans(seconds: float, text: str) -> None:
    assert time_span(seconds) == text


def test_nice_ticks() -> None:
    assert nice_step(10, 5) == 2
    assert linear_ticks(0, 1.03, 5) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert log_ticks(1, 1000, 7) == pytest.approx([1, 3, 10, 30, 100, 300, 1000])
    assert tick_labels([0, 5000, 10000]) == ["0", "5k", "10k"]
    assert tick_labels([0, 2.5, 5.0]) == ["0", "2.5", "5.0"]
    assert tick_labels([0.00025, 0.0005]) == ["0.00025", "0.00050"]


@given(st.lists(odd, max_size=6), st.booleans(), st.booleans())
def test_scales_hold_their_values(values: list[float | None], log: bool, zero: bool) -> None:
    known = [v for raw in values if (v := finite(raw)) is not None and (not log or v > 0)]
    scale = fit_scale(known, 0, 100, log=log, zero=zero)
    assert all(-0.01 <= scale(v) <= 100.01 for v in known)
    assert len(scale.ticks()) <= 60
    assert all(isinstance(label, str) for label in tick_labels(scale.ticks()))


def test_labels_are_moved_apart_in_their_order() -> None:
    assert spread([10, 11, 50], 15, 0, 100) == [10, 25, 50]
    placed = spread([98, 99, 100], 15, 0, 100)
    assert placed == sorted(placed)
    assert all(b - a >= 15 for a, b in pairwise(placed))
    assert placed[-1] <= 100


@given(st.text(), st.floats(10, 300))
def test_shortened_text_is_never_longer(text: str, width: float) -> None:
    assert len(shorten(text, width)) <= max(len(text), 2)


def test_quantile() -> None:
    assert quantile([1, 2, 3, 4], 0.5) == 2.5
    assert quantile([7], 0.99) == 7


# --- geometry ---


def test_bars_are_as_long_as_their_values() -> None:
    root = parse(bar_chart([("a", 1.0), ("b", 2.0), ("c", 4.0)]))
    lengths = [float(bar.attrib["width"]) for bar in rects(root)]
    assert lengths[1] / lengths[0] == pytest.approx(2, rel=1e-3)
    assert lengths[2] / lengths[0] == pytest.approx(4, rel=1e-3)
    assert "4" in words(root)


def test_negative_bars_lie_left_of_zero() -> None:
    negative, positive = rects(parse(bar_chart([("loss", -3.0), ("gain", 6.0)])))
    zero = float(positive.attrib["x"])
    assert float(negative.attrib["x"]) + float(negative.attrib["width"]) == pytest.approx(zero, abs=0.02)
    assert float(positive.attrib["width"]) == pytest.approx(2 * float(negative.attrib["width"]), rel=1e-2)


def test_highlight_mutes_the_others() -> None:
    first, second = rects(parse(bar_chart([("ours", 1), ("theirs", 2)], highlight=["ours"])))
    assert "f0" in first.attrib["class"].split()
    assert "fm" in second.attrib["class"].split()


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50, unique=True))
def test_a_line_rises_where_its_data_rise(ys: list[float]) -> None:
    (line,) = points(parse(line_chart([Series("one", list(range(len(ys))), ys)])))
    assert len(line) == len(ys)
    assert all(a[0] < b[0] for a, b in pairwise(line))
    order = sorted(range(len(ys)), key=lambda index: ys[index])
    drawn = [line[index][1] for index in order]
    assert all(a >= b - 0.011 for a, b in pairwise(drawn)), "SVG's y points down"


def test_log_axis_spaces_ratios_evenly() -> None:
    (line,) = points(parse(line_chart([Series("one", [1, 2, 3], [1, 10, 100])], log_y=True)))
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.02)
    (flat,) = points(parse(line_chart([Series("one", [1, 2, 3], [1, 10, 100])])))
    assert flat[0][1] - flat[1][1] < (flat[1][1] - flat[2][1]) / 5, "the linear axis does not"


def test_gaps_split_a_line_and_zero_is_a_gap_on_a_log_axis() -> None:
    series = Series("one", range(6), [1, 2, float("nan"), 3, 0, 4])
    assert [len(part) for part in points(parse(line_chart([series])))] == [2, 3]
    assert [len(part) for part in points(parse(line_chart([series], log_y=True)))] == [2, 1, 1]


def test_band_holds_every_value_and_long_lines_are_thinned() -> None:
    ys = [math.sin(index) for index in range(5000)]
    buckets = bucketed(list(enumerate(ys)), 120)
    assert len(buckets) == 120
    assert min(low for *_, low, _ in buckets) == min(ys)
    assert max(high for *_, high in buckets) == max(ys)
    root = parse(line_chart([Series("noisy", range(5000), ys, band=True), Series("calm", range(5000), ys)]))
    assert len(list(root.iter("polygon"))) == 1
    assert [len(part) for part in points(root)] == [120, 400]
    assert "noisy" in words(root)


def test_reference_lines_widen_the_axis() -> None:
    root = parse(line_chart([Series("ours", [0, 1], [2.0, 1.5])], marks=[("xz", 1.0)]))
    assert "xz 1" in words(root)
    (line,) = points(root)
    (mark,) = [element for element in root.iter("line") if "dots" in element.attrib["class"]]
    assert float(mark.attrib["y1"]) > max(y for _, y in line)


def test_muted_lines_are_grey_and_without_a_name() -> None:
    root = parse(line_chart([Series(name, [0, 1], [1, 2], muted=name == "far") for name in ("far", "near", "best")]))
    assert [element.attrib["class"] for element in root.iter("polyline")] == ["line sm", "line s0", "line s1"]
    assert "near best" in words(root)
    assert "far" not in [element.text for element in root.iter("text")]


def test_histogram_bars_are_as_high_as_their_counts() -> None:
    bars = rects(parse(histogram([0, 1, 2, 3], [10, 20, 40], marks=[("median", 1.5)])))
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights[1] / heights[0] == pytest.approx(2, rel=1e-2)
    assert heights[2] / heights[0] == pytest.approx(4, rel=1e-2)
    with pytest.raises(ValueError, match="needs 3 edges"):
        histogram([0, 1], [1, 2])


def test_log_histogram_has_bins_of_equal_width() -> None:
    bars = rects(parse(histogram([0, 10, 100, 1000], [1, 2, 3], log_x=True)))
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths == pytest.approx([widths[0]] * 3, abs=0.02)


def test_huge_edges_do_not_overflow_and_falling_edges_are_no_data() -> None:
    assert len(rects(parse(histogram([0, 1e200, 1e250], [1, 2], log_x=True)))) == 2
    assert "no data" in histogram([0, 2, 1], [1, 2])
    assert "no data" in histogram([0, float("nan"), 1], [1, 2])


def test_shares_fill_the_bar_and_the_smallest_are_joined() -> None:
    root = parse(share_bar([(f"kind {index}", 100 / (index + 1)) for index in range(12)], width=480))
    bars = rects(root)
    assert len(bars) == 7
    assert sum(float(bar.attrib["width"]) for bar in bars) == pytest.approx(480, abs=0.1)
    assert "6 others" in words(root)


def test_percentiles_are_where_the_values_are() -> None:
    root = parse(percentile_strip([("TTFT", [10, 20, 30, 40, 100]), ("ITL", [])], format_value=lambda v: f"{v:.0f} ms"))
    assert "p50 30 ms" in words(root)
    assert "ITL" not in words(root), "a row without values is left out"
    dots = sorted(float(dot.attrib["cx"]) for dot in root.iter("circle"))
    (median,) = [element for element in root.iter("line") if "median" in element.attrib["class"]]
    assert float(median.attrib["x1"]) == pytest.approx(dots[2], abs=0.02)

    def spread_of(zero: bool) -> float:
        root = parse(percentile_strip([("a", [100, 101])], zero=zero))
        places = [float(dot.attrib["cx"]) for dot in root.iter("circle")]
        return max(places) - min(places)

    assert spread_of(zero=False) > 20 * spread_of(zero=True)


# --- odd input ---

CHARTS: list[Callable[[list[float | None], str], str]] = [
    lambda values, name: line_chart(
        [Series(name, range(len(values)), values), Series("b", values, values)], title=name
    ),
    lambda values, name: line_chart([Series(name, values, values, band=True)], log_x=True, log_y=True, y_label=name),
    lambda values, name: bar_chart([(name, value) for value in values], title=name, note=name, highlight=["x"]),
    lambda values, name: histogram([*range(len(values) + 1)], [v or 0 for v in values], title=name, x_label=name),
    lambda values, name: histogram(
        [v or 0.0 for v in [*values, 1]], [1] * len(values), log_x=True, marks=[(name, 1.0)]
    ),
    lambda values, name: share_bar([(name, value) for value in values], title=name),
    lambda values, name: percentile_strip([(name, values), ("b", values[:1])], title=name, log_x=True),
    lambda values, name: percentile_strip([(name, values)], x_label=name),
]


@pytest.mark.parametrize("draw", CHARTS)
@given(values=st.lists(odd, max_size=9), name=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_odd_input_still_gives_a_chart(draw: Callable[..., str], values: list[float | None], name: str) -> None:
    parse(draw(values, name))


@pytest.mark.parametrize("draw", CHARTS)
@pytest.mark.parametrize("values", [[], [1.0], [float("nan")] * 3, [1e308, -1e308, 1e-308], [0.0, 0.0], [5.0] * 4])
def test_edge_cases(draw: Callable[..., str], values: list[float | None]) -> None:
    parse(draw(values, "x" * 300))
    if not values:
        assert "no data" in draw([], "empty")


@pytest.mark.parametrize("draw", CHARTS)
def test_text_is_escaped(draw: Callable[..., str]) -> None:
    svg = draw([1.0, 2.0, 3.0], '<script>alert("x")</script>\x00&')
    assert "<script" not in svg
    root = parse(svg)
    assert not list(root.iter("script"))


def test_standalone_carries_its_style_and_nothing_else() -> None:
    svg = standalone(bar_chart([("a", 1)], title="A > B"))
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    (style,) = root.iter("{http://www.w3.org/2000/svg}style")
    assert style.text == STYLE
    assert not re.search(r"(url\(|href|@import|<script)", svg)
    assert "prefers-color-scheme: dark" in STYLE
