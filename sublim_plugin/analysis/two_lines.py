"""The two-lines test of an inverted U (Simonsohn 2018), with datasets as the unit.

Simonsohn, "Two lines: A valid alternative to the invalid testing of U-shaped relationships with
quadratic regressions", AMPPS 1(4), 538-555. Two lines that need not meet; the claim needs a rising
one and a falling one, each at two-sided p < .05. The break is set by the Robin Hood rule: within
the flat top of a smooth, at the quantile that favours the weaker line.

`two_lines` differs from the paper in two places, because here each dataset gives one whole curve:
- A line's slope is the mean over datasets of each dataset's own slope. Its standard error is the
  larger of the one from the spread between datasets and the one from the dataset x rank mean
  square, so that neither a few alike datasets nor datasets of different steepness make it small;
  its degrees of freedom are those of the two by Satterthwaite.
- The break is itself one of few ranks and chosen for being high; counted in both lines it would
  tilt both towards an inverted U. It belongs to the line with fewer ranks only.
`simulate.py` measures what this does. `two_lines_of_points` is the paper's own version.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from sublim_plugin.analysis.arrays import Bools, Floats
from sublim_plugin.analysis.rank_curves import (
    additive_fit,
    check_curves,
    larger_variance,
    ratio,
    slopes,
)
from sublim_plugin.analysis.replication import MIN_DATASETS
from sublim_plugin.analysis.smoothing_spline import flat_top
from sublim_plugin.core.errors import InputError

MIN_RANKS = 4
"""Two lines of two ranks each."""


class TwoLines(BaseModel):
    """Slopes per doubling of the rank below and above `break_rank`; `p` is the larger of the two.

    `p_up` and `p_down` are two-sided p-values of a rising first and a falling second line, and 1
    where a line runs the other way or cannot be fitted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    break_rank: float
    slope_up: float
    slope_down: float
    t_up: float
    t_down: float
    p_up: float
    p_down: float
    p: float
    df_up: float | None
    df_down: float | None


def two_lines(ranks: Floats, values_DK: Floats) -> TwoLines:
    """Test one trait's rank curves, log2(rank) on the x axis.

    Args:
        ranks: ascending.
        values_DK: transmission of each dataset at each rank, NaN where a cell is missing.

    Raises:
        InputError: fewer than `MIN_RANKS` ranks or `MIN_DATASETS` datasets, or an empty one.
    """
    found = two_lines_batch(ranks, values_DK[None])
    return TwoLines(
        break_rank=float(2 ** found["break_x"][0]),
        **{name: float(found[name][0]) for name in found if name != "break_x"},
    )


def two_lines_batch(ranks: Floats, values_NDK: Floats) -> dict[str, Any]:
    """`two_lines` of N draws at once, each field an array (N,), for simulations."""
    check_curves(ranks, values_NDK)
    n_datasets = values_NDK.shape[1]
    if len(ranks) < MIN_RANKS:
        raise InputError(f"{len(ranks)} ranks, a two-lines test needs at least {MIN_RANKS}")
    if n_datasets < MIN_DATASETS:
        raise InputError(f"{n_datasets} datasets, a two-lines test needs at least {MIN_DATASETS}")
    x_K = np.log2(ranks)
    fit = additive_fit(values_NDK)
    flat_NK = flat_top(x_K, fit.mean_NK, fit.count_K, fit.within_N, fit.n)
    copies_K = fit.count_K.astype(int)

    def lines(break_N: Floats) -> list[tuple[Floats, Floats, Floats]]:
        """Slope, t and degrees of freedom of both lines, each (N,)."""
        found = []
        for side_NK in _sides(x_K, break_N):
            slope_ND, spread_ND = slopes(x_K, values_NDK, side_NK)
            count_N = np.isfinite(slope_ND).sum(1)
            mean_N = np.nansum(slope_ND, axis=1) / np.maximum(count_N, 1)
            enough_N = count_N >= MIN_DATASETS
            off_ND = np.where(np.isfinite(slope_ND), slope_ND - mean_N[:, None], 0.0)
            between_N = (off_ND**2).sum(1) / np.maximum(count_N - 1, 1) / np.maximum(count_N, 1)
            pooled_N = fit.error_N * np.nansum(1 / spread_ND, axis=1) / np.maximum(count_N, 1) ** 2
            square_N, df_N = larger_variance(between_N, count_N - 1.0, pooled_N, fit.df)
            t_N = np.where(enough_N, ratio(mean_N, np.sqrt(square_N)), np.nan)
            found.append((mean_N, t_N, df_N))
        return found

    start_N = _quantile(x_K, flat_NK, copies_K, np.full(len(flat_NK), 0.5))
    (_, first_N, _), (_, second_N, _) = lines(start_N)
    break_N = _quantile(x_K, flat_NK, copies_K, _weaker(first_N, second_N))
    (slope_up, t_up, df_up), (slope_down, t_down, df_down) = lines(break_N)
    p_up, p_down = _p_value(t_up, df_up), _p_value(-t_down, df_down)
    return {
        "break_x": break_N,
        "slope_up": slope_up,
        "slope_down": slope_down,
        "t_up": t_up,
        "t_down": t_down,
        "p_up": p_up,
        "p_down": p_down,
        "p": np.maximum(p_up, p_down),
        "df_up": df_up,
        "df_down": df_down,
    }


