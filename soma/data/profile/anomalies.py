"""Documents unlike the others, by robust statistics of their attributes, and what it is about each.

Each attribute becomes a robust z-score: its distance from the median over 1.4826 times the median absolute deviation
(Iglewicz and Hoaglin 1993), counts on a logarithmic scale. The combined score is the Mahalanobis distance under a
centre and covariance of the most central three quarters of a sample, found by concentration steps (Rousseeuw and Van
Driessen, Technometrics 41, 1999) with Ledoit and Wolf's shrinkage (J. Multivariate Analysis 88, 2004), so that
anomalies do not hide each other. All documents are scored in a second look at their attributes; texts are read of
those that are shown.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from soma.data.profile.leaks import take_rows
from soma.data.profile.significance import chi2_quantile

CENTRAL = 0.75  # share of the sample that centre and covariance are taken from
STEPS = 20  # concentration steps at most
FLAT = 0.05  # variance of z-scores among the central documents, below which an attribute hardly varies
CLIP = 20.0  # a z-score beyond it says no more
LEVEL = 0.999  # of a normal cloud lies below the threshold
LOGARITHMIC = 20.0  # attributes without negative values that reach this are counts or lengths
NARROWEST = 0.02  # of the range of the middle 98 %: a probability that is nearly always 1 has hardly a deviation
SHOWN = 20
REASONS = 3
FEWEST = 30  # documents; below it nothing is said
EXCERPT = 600


@dataclass(frozen=True)
class Scale:
    """How one attribute is measured: `log` on a log scale, `centre` its median, `width` its robust deviation.

    Where more than half of the values are equal that deviation is zero. Then `step` is the z-score of merely being
    another value, by how rare that is, and distances count beyond `usual`, the median distance of the others, in units
    of `width`.
    """

    log: bool
    centre: float
    width: float
    step: float = 0.0
    usual: float = 0.0

    def z(self, values_N: np.ndarray) -> np.ndarray:
        """Robust z-scores; what is not finite counts as the median."""
        apart_N = np.where(np.isfinite(values_N), self._scaled(values_N) - self.centre, 0.0)
        if not self.step:
            return apart_N / self.width
        far_N = self.step + np.maximum(0, np.abs(apart_N) - self.usual) / self.width
        return np.where(np.abs(apart_N) > 1e-12, np.sign(apart_N) * far_N, 0.0)

    def _scaled(self, values_N: np.ndarray) -> np.ndarray:
        return np.log1p(np.maximum(np.nan_to_num(values_N), 0)) if self.log else values_N


def scale_of(values_N: np.ndarray) -> Scale | None:
    """The scale of an attribute's values; None where nothing varies."""
    log = bool(values_N.min() >= 0 and values_N.max() >= LOGARITHMIC)
    scaled_N = np.log1p(values_N) if log else values_N
    centre = float(np.median(scaled_N))
    apart_N = np.abs(scaled_N - centre)
    width = 1.4826 * float(np.median(apart_N))
    if width > 1e-9:
        low, high = np.quantile(scaled_N, [0.01, 0.99])
        return Scale(log, centre, max(width, NARROWEST * float(high - low)))
    others_N = apart_N[apart_N > 1e-12]
    if not len(others_N):
        return None
    usual = float(np.median(others_N))
    spread = 1.4826 * float(np.median(np.abs(others_N - usual)))
    step = NormalDist().inv_cdf(1 - len(others_N) / len(values_N) / 2)
    return Scale(log, centre, spread if spread > 1e-9 else usual, max(step, 1e-3), usual)


