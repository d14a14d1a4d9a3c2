"""Rank or scale? Which of rank, update norm or step size predicts transmission in new datasets.

A rank curve at one learning rate may be a curve over step size: with alpha = rank the norm of the
update grows with rank. Each candidate x (log2 of the rank, of ||dW||, of learning rate x scaling)
gives a quadratic curve plus one level per dataset. It is judged by how well it predicts a dataset
that it has not seen, up to that dataset's own level, so that a predictor with more freedom gains
nothing by it. Where two predictors order the students alike nothing can tell them apart, and the
result says so.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.cluster_intervals import Interval, interval
from sublim_plugin.analysis.replication import MIN_DATASETS, too_few_datasets
from sublim_plugin.core.errors import InputError

ALIKE = 0.95
"""Rank correlation of two predictors within datasets from which they are called inseparable."""


class Predictor(BaseModel):
    """How well a predictor foretells a dataset left out.

    `explained` is 1 - its squared error over that of no predictor at all, pooled over the datasets
    left out (below 0: worse than nothing). `spearman` is the mean over datasets of the rank
    correlation with transmission, which a curve with a peak makes small.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    explained: float
    spearman: float | None


class Comparison(BaseModel):
    """Squared error of `one` less that of `other` per student, paired by dataset left out.

    Below 0: `one` predicts better. `alike` is the predictors' rank correlation within datasets;
    `separable` is False where it exceeds `ALIKE` in size.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    one: str
    other: str
    error_difference: Interval
    alike: float
    separable: bool


class RankOrScale(BaseModel):
    """Every predictor, and every pair of them. `reason` says why there is nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    predictors: tuple[Predictor, ...]
    comparisons: tuple[Comparison, ...]
    reason: str


def rank_or_scale(
    predictors: dict[str, Floats], transmission: Floats, dataset: Floats
) -> RankOrScale:
    """Compare predictors over students.

    Args:
        predictors: by name, one value per student on a log scale.
        transmission: one value per student.
        dataset: the number of each student's dataset.

    Raises:
        InputError: lengths differ, or a value is not finite.
    """
    for name, x in {**predictors, "transmission": transmission}.items():
        if len(x) != len(dataset):
            raise InputError(f"{name}: {len(x)} values for {len(dataset)} students")
        if not np.isfinite(x).all():
            raise InputError(f"{name}: a value is missing; leave that student out")
    labels = np.unique(dataset)
    if len(labels) < MIN_DATASETS:
        return RankOrScale(predictors=(), comparisons=(), reason=too_few_datasets(len(labels)))
    nothing_D = _errors_left_out(None, transmission, dataset)
    errors = {n: _errors_left_out(x, transmission, dataset) for n, x in predictors.items()}
    sizes_D = np.array([(dataset == label).sum() for label in labels])
    found = []
    for name, x in predictors.items():
        nothing = float((nothing_D * sizes_D).sum())
        total = float((errors[name] * sizes_D).sum()) / nothing if nothing else 1.0
        found.append(
            Predictor(
                name=name,
                explained=1 - total,
                spearman=_within(x, transmission, dataset),
            )
        )
    names = list(predictors)
    comparisons = []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            alike = _within(predictors[one], predictors[other], dataset)
            comparisons.append(
                Comparison(
                    one=one,
                    other=other,
                    error_difference=interval((errors[one] - errors[other])[:, None]),
                    alike=1.0 if alike is None else alike,
                    separable=alike is not None and abs(alike) <= ALIKE,
                )
            )
    return RankOrScale(predictors=tuple(found), comparisons=tuple(comparisons), reason="")


def _errors_left_out(x: Floats | None, y: Floats, dataset: Floats) -> Floats:
    """Mean squared error in each dataset of a curve fitted to the others, levels removed (D,)."""
    errors = []
    for label in np.unique(dataset):
        out = dataset == label
        predicted = np.zeros_like(y)
        if x is not None:
            scaled = (x - x.mean()) / (x.std() or 1.0)
            terms = np.column_stack([scaled, scaled**2])
            coefficients = np.linalg.lstsq(
                _centred(terms[~out], dataset[~out]), _centred(y[~out], dataset[~out]), rcond=None
            )[0]
            predicted = terms @ coefficients
        gap = y[out] - predicted[out]
        errors.append(float(((gap - gap.mean()) ** 2).mean()))
    return np.array(errors)


def _centred(values: Floats, dataset: Floats) -> Floats:
    found = values.astype(float).copy()
    for label in np.unique(dataset):
        found[dataset == label] -= found[dataset == label].mean(0)
    return found


def _within(one: Floats, other: Floats, dataset: Floats) -> float | None:
    """Mean over datasets of Spearman's correlation; None where no dataset varies in both."""
    found = []
    for label in np.unique(dataset):
        own = dataset == label
        if own.sum() > 2 and np.ptp(one[own]) > 0 and np.ptp(other[own]) > 0:
            found.append(float(stats.spearmanr(one[own], other[own]).statistic))
    return float(np.mean(found)) if found else None
