"""Rank curves of several datasets as one array, their additive fit, and slopes within datasets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sublim_plugin.analysis.arrays import Bools, Floats
from sublim_plugin.core.errors import InputError


@dataclass(frozen=True)
class AdditiveFit:
    """Least squares of value = dataset + rank, the repeated-measures decomposition.

    `mean_NK` are rank means adjusted for the datasets that a rank misses; `error_N` is the mean
    square of dataset x rank on `df` degrees of freedom: the error of any contrast of ranks if that
    interaction is alike everywhere (sphericity). `links` says where missing cells leave ranks that
    no chain of datasets compares, or nothing to judge scatter by; "" where the fit may be read.
    """

    mean_NK: Floats
    count_K: Floats
    within_N: Floats
    error_N: Floats
    df: int
    n: int
    links: str


def check_curves(ranks: Floats, values_NDK: Floats) -> None:
    """Raise InputError where ranks do not ascend or a rank, or a dataset, has no value at all."""
    if len(ranks) != values_NDK.shape[2]:
        raise InputError(f"{len(ranks)} ranks, but values of {values_NDK.shape[2]}")
    if np.any(np.diff(ranks) <= 0) or ranks[0] <= 0:
        raise InputError(f"ranks need to ascend and be positive, found {ranks.tolist()}")
    seen_DK = np.isfinite(values_NDK[0])
    if not (np.isfinite(values_NDK) == seen_DK).all():
        raise InputError("draws differ in which cells are missing")
    for axis, name, labels in ((0, "rank", ranks), (1, "dataset", np.arange(seen_DK.shape[0]))):
        empty = labels[~seen_DK.any(axis)]
        if len(empty):
            raise InputError(f"{name} {empty[0]:g} has no value; leave it out")


def additive_fit(values_NDK: Floats) -> AdditiveFit:
    """Fit dataset + rank to the cells that are there (NaN: missing, in the same places for all)."""
    _, d, k = values_NDK.shape
    seen_DK = np.isfinite(values_NDK[0])
    dataset, rank = np.nonzero(seen_DK)
    design = np.zeros((len(dataset), d + k - 1))
    design[np.arange(len(dataset)), dataset] = 1.0
    later = rank > 0
    design[np.nonzero(later)[0], d + rank[later] - 1] = 1.0
    observed = values_NDK[:, seen_DK]
    fitted = np.linalg.pinv(design)
    coefficients = observed @ fitted.T
    residual = observed - coefficients @ design.T
    freedom = int(np.linalg.matrix_rank(design))
    df = len(dataset) - freedom
    links = ""
    if freedom < d + k - 1:
        links = "datasets share too few ranks to compare the ranks with each other"
    elif df < 1:
        links = "too many cells are missing to tell ranks from scatter"
    within_N = (residual**2).sum(1)
    effect_NK = np.concatenate([np.zeros((len(observed), 1)), coefficients[:, d:]], axis=1)
    level_N = coefficients[:, :d].mean(1)
    return AdditiveFit(
        mean_NK=effect_NK + level_N[:, None],
        count_K=seen_DK.sum(0).astype(float),
        within_N=within_N,
        error_N=within_N / df if df > 0 else np.full(len(observed), np.nan),
        df=df,
        n=len(dataset) - (d - 1),
        links=links,
    )


def larger_variance(between: Floats, between_df: Floats, pooled: Floats, pooled_df: int) -> Any:
    """The larger of two estimates of one variance, and its degrees of freedom.

    `pooled` rests on many degrees; what `between` datasets exceeds it by rests on few. So the sum
    has those of Satterthwaite (1946): many where the pooled one rules, few where datasets do.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.maximum(between - pooled, 0.0)
        total = np.where(np.isfinite(pooled), pooled + excess, between)
        shared = pooled**2 / max(pooled_df, 1) + excess**2 / np.maximum(between_df, 1)
        df = np.where(np.isfinite(pooled) & (shared > 0), total**2 / shared, between_df)
    return total, np.maximum(df, 1.0)


def slopes(x_K: Floats, values_NDK: Floats, side_NK: Bools) -> tuple[Floats, Floats]:
    """Least-squares slope of each dataset over the ranks of one side, and its sum of squares of x.

    Both (N, D); NaN where a dataset has fewer than two ranks there.
    """
    seen_DK = np.isfinite(values_NDK[0])
    weight_NDK = (side_NK[:, None, :] & seen_DK).astype(float)
    count_ND1 = weight_NDK.sum(2, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred_NDK = weight_NDK * (x_K - (weight_NDK * x_K).sum(2, keepdims=True) / count_ND1)
        spread_ND = (centred_NDK**2).sum(2)
        spread_ND = np.where(count_ND1[..., 0] >= 2, spread_ND, np.nan)
        slope_ND = (centred_NDK * np.where(seen_DK, values_NDK, 0.0)).sum(2) / spread_ND
    return slope_ND, spread_ND


def ratio(value: Floats, se: Floats) -> Floats:
    """value / se, with 0 / 0 = 0, and infinite where only `se` is 0; NaN stays NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where((value == 0) & (se == 0), 0.0, value / se)
    return found
