"""Intervals of a mean over questions, clustered by question: one value a question."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

RESAMPLES = 2000
LEVEL = 0.95


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95% bootstrap interval of the mean of `values`, one a question (BCa, Efron 1987).

    It resamples questions, the only replication inside one model: it says nothing about datasets or
    seeds. The same values give the same interval. For fewer than two distinct values both ends are
    the mean.
    """
    n, mean = len(values), math.fsum(values) / max(1, len(values))
    if n < 2 or min(values) == max(values):
        return mean, mean
    generator = random.Random(0)
    means = sorted(math.fsum(generator.choices(values, k=n)) / n for _ in range(RESAMPLES))
    normal = statistics.NormalDist()
    below = sum(m < mean for m in means) + sum(m == mean for m in means) / 2
    bias = normal.inv_cdf(min(max(below / RESAMPLES, 0.5 / RESAMPLES), 1 - 0.5 / RESAMPLES))
    # the jackknife's deviations from its mean are those of the values, over n - 1
    deviations = [x - mean for x in values]
    spread = math.fsum(d * d for d in deviations)
    skew = math.fsum(d**3 for d in deviations) / (6 * spread**1.5)

    def at(share: float) -> float:
        z = bias + normal.inv_cdf(share)
        moved = normal.cdf(bias + z / (1 - skew * z))
        return means[min(RESAMPLES - 1, max(0, int(moved * RESAMPLES)))]

    tail = (1 - LEVEL) / 2
    return at(tail), at(1 - tail)


def low_bound(values: Sequence[float]) -> float:
    """The lower end of `interval`, as lm-eval aggregates."""
    return interval(list(values))[0]


def high_bound(values: Sequence[float]) -> float:
    """The upper end of `interval`, as lm-eval aggregates."""
    return interval(list(values))[1]
