"""The `limits:` block and file: which rules hold, where their counts are kept, and what holds when these are away."""

import re
from math import gcd
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from soma.serve.yaml_file import read_yaml, validated

Algorithm = Literal[
    "fixed_window", "sliding_window_log", "sliding_window_counter", "token_bucket", "leaky_bucket", "concurrency"
]
Scope = Literal["key", "team", "address", "model", "route"]
UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
LARGEST = 2**50  # what Lua's doubles count exactly, with room for sums


def milliseconds(value: Any) -> int:
    """A span of time: 30s, 1m, 12h, 1d, 250ms, or seconds as a number. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return round(value * 1000)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", str(value).strip())
    if not found:
        raise ValueError(f"{value!r} is no span of time; expected as 250ms, 30s, 1m, 12h, 1d")
    return round(float(found[1]) * UNITS[found[2]])


Span = Annotated[int, BeforeValidator(milliseconds)]


class Strict(BaseModel):
    """A block in which unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(Strict):
    """One limit. Each value of `per` has a count of its own; with none there is one for everything."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    limit: int = Field(ge=1, description="Requests, tokens, or calls at once, in a window.")
    window: Span = Field(60_000, ge=1, le=366 * UNITS["d"], description="As 30s, 1m, 1d.")
    unit: Literal["requests", "tokens"] = "requests"
    algorithm: Algorithm = "token_bucket"
    burst: int | None = Field(None, ge=1, description="What a bucket holds; left out, the limit.")
    per: list[Scope] = []
    only: dict[Scope, list[str]] = Field({}, description="The rule holds for these keys, teams, models … only.")

    @model_validator(mode="after")
    def fits(self) -> "Rule":
        """What does not go together."""
        is_bucket = self.algorithm in ("token_bucket", "leaky_bucket")
        if self.burst is not None and not is_bucket:
            raise ValueError(f"burst: {self.algorithm} has none; only buckets do")
        if self.algorithm == "concurrency" and (self.unit != "requests" or "window" in self.model_fields_set):
            raise ValueError("concurrency counts calls that run: it has no window and the unit requests")
        parts = self.window if self.algorithm == "sliding_window_counter" else 1
        if is_bucket:
            parts = self.window // gcd(self.limit, self.window)
        if max(self.limit, self.burst or 0) * parts > LARGEST:
            raise ValueError(
                f"what {self.algorithm} multiplies (limit or burst, window in ms) must stay below {LARGEST}: take a "
                "shorter window, a rounder limit or another algorithm"
            )
        return self


class LimitsConfig(Strict):
    """The block `limits`."""

    rules: list[Rule] = []
    redis: str | None = Field(None, description="redis://HOST:PORT/DB: gateways count together. Left out: each alone.")
    prefix: str = Field("soma", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Before all keys in Redis.")
    when_away: Literal["closed", "open", "local"] = Field(
        "closed", description="Without Redis: refuse with 503, let through uncounted, or count in each gateway alone."
    )
    timeout: Span = Field(250, ge=1, description="How long Redis may take to answer.")
    lease: Span = Field(60_000, ge=100, description="A killed gateway's reservations come back after this.")

    @model_validator(mode="after")
    def names_differ(self) -> "LimitsConfig":
        """Rules are told apart by name."""
        names = [rule.name for rule in self.rules]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"rules: two are named {sorted(twice)[0]!r}")
        return self


def read_limits(path: Path) -> LimitsConfig:
    """The limits of a YAML file: the block `limits`, or the file as a whole. Raises UserError with file and key."""
    value = read_yaml(path)
    return validated(LimitsConfig, value.get("limits", value), str(path))
