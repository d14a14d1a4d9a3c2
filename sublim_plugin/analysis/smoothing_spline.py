"""A natural cubic smoothing spline of rank means, its smoothing chosen by GCV.

It finds the flat top of a rank curve for the Robin Hood break of `two_lines`. With a knot at every
rank it is the smooth that mgcv fits for `s(x, bs="cr", k=<ranks>)`, which the R package `twolines`
uses; scipy's `make_smoothing_spline` gives no standard errors.
"""

from __future__ import annotations

import numpy as np

from sublim_plugin.analysis.arrays import Bools, Floats

_SMOOTHING = np.exp(np.linspace(-12.0, 16.0, 701))
"""Grid of smoothing parameters, relative to the penalty's mean curvature."""


def roughness(x_K: Floats) -> Floats:
    """M (K, K) with f' M f = the integral of g''^2 of the natural cubic spline g through f.

    Green and Silverman 1994, section 2.1. `x_K` ascends and has at least 3 values.
    """
    k, gap = len(x_K), np.diff(x_K)
    second = np.zeros((k, k - 2))
    band = np.zeros((k - 2, k - 2))
    for j in range(k - 2):
        second[j, j] = 1 / gap[j]
        second[j + 1, j] = -1 / gap[j] - 1 / gap[j + 1]
        second[j + 2, j] = 1 / gap[j + 1]
        band[j, j] = (gap[j] + gap[j + 1]) / 3
        if j + 1 < k - 2:
            band[j, j + 1] = band[j + 1, j] = gap[j + 1] / 6
    matrix: Floats = second @ np.linalg.solve(band, second.T)
    return matrix


def smooth(
    x_K: Floats, mean_NK: Floats, count_K: Floats, within_N: Floats, n: float
) -> tuple[Floats, Floats]:
    """The smooth at each x and its standard error, both (N, K).

    Args:
        mean_NK: mean of the observations at each x.
        count_K: number of observations behind each mean.
        within_N: sum of squares of the observations about their means.
        n: number of observations less what was already fitted to them (intercepts of datasets).

    The standard error is the Bayesian one (Wahba 1983), as mgcv's `predict(se.fit=TRUE)` gives.
    """
    root_K = np.sqrt(count_K)
    eigen_K, basis_KK = np.linalg.eigh(roughness(x_K) / np.outer(root_K, root_K))
    eigen_K = np.clip(eigen_K, 0.0, None)
    eigen_K[:2] = 0.0  # constant and straight line are not penalised
    shrink_LK = 1 / (1 + _SMOOTHING[:, None] / eigen_K[2:].mean() * eigen_K)
    score_NK = (mean_NK * root_K) @ basis_KK
    residual_NL = within_N[:, None] + score_NK**2 @ ((1 - shrink_LK) ** 2).T
    freedom_L = n - shrink_LK.sum(1)
    # A spline through every point of one observation a rank leaves nothing to judge it by.
    criterion_NL = np.where(freedom_L > 0.5, residual_NL / np.maximum(freedom_L, 0.5) ** 2, np.inf)
    best_N = criterion_NL.argmin(1)
    kept_NK = shrink_LK[best_N]
    fit_NK: Floats = (score_NK * kept_NK) @ basis_KK.T / root_K
    noise_N = residual_NL[np.arange(len(best_N)), best_N] / freedom_L[best_N]
    variance_NK = noise_N[:, None] * (kept_NK @ (basis_KK**2).T) / count_K
    return fit_NK, np.sqrt(variance_NK)


def flat_top(x_K: Floats, mean_NK: Floats, count_K: Floats, within_N: Floats, n: float) -> Bools:
    """Which x lie within one standard error of the smooth's interior maximum (N, K).

    The ends never do: Simonsohn (2018) looks for the break in the middle 80% of the data.
    """
    fit_NK, se_NK = smooth(x_K, mean_NK, count_K, within_N, n)
    inside_K = np.zeros(len(x_K), dtype=bool)
    inside_K[1:-1] = True
    top_N = np.where(inside_K, fit_NK, -np.inf).max(1)
    flat: Bools = inside_K & (fit_NK + se_NK >= top_N[:, None])
    return flat
