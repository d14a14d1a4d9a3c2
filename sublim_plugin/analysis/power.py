"""What can be seen: the smallest effect that planned datasets show, and how many more are needed.

The spread between datasets rules everything. `ANCHORS` are the only published ones: the change of
log P(animal) by generation seed at LoRA rank 8 (Nief et al., results of 19 April 2026, means over 3
training seeds, as quoted in the project's notes on the protocol, section 6.3).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import optimize, stats

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.replication import MIN_DATASETS, too_few_datasets
from sublim_plugin.core.errors import InputError

POWER = 0.8
PLANNED = 6
"""Datasets for which the smallest visible effect is named where there are too few."""

MOST_DATASETS = 100_000

ANCHORS: dict[str, tuple[float, ...]] = {
    "cat, 10k rows": (2.31, -0.75, -0.85),
    "eagle, 10k rows": (3.24, 0.75, -0.53),
    "owl, 10k rows": (5.79, 5.06, 0.54),
    "cat, 30k rows": (7.30, 7.16, 4.15),
}
"""Change of log P (nats) of single datasets, by animal and rows in the file."""


class Detectable(BaseModel):
    """The smallest mean effect that `n_datasets` show with the given power; None below 3.

    The unit is that of `sd`, the standard deviation between datasets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_datasets: int
    sd: float
    power: float
    effect: float | None


def anchor_sd() -> float:
    """Pooled standard deviation between datasets of `ANCHORS`, in nats."""
    squares = freedom = 0.0
    for values in ANCHORS.values():
        mean = math.fsum(values) / len(values)
        squares += math.fsum((value - mean) ** 2 for value in values)
        freedom += len(values) - 1
    return math.sqrt(squares / freedom)


def detectable(
    n_datasets: int,
    sd: float,
    power: float = POWER,
    *,
    se_questions: float = 0.0,
    n_questions: int = 1,
    level: float = 0.05,
) -> Detectable:
    """The smallest effect that the interval of `cluster_intervals` shows to differ from 0.

    Args:
        sd: standard deviation between dataset means.
        se_questions, n_questions: the questions' part of the mean's standard error, and how many
            there are; with one, questions count as fixed.
        level: two-sided; the level over the number of tests where one of several is to pass.

    Raises:
        InputError: `sd` is not positive, or `power` not between 0.05 and 1.
    """
    _check(sd, power)
    effect = None
    if n_datasets >= MIN_DATASETS:
        test = _Test(sd / math.sqrt(n_datasets), n_datasets, se_questions, n_questions, level)
        effect = float(optimize.brentq(lambda e: test.power(e) - power, 0.0, test.far(power)))
    return Detectable(n_datasets=n_datasets, sd=sd, power=power, effect=effect)


def datasets_needed(
    effect: float,
    sd: float,
    power: float = POWER,
    *,
    se_questions: float = 0.0,
    n_questions: int = 1,
    level: float = 0.05,
) -> int | None:
    """Datasets with which `effect` is shown with the given power; at least 3.

    None where the questions' part of the standard error alone hides it: more datasets do not help.

    Raises:
        InputError: an effect of 0, which no number of datasets shows.
    """
    _check(sd, power)
    if not effect:
        raise InputError("an effect of 0 cannot be shown by any number of datasets")

    def shown(n: int) -> bool:
        test = _Test(sd / math.sqrt(n), n, se_questions, n_questions, level)
        return test.power(abs(effect)) >= power

    if not shown(MOST_DATASETS):
        return None
    low, high = MIN_DATASETS - 1, MOST_DATASETS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def planned_power(n_datasets: int, n_tests: int = 1, sd: float | None = None) -> str:
    """What a study of so many datasets per trait can show, in words, before it is run.

    Args:
        n_tests: methods (ranks, full finetuning) compared with the base under one eval context; the
            level is divided by it, as for the first of several adjusted p-values.
        sd: expected standard deviation between datasets in nats; without it that of `ANCHORS`.
    """
    source = "if datasets differ by" if sd else "if datasets differ as the published ones do, by"
    spread = sd or anchor_sd()
    level = 0.05 / n_tests
    needed = datasets_needed(1.0, spread, level=level)
    one = f"1 nat would need {needed:,} datasets" if needed else "no number of datasets shows 1 nat"
    tests = "" if n_tests == 1 else f" over {n_tests} tests"
    given = (
        f"{source} an SD of {spread:.1f} nats (power {POWER}, two-sided 5%{tests}, questions "
        f"taken as fixed); {one}"
    )
    effect = detectable(n_datasets, spread, level=level).effect
    if effect is None:
        plan = detectable(PLANNED, spread, level=level).effect
        return (
            f"no effect of any size can be shown: {too_few_datasets(n_datasets)}. {PLANNED} "
            f"datasets would show {plan:.1f} nats {given}"
        )
    return f"with {n_datasets} datasets an effect of {effect:.1f} nats can be shown {given}"


class _Test:
    """The two-sided test of a mean over datasets and questions, as `cluster_intervals` makes it."""

    def __init__(
        self,
        se_datasets: float,
        n_datasets: int,
        se_questions: float,
        n_questions: int,
        level: float,
    ) -> None:
        tail, df = 1 - level / 2, n_datasets - 1
        nodes, weights = _nodes()
        # The estimated variance between datasets over the true one, at quantiles of its chi-square.
        ratio = stats.chi2.ppf((nodes + 1) / 2, df) / df
        self.weights = weights / 2
        between = (float(stats.t.ppf(tail, df)) * se_datasets) ** 2
        over = 0.0
        if n_questions > 1:
            over = (float(stats.t.ppf(tail, n_questions - 1)) * se_questions) ** 2
        self.half = np.sqrt(between * ratio + over)
        self.se = math.hypot(se_datasets, se_questions)

    def power(self, effect: float) -> float:
        beyond = stats.norm.sf((self.half - effect) / self.se)
        return float(self.weights @ (beyond + stats.norm.cdf((-self.half - effect) / self.se)))

    def far(self, power: float) -> float:
        """An effect that is shown with more than `power`."""
        effect = self.se
        while self.power(effect) <= power:
            effect *= 2
        return effect


@cache
def _nodes() -> tuple[Floats, Floats]:
    nodes, weights = np.polynomial.legendre.leggauss(200)
    return nodes, weights


def _check(sd: float, power: float) -> None:
    if not sd > 0 or not math.isfinite(sd):
        raise InputError(f"standard deviation between datasets {sd}: a positive number is expected")
    if not 0.05 < power < 1:
        raise InputError(f"power {power}: a number between 0.05 and 1 is expected")
