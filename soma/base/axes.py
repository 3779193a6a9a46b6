"""What charts stand on: clean numbers, nice ticks, scales, number formats, escaped text."""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

LARGEST = 1e300  # beyond it a difference of two values overflows
ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # characters that XML 1.0 cannot hold
SUFFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def esc(text: object) -> str:
    """Text for XML and HTML, in elements and attributes; characters that XML forbids become U+FFFD."""
    return escape(ILLEGAL.sub("\ufffd", str(text)), quote=True)


def finite(value: float | None) -> float | None:
    """The value as a float, or None where there is nothing to draw (NaN, infinity). Below 1e-300 counts as zero."""
    if value is None or not math.isfinite(number := float(value)):
        return None
    return 0.0 if abs(number) < 1 / LARGEST else max(-LARGEST, min(LARGEST, number))


def xy(value: float) -> str:
    """A coordinate in SVG units, two decimals at most: 12.50 → `12.5`."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if "." in f"{value:.2f}" else f"{value:.2f}"


# --- Numbers as text ---


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant figures: 12345 → `12.3k`, 0.00123 → `0.00123`, None → `–`."""
    value = finite(value)
    if value is None:
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e18 or size < 1e-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_trim(mantissa)}e{int(exponent)}"
    if size < 9999.5:
        whole = 10 ** (digits - 1) <= size
        return f"{value:,.0f}" if whole else _trim(f"{value:.{digits - 1 - math.floor(math.log10(size))}f}")
    for limit, suffix in SUFFIXES:
        if size >= limit * (1 - 0.5 * 10**-digits):
            scaled = value / limit
            return _trim(f"{scaled:.{max(0, digits - 1 - math.floor(math.log10(abs(scaled)) + 1e-9))}f}") + suffix
    raise AssertionError(value)


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def time_span(seconds: float | None) -> str:
    """Seconds with a fitting unit: 0.0123 → `12.3 ms`, 75 → `1 min 15 s`, 7500 → `2 h 05 min`."""
    seconds = finite(seconds)
    if seconds is None:
        return "–"
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (59.95, 1.0, "s")):
        if seconds < limit:
            return f"{number(seconds * factor)} {unit}"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def percent(share: float | None) -> str:
    """A share as per cent: 0.1234 → `12.3 %`."""
    share = finite(share)
    return "–" if share is None else f"{number(100 * share)} %"


# --- Ticks and scales ---


def nice_step(span: float, count: int) -> float:
    """The step of 1, 2, 2.5 or 5 times a power of ten that gives about `count` ticks (Heckbert, Graphics Gems)."""
    rough = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(step for step in (1, 2, 2.5, 5, 10) if rough <= step * power * (1 + 1e-9))


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values from `low` to `high`."""
    if high - low <= 0:
        return [low]
    step = nice_step(high - low, count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, min(last, first + 50) + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values for a log axis: decades, with values between them where there is room, linear within less."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    stride = max(1, math.ceil((last - first + 1) / count))
    for factors in ((1, 1.5, 2, 3, 4, 6, 8), (1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
        found = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(found) <= count + 1:
            break
    return found if len(found) >= 3 else linear_ticks(low, high, count - 2)


@dataclass(frozen=True)
class Scale:
    """Maps data values from `low`..`high` to SVG units from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-320))
        share = (value - low) / (high - low)
        return self.start + max(-0.5, min(1.5, share)) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the scale."""
        return log_ticks(self.low, self.high, count + 1) if self.log else linear_ticks(self.low, self.high, count)


def fit_scale(
    values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = False, pad: float = 0.0
) -> Scale:
    """A scale that holds all values (and zero, if asked), with `pad` of its length free at each end."""
    found = list(values)
    low, high = (min(found), max(found)) if found else (1.0 if log else 0.0, 1.0)
    if log:
        low, high = max(low, 1e-300), max(high, 1e-300)
        if high / low < 1 + 1e-9:
            return Scale(low / 2, high * 2, start, end, log=True)
        margin = (high / low) ** min(pad, 0.2)
        return Scale(max(low / margin, 1e-305), min(high * margin, 1e305), start, end, log=True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    size = max(abs(low), abs(high))
    if high - low <= max(size * 1e-12, 1e-290):
        half = max(size * 0.5, 1e-280) if size else 0.5
        if zero:
            low, high = (low - half if low < 0 else 0.0), (high + half if high > 0 or low == 0 else 0.0)
        else:
            low, high = low - half, high + half
    margin = (high - low) * pad
    bottom = low if zero and low == 0 else low - margin
    return Scale(bottom, high if zero and high == 0 else high + margin, start, end)


def tick_labels(ticks: Sequence[float], *, log: bool = False) -> list[str]:
    """Labels that share one suffix and one number of decimals, so that an axis reads evenly."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if log or len(ticks) < 2 or largest >= 1e18 or largest < 1e-4:
        return [number(tick) for tick in ticks]
    fitting = [pair for pair in SUFFIXES if largest >= max(pair[0], 1e4)]
    divisor, suffix = fitting[0] if fitting else (1.0, "")
    step = min(abs(b - a) for a, b in pairwise(ticks)) / divisor
    decimals = next((n for n in range(8) if abs(step - round(step, n)) <= step * 1e-3), 7)
    return ["0" if tick == 0 else f"{tick / divisor:,.{decimals}f}{suffix}" for tick in ticks]


# --- Text ---


def text_width(text: str, size: float = 12.0) -> float:
    """Width of text in SVG units, estimated: some half an em a character, about a whole one for broad ones."""
    return size * sum(
        1.0 if unicodedata.east_asian_width(char) in "WF" else 0.95 if char in "%mMwW@—…" else 0.56 for char in text
    )


def shorten(text: str, width: float, size: float = 12.0) -> str:
    """The text cut in the middle with an ellipsis so that it is at most `width` units wide."""
    text = " ".join(str(text).split())
    if text_width(text, size) <= width:
        return text
    keep = len(text)
    while keep > 1 and text_width(text[:keep], size) > width - size:
        keep -= max(1, keep // 16)
    head = (keep + 1) // 2
    return text[:head].rstrip() + "…" + (text[-(keep - head) :].lstrip() if keep > head else "")


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved apart to at least `gap` (as far as low..high has room), in their order."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    gap = min(gap, (high - low) / max(len(order) - 1, 1))
    placed = [0.0] * len(positions)
    previous = low - gap
    for index in order:
        previous = placed[index] = max(positions[index], previous + gap)
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed
