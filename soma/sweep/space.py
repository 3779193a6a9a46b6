"""What a sweep searches: `--over KEY=LOW..HIGH`, `KEY=LOW..HIGH:log`, `KEY=a,b,c`. Loads no torch."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import yaml

from soma.base.errors import UserError

EXPONENT = re.compile(r"[+-]?[\d.]+[eE][+-]?\d+")
FORM = "expected KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=a,b,c, for example --over train.learning_rate=1e-4..1e-2:log"


class Suggests(Protocol):
    """The part of `optuna.Trial` that draws values."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones if both are. `log`: every factor is equally likely."""

    low: float
    high: float
    log: bool

    def draw(self, trial: Suggests, key: str) -> float:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]
    log = False

    def draw(self, trial: Suggests, key: str) -> Any:
        return trial.suggest_categorical(key, self.values)

    def holds(self, value: Any) -> bool:
        return value in self.values


Space = dict[str, Range | Choice]


def parse_space(options: Sequence[str]) -> Space:
    """The `--over` options by key. Raises UserError for one that cannot be understood, or a key given twice."""
    space: Space = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not all(key.split(".")) or not text:
            raise UserError(f"--over {option}: {FORM}")
        if key in space:
            raise UserError(f"--over {option}: {key} is given twice")
        space[key] = _values(option, text)
    if not space:
        raise UserError(f"nothing to search: {FORM}")
    return space


def _values(option: str, text: str) -> Range | Choice:
    if ".." in text:
        bounds, _, scale = text.partition(":")
        low, high = (_number(option, part) for part in bounds.split("..", 1))
        if scale not in ("", "log"):
            raise UserError(f"--over {option}: unknown scale {scale!r}; there is only `log`")
        if not low < high:
            raise UserError(f"--over {option}: {low:g} is not below {high:g}")
        if scale == "log" and low <= 0:
            raise UserError(f"--over {option}: a log scale needs numbers above 0")
        return Range(low, high, scale == "log")
    values = tuple(_scalar(part) for part in text.split(","))
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise UserError(
                f"--over {option}: {value!r} is no single value: a choice is a number, a word, true or null"
            )
    if len(set(values)) < 2:
        raise UserError(f"--over {option}: one value leaves nothing to search; use --set, or give several")
    return Choice(values)


def _scalar(text: str) -> Any:
    """A YAML scalar; 1e-4 is a number too, which YAML 1.1 takes for text."""
    try:
        return float(text) if EXPONENT.fullmatch(text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _number(option: str, text: str) -> float:
    value = _scalar(text.strip())
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"--over {option}: {text!r} is no number; {FORM}")
    return value
