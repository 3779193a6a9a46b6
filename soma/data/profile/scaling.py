"""Attributes scaled to a stated distribution before they feed a model, with what was fitted kept as JSON.

    scaler = fit_scaler({"chars": values}, "robust"); scaler.save(path)
    Scaler.load(path).apply({"chars": others})        # the same numbers anywhere
    scaler.check(scaled)                              # does the output have the stated distribution?

The methods are those of scikit-learn by the same names: `standard` (mean 0, deviation 1), `min_max` (0 to 1), `robust`
(median 0, interquartile range 1), `quantile` (normal: the value's place among the fitted ones through Φ⁻¹).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, get_args

import numpy as np

from soma.base.artefact import read_json, write_json
from soma.base.errors import UserError
from soma.data.profile.significance import kolmogorov_tail, ks

Method = Literal["standard", "min_max", "robust", "quantile"]
FORMAT, VERSION = "soma-scaler", 1
PLACES = 1000  # quantiles that are kept of an attribute
EDGE = 1e-7  # the normal quantile beyond the fitted values is that of this share: ±5.2
NORMAL = NormalDist()


@dataclass(frozen=True)
class Column:
    """One attribute: `(value − shift) / width`, or for `quantile` the fitted quantiles, ascending, at evenly spaced
    shares. A value that is missing (NaN) becomes `missing`, what the fitted median becomes."""

    shift: float = 0.0
    width: float = 1.0
    places: tuple[float, ...] = ()
    missing: float = 0.0

    def apply(self, values_N: np.ndarray) -> np.ndarray:
        """Scaled values, float64."""
        if self.places:
            scaled_N = _normal(_shares(values_N, np.array(self.places)))
        else:
            scaled_N = (values_N - self.shift) / self.width
        return np.where(np.isnan(values_N), self.missing, scaled_N)

    def invert(self, scaled_N: np.ndarray) -> np.ndarray:
        """The values that `apply` makes these of; for `quantile` within the fitted range."""
        if not self.places:
            return scaled_N * self.width + self.shift
        shares_N = np.array([NORMAL.cdf(float(z)) for z in scaled_N])
        return np.interp(shares_N, np.linspace(0, 1, len(self.places)), self.places)


def _shares(values_N: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Where values lie among the fitted quantiles, 0 to 1; among equal ones in the middle of them."""
    shares = np.linspace(0, 1, len(places))
    up_N = np.interp(values_N, places, shares)
    down_N = np.interp(-values_N, -places[::-1], -shares[::-1])
    return (up_N - down_N) / 2


def _normal(shares_N: np.ndarray) -> np.ndarray:
    clipped_N = np.clip(np.nan_to_num(shares_N, nan=0.5), EDGE, 1 - EDGE)
    return np.array([NORMAL.inv_cdf(float(share)) for share in clipped_N])