@dataclass(frozen=True)
class Model:
    """What is usual: the `scales` of attributes by name, `mean` and `inverse` covariance of their z-scores,
    `threshold`: documents at a larger distance are anomalous."""

    scales: dict[str, Scale]
    mean: np.ndarray
    inverse: np.ndarray
    threshold: float

    @property
    def names(self) -> list[str]:
        """The attributes, in the order of the columns."""
        return list(self.scales)

    def scores(self, values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(distance_N, z_NA) of documents."""
        z_NA = z_scores(self.scales, values)
        return distances(z_NA, self.mean, self.inverse), z_NA

    def reasons(self, z_A: np.ndarray) -> list[tuple[str, float, float]]:
        """(attribute, its z-score, its share of the squared distance) of one document, the largest shares first."""
        apart_A = np.clip(z_A, -CLIP, CLIP) - self.mean
        parts_A = apart_A * (self.inverse @ apart_A)
        whole = max(1e-12, float(parts_A.sum()))
        order = sorted(range(len(self.names)), key=lambda index: (-parts_A[index], self.names[index]))[:REASONS]
        return [(self.names[i], float(z_A[i]), float(parts_A[i]) / whole) for i in order if parts_A[i] > 0]


def z_scores(scales: Mapping[str, Scale], values: Mapping[str, np.ndarray]) -> np.ndarray:
    """z_NA: a column for each scale."""
    return np.stack([scale.z(np.asarray(values[name], np.float64)) for name, scale in scales.items()], axis=1)


def distances(z_NA: np.ndarray, mean_A: np.ndarray, inverse_AA: np.ndarray) -> np.ndarray:
    """Mahalanobis distances (N,) of z-scores, each cut at `CLIP`."""
    apart_NA = np.clip(z_NA, -CLIP, CLIP) - mean_A
    return np.sqrt(np.maximum(0, np.einsum("na,ab,nb->n", apart_NA, inverse_AA, apart_NA)))


def fit(values: Mapping[str, np.ndarray]) -> Model | None:
    """The model of a sample, attributes of one length; None where it has fewer than `FEWEST` documents or nothing
    varies.

    The threshold is the largest that one in a thousand passes: of a normal cloud, or, since attributes have long
    tails, of a log-normal distribution with the median and the median absolute deviation of the sample's distances.
    """
    columns = {name: np.asarray(column, np.float64) for name, column in sorted(values.items())}
    columns = {name: column for name, column in columns.items() if np.isfinite(column).all()}
    if not columns or len(next(iter(columns.values()))) < FEWEST:
        return None
    scales = {name: scale for name, column in columns.items() if (scale := scale_of(column)) is not None}
    if not scales:
        return None
    z_NA = z_scores(scales, columns)
    mean_A, inverse_AA = robust_covariance(np.clip(z_NA, -CLIP, CLIP))
    logs_N = np.log(np.maximum(distances(z_NA, mean_A, inverse_AA), 1e-9))
    middle = float(np.median(logs_N))
    tail = math.exp(middle + NormalDist().inv_cdf(LEVEL) * 1.4826 * float(np.median(np.abs(logs_N - middle))))
    return Model(scales, mean_A, inverse_AA, max(tail, math.sqrt(chi2_quantile(LEVEL, len(scales)))))


def robust_covariance(z_NA: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean_A, inverse covariance_AA) of the most central `CENTRAL` of the rows, scaled so that the median squared
    distance of all rows is that of a normal cloud.

    An attribute that hardly varies among the central rows (nearly all have the same value) counts with a deviation of
    1, that of its z-scores: else merely having another value would be as far as can be.
    """
    size = max(z_NA.shape[1] + 1, math.ceil(CENTRAL * len(z_NA)))
    apart_N = (z_NA**2).sum(1)
    chosen = np.argsort(apart_N, kind="stable")[:size]
    for _ in range(STEPS):
        mean_A = z_NA[chosen].mean(0)
        covariance_AA = shrunk_covariance(z_NA[chosen] - mean_A)
        flat_A = (z_NA[chosen] - mean_A).var(0) < FLAT
        covariance_AA[flat_A, :] = covariance_AA[:, flat_A] = 0.0
        covariance_AA[flat_A, flat_A] = 1.0
        inverse_AA = np.linalg.inv(covariance_AA)
        apart_N = np.einsum("na,ab,nb->n", z_NA - mean_A, inverse_AA, z_NA - mean_A)
        central = np.sort(np.argsort(apart_N, kind="stable")[:size])
        if np.array_equal(central, np.sort(chosen)):
            break
        chosen = central
    freedom = max(1, int((~flat_A).sum()))
    scale = max(1.0, float(np.median(apart_N)) / chi2_quantile(0.5, freedom))
    return mean_A, inverse_AA / scale


def shrunk_covariance(x_NA: np.ndarray) -> np.ndarray:
    """Ledoit and Wolf's covariance of centred rows: the sample's, drawn towards a multiple of the identity."""
    count, size = x_NA.shape
    sample_AA = x_NA.T @ x_NA / count
    scale = max(float(np.trace(sample_AA)) / size, 1e-6)
    target_AA = scale * np.eye(size)
    distance = float(((sample_AA - target_AA) ** 2).sum())
    noise = (float(((x_NA**2).sum(1) ** 2).sum()) / count - float((sample_AA**2).sum())) / count
    share = 1.0 if distance <= 0 else min(1.0, max(0.0, noise / distance))
    share = max(share, 1e-3)  # attributes that repeat each other leave the sample's covariance singular
    return share * target_AA + (1 - share) * sample_AA


def anomalies(parts: Sequence[Path], sample: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`{"documents", "threshold", "above": count, "attributes", "examples": [{source, score, reasons: [{attribute,
    value, z, share, usual}], excerpt}], "by_attribute"}`: the `SHOWN` most unusual documents, and how often each
    attribute is the main reason.

    `sample`: rows of `Summary.sample`. `usual` is the median.
    """
    import pyarrow.parquet as pq

    names = sorted(set.intersection(*(set(row["values"]) for row in sample))) if sample else []
    model = fit({name: np.array([row["values"][name] for row in sample]) for name in names})
    if model is None:
        return {
            "documents": len(sample),
            "threshold": None,
            "above": 0,
            "attributes": [],
            "examples": [],
            "by_attribute": {},
        }
    best: list[tuple[float, int, np.ndarray]] = []
    above, start, mains = 0, 0, dict.fromkeys(model.names, 0)
    for path in parts:
        file = pq.ParquetFile(path)
        if not file.metadata.num_rows:
            continue
        for batch in file.iter_batches(batch_size=8192, columns=model.names):
            columns = {name: batch[name].to_numpy(zero_copy_only=False) for name in model.names}
            score_N, z_NA = model.scores(columns)
            over = np.flatnonzero(score_N > model.threshold)
            above += len(over)
            for row in over.tolist():
                mains[model.reasons(z_NA[row])[0][0]] += 1
            top = over[np.argsort(-score_N[over], kind="stable")[:SHOWN]]
            best += [(float(score_N[row]), start + row, z_NA[row]) for row in top.tolist()]
            best = sorted(best, key=lambda one: (-one[0], one[1]))[:SHOWN]
            start += len(score_N)
    rows = take_rows(parts, np.array([row for _, row, _ in best], np.int64), ["source", "text", *model.names])
    examples = [_example(model, score, z_A, row) for (score, _, z_A), row in zip(best, rows, strict=True)]
    return {
        "documents": start, "threshold": model.threshold, "above": above, "attributes": model.names,
        "examples": examples,
        "by_attribute": dict(sorted(((k, v) for k, v in mains.items() if v), key=lambda item: (-item[1], item[0]))),
    }  # fmt: skip


def _example(model: Model, score: float, z_A: np.ndarray, row: dict[str, Any]) -> dict[str, Any]:
    reasons = []
    for name, z, share in model.reasons(z_A):
        scale = model.scales[name]
        usual = math.expm1(scale.centre) if scale.log else scale.centre
        reasons.append({"attribute": name, "value": float(row[name]), "z": z, "share": share, "usual": usual})
    return {"source": row["source"], "score": score, "reasons": reasons, "excerpt": str(row["text"])[:EXCERPT]}