def two_lines_of_points(x: Floats, y: Floats) -> TwoLines:
    """Simonsohn's test of independent points (x, y), as the R package `twolines` 0.52 has it.

    The break counts in both lines; HC3 standard errors (HC1 where a line has too few points for
    HC3), normal p-values. `break_rank` is 2 to the break's x. It looks for an inverted U only.
    Points that share a dataset are not independent: then this is optimistic.
    """
    x_K, index, count_K = np.unique(x, return_inverse=True, return_counts=True)
    if len(x_K) < MIN_RANKS:
        raise InputError(f"{len(x_K)} values of x, a two-lines test needs at least {MIN_RANKS}")
    mean_K = np.bincount(index, y) / count_K
    within = float(((y - mean_K[index]) ** 2).sum())
    flat_NK = flat_top(x_K, mean_K[None], count_K.astype(float), np.array([within]), float(len(x)))
    start = _quantile(x_K, flat_NK, count_K, np.array([0.5]))[0]
    z_up, z_down = line_of_points(x, y, start, 0)[1], line_of_points(x, y, start, 1)[1]
    share = _weaker(np.array([z_up]), np.array([z_down]))
    at = float(_quantile(x_K, flat_NK, count_K, share)[0])
    (slope_up, z_up), (slope_down, z_down) = (
        line_of_points(x, y, at, 0),
        line_of_points(x, y, at, 1),
    )
    p_up = float(_p_value(np.array([z_up]), None)[0])
    p_down = float(_p_value(np.array([-z_down]), None)[0])
    return TwoLines(
        break_rank=float(2**at),
        slope_up=slope_up,
        slope_down=slope_down,
        t_up=z_up,
        t_down=z_down,
        p_up=p_up,
        p_down=p_down,
        p=max(p_up, p_down),
        df_up=None,
        df_down=None,
    )


def line_of_points(x: Floats, y: Floats, at: float, side: int) -> tuple[float, float]:
    """Slope and z (HC3) of line 0, up to the break `at`, or 1, from it; the other is fitted too."""
    regression: Any = import_module("statsmodels.regression.linear_model")
    own = (x <= at) if side == 0 else (x >= at)
    off = x - at
    columns = [np.ones_like(x), ~own, np.where(own, off, 0)]
    if len(np.unique(x[~own])) > 1:
        columns.append(np.where(own, 0, off))
    design = np.column_stack(columns)
    result = regression.OLS(y, design.astype(float)).fit()
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = result.get_robustcov_results("HC3").cov_params()[2, 2]
    if not np.isfinite(variance):
        variance = result.get_robustcov_results("HC1").cov_params()[2, 2]
    slope = float(result.params[2])
    return slope, float(ratio(np.array(slope), np.array(np.sqrt(variance))))


def _sides(x_K: Floats, break_N: Floats) -> tuple[Bools, Bools]:
    """Ranks of the first and of the second line (N, K); the break is in the shorter one."""
    low = x_K <= break_N[:, None] + 1e-9
    high = x_K >= break_N[:, None] - 1e-9
    shared = low & high
    longer_low = (low.sum(1) > high.sum(1))[:, None]
    return low & ~(shared & longer_low), high & ~(shared & ~longer_low)


def _weaker(t_up: Floats, t_down: Floats) -> Floats:
    """Simonsohn's quantile: near 1 (a late break) where the first line is the weaker."""
    up, down = np.nan_to_num(np.abs(t_up)), np.nan_to_num(np.abs(t_down))
    total = up + down
    with np.errstate(invalid="ignore", divide="ignore"):
        share: Floats = np.where(np.isfinite(total) & (total > 0), down / total, 0.5)
    return share


def _quantile(x_K: Floats, flat_NK: Bools, copies_K: Any, share_N: Floats) -> Floats:
    """The quantile of x over the observations in the flat top, linear between them (N,)."""
    found = np.empty(len(flat_NK))
    for row, flat_K in enumerate(flat_NK):
        found[row] = np.quantile(np.repeat(x_K[flat_K], copies_K[flat_K]), share_N[row])
    return found


def _p_value(t: Floats, df: Floats | None) -> Floats:
    """Two-sided p of a slope that has the sign of a positive `t`; 1 for the other sign or NaN."""
    tail = stats.norm.sf(t) if df is None else stats.t.sf(t, df)
    p: Floats = np.where(t > 0, np.minimum(1.0, 2 * tail), 1.0)
    return p
