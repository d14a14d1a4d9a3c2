"""Intervals of a mean over datasets and questions, both clusters; replies are never units.

value[d, q] = mean + dataset d + question q + rest. The variance of the grand mean has a part from
datasets and a part from questions (less what both count, the rest), as for two-way clustered errors
(Cameron, Gelbach and Miller 2011). Each part gets Student's t quantile of its own number of
clusters, and the squared half-widths add up (the large-sample bounds of Graybill and Wang 1980):
6 datasets earn a quantile of 2.57 where datasets differ, 50 questions 2.01 where questions do.

Resampling datasets and questions instead (`cluster_bootstrap`: percentile, BCa, studentized) covers
less nearly everywhere; `simulate.py` prints the comparison of `docs/statistics.md`.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import optimize, stats

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.replication import MIN_DATASETS, too_few_datasets


class Interval(BaseModel):
    """A mean with its interval; `low` and `high` are None with too few datasets (`reason`).

    `se_datasets` and `se_questions` are the parts of the standard error; the latter is 0 where
    there is one value per dataset, that is, where questions are taken as fixed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    se_datasets: float | None
    se_questions: float | None
    low: float | None
    high: float | None
    level: float
    n_datasets: int
    n_questions: int
    reason: str


def interval(values_DQ: Floats, level: float = 0.95) -> Interval:
    """The mean over datasets and questions and its interval.

    Args:
        values_DQ: one value per dataset and question, averaged over training seeds; (D, 1) where
            there is one value per dataset.
    """
    d, q = values_DQ.shape
    found = Interval(
        mean=float(values_DQ.mean()),
        se_datasets=None,
        se_questions=None,
        low=None,
        high=None,
        level=level,
        n_datasets=d,
        n_questions=q,
        reason=too_few_datasets(d),
    )
    if d < MIN_DATASETS:
        return found
    between, over = (float(part[0]) for part in variances(values_DQ[None]))
    half = float(half_widths(np.array([between]), np.array([over]), d, q, level)[0])
    return found.model_copy(
        update={
            "se_datasets": math.sqrt(between),
            "se_questions": math.sqrt(over),
            "low": found.mean - half,
            "high": found.mean + half,
        }
    )


def variances(values_NDQ: Floats) -> tuple[Floats, Floats]:
    """Variance of the grand mean of N draws from datasets and from questions, each (N,).

    What is neither dataset nor question is in the first part already.
    """
    _, d, q = values_NDQ.shape
    dataset_ND = values_NDQ.mean(2)
    between_N = dataset_ND.var(1, ddof=1) / d
    if q == 1:
        return between_N, np.zeros_like(between_N)
    question_NQ = values_NDQ.mean(1)
    rest_NDQ = values_NDQ - dataset_ND[:, :, None] - question_NQ[:, None, :]
    rest_NDQ += values_NDQ.mean((1, 2))[:, None, None]
    rest_N = (rest_NDQ**2).sum((1, 2)) / ((d - 1) * (q - 1)) / (d * q)
    return between_N, np.maximum(question_NQ.var(1, ddof=1) / q - rest_N, 0.0)


def half_widths(
    between_N: Floats, over_N: Floats, n_datasets: int, n_questions: int, level: float
) -> Floats:
    """Half the width of the interval from the two parts of `variances` (N,)."""
    tail = (1 + level) / 2
    squares_N = stats.t.ppf(tail, n_datasets - 1) ** 2 * between_N
    if n_questions > 1:
        squares_N = squares_N + stats.t.ppf(tail, n_questions - 1) ** 2 * over_N
    found: Floats = np.sqrt(squares_N)
    return found


def p_beyond(found: Interval, value: float) -> float:
    """One-sided p that the true mean is not on the side of `value` where the estimate lies.

    It is the p of the interval: below .05 exactly where the 90% interval leaves `value` out.
    1/2 at the estimate itself.
    """
    if found.se_datasets is None or found.se_questions is None:
        raise ValueError(found.reason)
    distance = abs(found.mean - value)
    between, over = np.array([found.se_datasets**2]), np.array([found.se_questions**2])
    if not distance:
        return 0.5
    if not between[0] and not over[0]:
        return 0.0

    def gap(log_p: float) -> float:
        level = 1 - 2 * math.exp(log_p)
        half = half_widths(between, over, found.n_datasets, found.n_questions, level)
        return float(half[0]) - distance

    least, most = math.log(1e-12), math.log(0.5)
    return 1e-12 if gap(least) < 0 else math.exp(float(optimize.brentq(gap, least, most)))
