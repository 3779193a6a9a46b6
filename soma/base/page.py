"""What report pages share: their style sheet, templates, filters, and charts that fit wide and narrow screens."""

from collections.abc import Callable
from importlib import resources
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader, Undefined
from markupsafe import Markup

from soma.base.axes import finite, number, percent, time_span
from soma.base.charts import STYLE
from soma.base.units import human_bytes

WIDE, HALF, NARROW = 1000, 480, 358  # widths of charts: the whole page, half of it, a phone


def page_style() -> Markup:
    """The style of a page and of the charts in it."""
    return Markup(STYLE + (resources.files("soma.base") / "report.css").read_text(encoding="utf-8"))


def page_environment(package: str) -> Environment:
    """Templates of a package's folder, which escape what they are given and have the filters number, bytes, span,
    percent.
    """
    # What an artefact of another version does not say is left blank, as deep as it is missing.
    environment = Environment(
        loader=PackageLoader(package, "."), autoescape=True, undefined=ChainableUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    shown: dict[str, Callable[..., str]] = {"number": number, "bytes": size, "span": time_span, "percent": percent}
    environment.filters |= {name: known(show) for name, show in shown.items()}
    return environment


def known(show: Callable[..., str]) -> Callable[..., str]:
    """A filter that takes what the facts do not say as None."""

    def filter(value: Any, *arguments: Any) -> str:
        return show(None if isinstance(value, Undefined) else value, *arguments)

    return filter


def size(count: float | None) -> str:
    """Bytes, or a dash where they are not known."""
    value = finite(count)
    return "–" if value is None else human_bytes(value)


def responsive(draw: Callable[[int], str], width: int = WIDE) -> Markup:
    """A chart drawn twice, for a wide and for a narrow screen; the style sheet shows the one that fits."""
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(
        Markup(draw(width)), Markup(draw(NARROW))
    )