@dataclass(frozen=True)
class Scaler:
    """What `fit_scaler` found, by attribute."""

    method: Method
    columns: dict[str, Column]

    def apply(self, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The attributes scaled; others are left out. Raises UserError for one that is missing."""
        if missing := [name for name in self.columns if name not in values]:
            raise UserError(
                f"the scaler was fitted on {', '.join(missing)} too; there are {', '.join(values) or 'none'}"
            )
        return {name: column.apply(np.asarray(values[name], np.float64)) for name, column in self.columns.items()}

    def invert(self, scaled: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The attributes as they were."""
        return {name: column.invert(np.asarray(scaled[name], np.float64)) for name, column in self.columns.items()}

    def check(self, scaled: Mapping[str, Any], tolerance: float = 0.1) -> dict[str, list[str]]:
        """What is not as `method` promises, by attribute: empty where all is well.

        Location and width may be off by `tolerance`; `quantile` must look normal to the test of Kolmogorov and
        Smirnov, or be no further off than half of `tolerance` (with many values no sample is exactly normal). NaN and
        infinities are named.
        """
        found = {name: _problems(self.method, np.asarray(scaled[name], np.float64), tolerance) for name in self.columns}
        return {name: problems for name, problems in found.items() if problems}

    def save(self, path: Path) -> None:
        """As JSON; numbers are written so that they read back as they were."""
        columns = {
            name: {"shift": one.shift, "width": one.width, "places": list(one.places), "missing": one.missing}
            for name, one in self.columns.items()
        }
        write_json(path, {"format": FORMAT, "version": VERSION, "method": self.method, "columns": columns})

    @classmethod
    def load(cls, path: Path) -> "Scaler":
        """A saved scaler. Raises UserError for another file."""
        facts = read_json(path)
        if not isinstance(facts, dict) or facts.get("format") != FORMAT or facts.get("version") != VERSION:
            raise UserError(f"{path}: not a scaler of this version; `fit_scaler(…).save` writes one")
        columns = {
            name: Column(one["shift"], one["width"], tuple(one["places"]), one["missing"])
            for name, one in facts["columns"].items()
        }
        return cls(facts["method"], columns)


def fit_scaler(values: Mapping[str, Any], method: Method) -> Scaler:
    """A scaler of these attributes; NaN is left out. An attribute that does not vary has a width of 1.

    Raises UserError for an unknown method, infinite values, and an attribute without values.
    """
    if method not in get_args(Method):
        raise UserError(f"{method}: no way to scale; there are {', '.join(get_args(Method))}")
    columns = {}
    for name, column in values.items():
        values_N = np.asarray(column, np.float64)
        values_N = values_N[~np.isnan(values_N)]
        if not len(values_N) or not np.isfinite(values_N).all():
            raise UserError(
                f"{name}: {'has infinite values' if len(values_N) else 'has no values'}; nothing can be fitted"
            )
        columns[name] = _fit(values_N, method)
    return Scaler(method, columns)


def _fit(values_N: np.ndarray, method: Method) -> Column:
    middle = float(np.median(values_N))
    if method == "quantile":
        places = np.quantile(values_N, np.linspace(0, 1, min(PLACES, max(2, len(values_N)))))
        fitted = Column(places=tuple(places.tolist()))
        return Column(places=fitted.places, missing=float(fitted.apply(np.array([middle]))[0]))
    if method == "standard":
        shift, width = float(values_N.mean()), float(values_N.std())
    elif method == "min_max":
        shift, width = float(values_N.min()), float(values_N.max() - values_N.min())
    else:
        low, high = np.quantile(values_N, [0.25, 0.75])
        shift, width = middle, float(high - low)
    width = width if width > 0 else 1.0
    return Column(shift, width, missing=(middle - shift) / width)


def _problems(method: Method, scaled_N: np.ndarray, tolerance: float) -> list[str]:
    if not len(scaled_N):
        return ["no values"]
    if not np.isfinite(scaled_N).all():
        return [f"{int((~np.isfinite(scaled_N)).sum())} values are not finite"]
    if method == "min_max":
        low, high = float(scaled_N.min()), float(scaled_N.max())
        return [f"from {low:.4g} to {high:.4g}, not within 0 to 1"] if low < -tolerance or high > 1 + tolerance else []
    if method == "quantile":
        values, times = np.unique(scaled_N, return_counts=True)
        steps = np.array([NORMAL.inv_cdf((place + 0.5) / 4096) for place in range(4096)])
        distance = ks((values, times), (steps, np.ones(4096, np.int64)))[0]
        count = float(np.sqrt(len(scaled_N)))
        p = kolmogorov_tail((count + 0.12 + 0.11 / count) * distance)
        return [f"not normal: D {distance:.3g}, p {p:.2g}"] if p < 0.01 and distance > tolerance / 2 else []
    if method == "standard":
        found = [("mean", float(scaled_N.mean()), 0.0), ("deviation", float(scaled_N.std()), 1.0)]
    else:
        low, middle, high = (float(value) for value in np.quantile(scaled_N, [0.25, 0.5, 0.75]))
        found = [("median", middle, 0.0), ("interquartile range", high - low, 1.0)]
    return [f"{name} {value:.4g}, not {wanted:g}" for name, value, wanted in found if abs(value - wanted) > tolerance]
