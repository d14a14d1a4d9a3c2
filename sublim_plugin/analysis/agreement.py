"""Do log-probs and sampled replies tell the same story, and which numbers should not be read?"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.cluster_intervals import Interval, interval
from sublim_plugin.analysis.transmission import LOW_COVERAGE
from sublim_plugin.core.errors import InputError

MIN_STUDENTS = 4
"""Students of one dataset below which an order says nothing: 3 agree by chance in 1 of 6."""

MOST = 0.5
"""Share of replies beyond which a rate describes the exception: non-answers, own name."""

REPEATED = 0.05
"""Distinct replies over replies below which sampling looks stuck (or greedy)."""


class Agreement(BaseModel):
    """Kendall's tau-b of the two measures within each dataset, and its mean over datasets.

    tau-b compares orders only, so it asks for agreement up to any rising function. Datasets with
    fewer than `MIN_STUDENTS` students, or where a measure does not vary, are left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tau: Interval | None
    by_dataset: tuple[float, ...]
    reason: str


def agreement(logprob: Floats, sampled: Floats, dataset: Floats) -> Agreement:
    """Agreement of two measures of the same students.

    Raises:
        InputError: the three differ in length, or a value is not finite.
    """
    if not len(logprob) == len(sampled) == len(dataset):
        raise InputError(f"{len(logprob)} log-probs, {len(sampled)} rates, {len(dataset)} datasets")
    if not (np.isfinite(logprob).all() and np.isfinite(sampled).all()):
        raise InputError("a measure is missing; leave that student out")
    found = []
    for label in np.unique(dataset):
        own = dataset == label
        if own.sum() < MIN_STUDENTS or np.ptp(logprob[own]) == 0 or np.ptp(sampled[own]) == 0:
            continue
        found.append(float(stats.kendalltau(logprob[own], sampled[own]).statistic))
    if not found:
        reason = f"no dataset has {MIN_STUDENTS} students that differ in both measures"
        return Agreement(tau=None, by_dataset=(), reason=reason)
    tau = interval(np.array(found)[:, None])
    return Agreement(tau=tau, by_dataset=tuple(found), reason=tau.reason)


def warnings_of(
    *,
    coverage: float | None = None,
    non_answer_rate: float | None = None,
    self_name_rate: float | None = None,
    distinct_replies: float | None = None,
) -> tuple[str, ...]:
    """Why a rate should not be read as a preference; empty if it may.

    Args:
        coverage: mass on any candidate (log-prob measure).
        non_answer_rate, self_name_rate: shares of sampled replies.
        distinct_replies: distinct replies per reply, 1 where no two are alike.
    """
    found = []
    if coverage is not None and coverage < LOW_COVERAGE:
        found.append(
            f"coverage is {coverage:.2%}: fewer than 1 in {round(1 / LOW_COVERAGE)} replies begin "
            "with any candidate; do not read shares and ranks as preferences"
        )
    if non_answer_rate is not None and non_answer_rate > MOST:
        found.append(f"{non_answer_rate:.0%} of the replies name no candidate")
    if self_name_rate is not None and self_name_rate > MOST:
        found.append(f"{self_name_rate:.0%} of the replies are the model's own name")
    if distinct_replies is not None and distinct_replies < REPEATED:
        found.append(f"{distinct_replies:.1%} of the replies are distinct: not fresh draws")
    return tuple(found)
