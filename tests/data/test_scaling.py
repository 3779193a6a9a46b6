"""Scaling of attributes: held to scikit-learn, saved and applied elsewhere, and checked."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from soma.base.errors import UserError
from soma.data.profile.scaling import Method, Scaler, fit_scaler

GENERATOR = np.random.default_rng(11)
VALUES = {
    "chars": GENERATOR.lognormal(6, 1, 3000), "share": GENERATOR.beta(2, 5, 3000),
    "signed": GENERATOR.normal(-3, 40, 3000),
}  # fmt: skip


@pytest.mark.parametrize("method", get_args(Method))
def test_a_scaler_gives_the_stated_distribution_and_is_the_same_elsewhere(method: Method, tmp_path: Path) -> None:
    scaler = fit_scaler(VALUES, method)
    scaled = scaler.apply(VALUES)
    assert scaler.check(scaled) == {}
    scaler.save(tmp_path / "scaler.json")
    again = Scaler.load(tmp_path / "scaler.json")
    assert again == scaler
    for name, values in VALUES.items():
        np.testing.assert_array_equal(again.apply(VALUES)[name], scaled[name])
        inner = np.abs(scaled[name]) < 3  # at its ends the quantile's inverse is as coarse as the kept quantiles
        np.testing.assert_allclose(scaler.invert(scaled)[name][inner], values[inner], rtol=1e-6, atol=1e-6)
        if method != "quantile":
            np.testing.assert_allclose(scaler.invert(scaled)[name], values, rtol=1e-9, atol=1e-9)
    # Negative control: other data, and data that was not scaled, are told.
    shifted = {name: values * 3 + 500 for name, values in VALUES.items()}
    assert set(scaler.check(scaler.apply(shifted))) == set(VALUES)
    assert set(scaler.check(VALUES)) >= {"chars", "signed"}


@pytest.mark.parametrize(
    ("method", "theirs"),
    [("standard", "StandardScaler"), ("min_max", "MinMaxScaler"), ("robust", "RobustScaler"),
     ("quantile", "QuantileTransformer")],
)  # fmt: skip
def test_methods_are_those_of_scikit_learn(method: Method, theirs: str) -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    more = {"n_quantiles": 1000, "output_distribution": "normal"} if method == "quantile" else {}
    matrix = np.stack(list(VALUES.values()), axis=1)
    fitted = getattr(preprocessing, theirs)(**more).fit(matrix)
    fresh = {name: values[:500] * 1.01 for name, values in VALUES.items()}
    expected = fitted.transform(np.stack(list(fresh.values()), axis=1))
    scaled = fit_scaler(VALUES, method).apply(fresh)
    np.testing.assert_allclose(np.stack(list(scaled.values()), axis=1), expected, rtol=1e-6, atol=1e-6)


def test_formulas_by_hand() -> None:
    values = {"a": [1.0, 2.0, 3.0, 4.0, 5.0]}
    assert fit_scaler(values, "min_max").apply({"a": [1, 3, 6]})["a"].tolist() == [0, 0.5, 1.25]
    assert fit_scaler(values, "robust").apply({"a": [3, 5]})["a"].tolist() == [0, 1]
    np.testing.assert_allclose(fit_scaler(values, "standard").apply({"a": [3, 5]})["a"], [0, np.sqrt(2)])
    np.testing.assert_allclose(fit_scaler(values, "quantile").apply({"a": [3, 4]})["a"], [0, 0.6744898], atol=1e-7)


def test_missing_constant_and_wrong_values() -> None:
    scaler = fit_scaler({"a": [1.0, float("nan"), 3.0], "b": [2.0, 2.0, 2.0]}, "standard")
    scaled = scaler.apply({"a": [float("nan"), 3.0], "b": [2.0, 3.0]})
    assert scaled["a"].tolist() == [0, 1]
    assert scaled["b"].tolist() == [0, 1]
    with pytest.raises(UserError, match="fitted on b too"):
        scaler.apply({"a": [1.0]})
    with pytest.raises(UserError, match="has infinite values"):
        fit_scaler({"a": [1.0, float("inf")]}, "robust")
    with pytest.raises(UserError, match="has no values"):
        fit_scaler({"a": []}, "robust")
    with pytest.raises(UserError, match="no way to scale; there are standard"):
        fit_scaler({"a": [1.0]}, "other")  # type: ignore[arg-type]
    assert "not finite" in scaler.check({"a": [float("nan")], "b": [0.0]})["a"][0]


def test_another_file_is_no_scaler(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="not a scaler of this version"):
        Scaler.load(tmp_path / "x.json")
