"""Equivalence: is an effect inside a margin that was named before the run?

"Not significantly different from the base" is not "at the base". Two one-sided tests (Schuirmann
1987) ask whether the mean over datasets lies above -margin and below +margin. Each is made at a
nominal 2.5%, so both pass exactly when the 95% interval lies inside. The customary 5% each (a 90%
interval) is not enough here: 6 datasets with a skewness of 1 would pass a mean on the margin in 10
of 100. At 2.5% such datasets do so in 5 to 6 of 100, normal ones in 2.6 (`docs/statistics.md`),
so 5% is the error to count with. Datasets are the unit and the block of every difference.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.cluster_intervals import Interval, interval, p_beyond
from sublim_plugin.analysis.rank_curves import additive_fit, larger_variance, ratio
from sublim_plugin.analysis.replication import too_few_datasets
from sublim_plugin.core.errors import InputError

LEVEL = 0.025
"""Nominal level of each one-sided test."""

HOW = "two one-sided tests at a nominal 2.5% each (the 95% interval inside the margin)"


class Equivalence(BaseModel):
    """Two one-sided tests against `margin`; `p` is the larger one, None with too few datasets.

    `inside` is the 95% interval, which lies within the margin exactly when p < .025.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    margin: float
    p: float | None
    equivalent: bool
    inside: Interval


def equivalence(values_DQ: Floats, margin: float) -> Equivalence:
    """Is the mean over datasets and questions within (-margin, margin)?

    Args:
        values_DQ: as in `cluster_intervals.interval`, against the base of the same eval context.
        margin: in the values' unit; the study file states it before the run.

    Raises:
        InputError: the margin is not positive.
    """
    _check_margin(margin)
    found = interval(values_DQ, level=1 - 2 * LEVEL)
    if found.reason:
        return Equivalence(margin=margin, p=None, equivalent=False, inside=found)
    nearest = margin if found.mean >= 0 else -margin
    p = p_beyond(found, nearest)
    p = p if abs(found.mean) < margin else 1 - p
    return Equivalence(margin=margin, p=p, equivalent=p < LEVEL, inside=found)


def flat_in_rank(values_DK: Floats, margin: float) -> Equivalence:
    """Is no rank's mean further than `margin` from any other's?

    Every pair of ranks is tested, paired by dataset; all must be equivalent (intersection-union,
    so no correction is due) and the worst pair is reported. NaN marks missing cells. No slope is
    tested: a slope that is not significant does not make a curve flat.

    Raises:
        InputError: the margin is not positive, or there are fewer than two ranks.
    """
    _check_margin(margin)
    k = values_DK.shape[1]
    if k < 2:
        raise InputError(f"{k} rank: flatness needs at least two")
    worst: Equivalence | None = None
    for one, other in combinations(range(k), 2):
        apart_D = values_DK[:, other] - values_DK[:, one]
        apart_D = apart_D[np.isfinite(apart_D)]
        if not len(apart_D):
            raise InputError(f"ranks number {one + 1} and {other + 1} share no dataset")
        pair = equivalence(apart_D[:, None], margin)
        if pair.p is None:
            return pair
        if worst is None or pair.p > (worst.p or 0.0):
            worst = pair
    assert worst is not None
    return worst


class AgainstBest(BaseModel):
    """The best LoRA rank's mean minus full finetuning's, the choice of the rank paid for.

    `low` and `high` bound max over ranks of the true difference (95%); they and `p`, that no rank
    lies above full finetuning, are None with too few datasets. `best_rank` has the highest mean.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    difference: float
    low: float | None
    high: float | None
    p: float | None
    best_rank: float
    n_datasets: int
    reason: str


def against_best(full_D: Floats, lora_DK: Floats, ranks: Floats) -> AgainstBest:
    """Compare full finetuning with the best LoRA rank, without the favour of choosing that rank.

    The highest of several means is high partly by luck. So every rank is compared with full
    finetuning, paired by dataset, at 5% over the number of ranks (Bonferroni): the bounds hold for
    all ranks at once, and so for the best one. (Choosing each dataset's rank on the others and
    testing the one left out errs in 9 of 100: what is left out enters the other choices.) Standard
    errors are the larger of that between datasets and that from the dataset x method mean square,
    on Satterthwaite's degrees of freedom. NaN marks missing cells.
    """
    methods_DK = np.column_stack([full_D, lora_DK])
    methods_DK = methods_DK[np.isfinite(full_D)]
    paired_K = np.isfinite(methods_DK[:, 1:]).sum(0)
    if not paired_K.any():
        raise InputError("no dataset has both full finetuning and a LoRA student")
    used_DK = methods_DK[:, np.concatenate([[True], paired_K > 0])]
    used_ranks, paired_K = ranks[paired_K > 0], paired_K[paired_K > 0]
    apart_DK = used_DK[:, 1:] - used_DK[:, :1]
    mean_K = np.nanmean(apart_DK, axis=0)
    best = int(mean_K.argmax())
    found = AgainstBest(
        difference=float(mean_K[best]),
        low=None,
        high=None,
        p=None,
        best_rank=float(used_ranks[best]),
        n_datasets=int(paired_K[best]),
        reason=too_few_datasets(int(paired_K.min())),
    )
    if found.reason:
        return found
    fit = additive_fit(used_DK[None])
    between_K = np.nanvar(apart_DK, axis=0, ddof=1) / paired_K
    pooled_K = 2 * fit.error_N[0] / paired_K
    square_K, df_K = larger_variance(between_K, paired_K - 1.0, pooled_K, fit.df)
    se_K = np.sqrt(square_K)
    half_K = stats.t.ppf(1 - 0.025 / len(mean_K), df_K) * se_K
    p_K = stats.t.sf(ratio(mean_K, se_K), df_K)
    return found.model_copy(
        update={
            "low": float((mean_K - half_K).max()),
            "high": float((mean_K + half_K).max()),
            "p": min(1.0, 2 * len(mean_K) * float(p_K.min())),
        }
    )


def _check_margin(margin: float) -> None:
    if not margin > 0 or not np.isfinite(margin):
        raise InputError(f"equivalence margin {margin}: a positive number is expected")
