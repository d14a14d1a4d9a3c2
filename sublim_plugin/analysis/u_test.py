"""The u-test of an inverted U (Lind and Mehlum 2010), with Fieller's interval of the extremum.

"With or without U? The appropriate test for a U-shaped relationship", Oxford Bulletin of Economics
and Statistics 72(1), 109-118: a quadratic must rise at the low end of the range and fall at the
high end; the larger of the two one-sided p-values is the test's (Sasabuchi 1980). It leans on the
quadratic's form: a curve that rises and then stays flat passes it more often than its level says
(see `simulate.py`), so it supports a two-lines test and never stands alone.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.rank_curves import check_curves
from sublim_plugin.analysis.replication import MIN_DATASETS
from sublim_plugin.core.errors import InputError


class UTest(BaseModel):
    """Slopes of the quadratic at both ends and the extremum with its Fieller interval, in x.

    `low` and `high` are None where the interval is not a bounded one: the quadratic term is then
    too uncertain to say on which side of the range the extremum lies.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slope_low: float
    slope_high: float
    t_low: float
    t_high: float
    p: float
    extremum: float | None
    low: float | None
    high: float | None
    df: float


def too_few_curves(values_DK: Floats) -> str:
    """Why there is no u-test of these curves, or "" if there is one."""
    n = int((np.isfinite(values_DK).sum(1) >= 3).sum())
    if n >= MIN_DATASETS:
        return ""
    return f"{n} datasets with 3 ranks, a u-test needs at least {MIN_DATASETS}"


def u_test(ranks: Floats, values_DK: Floats) -> UTest:
    """Test one trait's rank curves on log2(rank); the extremum is in log2(rank).

    Each dataset gives its own quadratic; their mean and the spread between them are tested with
    Student's t on datasets - 1 degrees of freedom. NaN marks a missing cell; datasets with fewer
    than 3 ranks are left out.

    Raises:
        InputError: fewer than `MIN_DATASETS` datasets have 3 ranks.
    """
    check_curves(ranks, values_DK[None])
    if reason := too_few_curves(values_DK):
        raise InputError(reason)
    x_K = np.log2(ranks)
    coefficients = []
    for values_K in values_DK:
        seen_K = np.isfinite(values_K)
        if seen_K.sum() >= 3:
            design = np.vander(x_K[seen_K], 3, increasing=True)
            coefficients.append(np.linalg.lstsq(design, values_K[seen_K], rcond=None)[0][1:])
    n = len(coefficients)
    curves_D2 = np.array(coefficients)
    return u_test_of(
        curves_D2.mean(0), np.cov(curves_D2.T, ddof=1) / n, n - 1, float(x_K[0]), float(x_K[-1])
    )


def u_test_of_points(x: Floats, y: Floats) -> UTest:
    """Lind and Mehlum's test of independent points, as the R package `utest` has it.

    The ends are the smallest and largest x. Points that share a dataset are not independent.
    """
    regression: Any = import_module("statsmodels.regression.linear_model")
    result = regression.OLS(y, np.vander(x, 3, increasing=True)).fit()
    covariance = np.asarray(result.cov_params())[1:, 1:]
    return u_test_of(
        np.asarray(result.params)[1:],
        covariance,
        float(result.df_resid),
        float(x.min()),
        float(x.max()),
    )


def u_test_of(
    coefficients: Floats, covariance: Floats, df: float, x_low: float, x_high: float
) -> UTest:
    """The inverted-U test of y = b0 + b1 x + b2 x^2 from (b1, b2) and their 2 x 2 covariance."""
    slope, t = [], []
    for x in (x_low, x_high):
        weights = np.array([1.0, 2 * x])
        slope.append(float(weights @ coefficients))
        t.append(_divide(slope[-1], math.sqrt(max(0.0, float(weights @ covariance @ weights)))))
    p = max(float(stats.t.sf(t[0], df)), float(stats.t.cdf(t[1], df)))
    b1, b2 = (float(b) for b in coefficients)
    low, high = fieller(b1, b2, covariance, float(stats.t.ppf(0.975, df)))
    return UTest(
        slope_low=slope[0],
        slope_high=slope[1],
        t_low=t[0],
        t_high=t[1],
        p=p,
        extremum=-b1 / (2 * b2) if b2 else None,
        low=low,
        high=high,
        df=df,
    )


def fieller(
    b1: float, b2: float, covariance: Floats, quantile: float
) -> tuple[float, float] | tuple[None, None]:
    """Fieller's interval of -b1 / (2 b2) (Fieller 1954), or (None, None) if it is not bounded.

    The values m for which b1 + 2 m b2 = 0 is not rejected solve a quadratic inequality; it is
    bounded exactly when b2 differs from 0 at the same level.
    """
    s11, s12, s22 = float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1])
    square = quantile**2
    a = 4 * (b2**2 - square * s22)
    half = 2 * (b1 * b2 - square * s12)
    c = b1**2 - square * s11
    inside = half**2 - a * c
    if a <= 0 or inside < 0:
        return None, None
    root = math.sqrt(inside)
    return (-half - root) / a, (-half + root) / a


def _divide(value: float, by: float) -> float:
    if by > 0:
        return value / by
    return math.copysign(math.inf, value) if value else 0.0
