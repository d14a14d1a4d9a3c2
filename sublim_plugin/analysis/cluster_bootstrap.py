"""Bootstrap intervals of a mean over datasets and questions, to compare `cluster_intervals` with.

Every resample draws datasets and questions with replacement (Owen 2007): both are clusters, and
replies are never drawn. The report does not use these; `docs/statistics.md` says why.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from sublim_plugin.analysis.arrays import Floats

RESAMPLES = 999


def bootstrap_intervals(
    values_DQ: Floats, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float]]:
    """95% intervals by method, all from the same resamples.

    `percentile`; `BCa` (Efron 1987), its acceleration from leaving out each dataset and each
    question; `studentized` by each resample's own standard error of both clusters (Efron and
    Tibshirani 1993, section 12.5).
    """
    d, q = values_DQ.shape
    generator = np.random.default_rng(seed)
    datasets_BD = generator.multinomial(d, np.full(d, 1 / d), resamples) / d
    questions_BQ = generator.multinomial(q, np.full(q, 1 / q), resamples) / q
    dataset_BD = questions_BQ @ values_DQ.T
    mean_B = (datasets_BD * dataset_BD).sum(1)
    variance_B = (datasets_BD * (dataset_BD - mean_B[:, None]) ** 2).sum(1) / (d - 1)
    variance = values_DQ.mean(1).var(ddof=1) / d
    if q > 1:
        question_BQ = datasets_BD @ values_DQ
        variance_B += (questions_BQ * (question_BQ - mean_B[:, None]) ** 2).sum(1) / (q - 1)
        variance += values_DQ.mean(0).var(ddof=1) / q
    mean, se = float(values_DQ.mean()), float(np.sqrt(variance))
    usable = variance_B > 0
    if not usable.any():
        return dict.fromkeys(("percentile", "BCa", "studentized"), (mean, mean))
    t_B = (mean_B[usable] - mean) / np.sqrt(variance_B[usable])
    low, high = np.quantile(t_B, [0.025, 0.975])
    percentile = np.quantile(mean_B, [0.025, 0.975])
    corrected = np.quantile(mean_B, _bca_levels(values_DQ, mean_B, mean))
    return {
        "percentile": (float(percentile[0]), float(percentile[1])),
        "BCa": (float(corrected[0]), float(corrected[1])),
        "studentized": (mean - float(high) * se, mean - float(low) * se),
    }


def _bca_levels(values_DQ: Floats, mean_B: Floats, mean: float) -> Floats:
    d, q = values_DQ.shape
    share = np.clip((mean_B < mean).mean(), 1 / len(mean_B), 1 - 1 / len(mean_B))
    bias = stats.norm.ppf(share)
    # The mean without a cluster differs from the mean by this much.
    influence = (values_DQ.mean(1) - mean) / (d - 1)
    if q > 1:
        influence = np.concatenate([influence, (values_DQ.mean(0) - mean) / (q - 1)])
    square = float((influence**2).sum())
    speed = float((influence**3).sum()) / (6 * square**1.5) if square else 0.0
    z = bias + stats.norm.ppf([0.025, 0.975])
    levels: Floats = stats.norm.cdf(bias + z / (1 - speed * z))
    return levels
