"""A logit-scale mixed model of one effect, as a cross-check of `cluster_intervals`.

logit P(target)[dataset, question] - logit of the base = effect + dataset + question + rest, with
random and crossed datasets and questions, by restricted maximum likelihood. Every dataset answers
every question, and for such balanced data the maximum has a closed form (Searle, Casella and
McCulloch 1992, section 4.7). It is used because it is exact: statsmodels' MixedLM gives the same
where every component is above 0, takes 0.3 to 5 s, and may stop short where one is 0 (see tests).
Its standard error rests on normality and on the variance
components; a large disagreement with the interval says that one of the two is not to be trusted.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.replication import MIN_DATASETS
from sublim_plugin.core.errors import InputError


class MixedEffect(BaseModel):
    """The effect in logits, its standard error, standard deviations of the components, interval.

    The interval uses Student's t with datasets - 1 degrees of freedom.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    effect: float
    se: float
    low: float
    high: float
    dataset_sd: float
    question_sd: float
    rest_sd: float


def logit_of_logprob(logprob: Floats) -> Floats:
    """log(p / (1 - p)) from log p, exact for tiny and for large p."""
    with np.errstate(divide="ignore"):
        found: Floats = logprob - np.log(-np.expm1(np.minimum(logprob, -1e-12)))
    return found


def logit_of_count(named: Floats, asked: Floats) -> Floats:
    """Empirical logit of counts, finite for none and for all (Haldane 1956: half added to both)."""
    found: Floats = np.log((named + 0.5) / (asked - named + 0.5))
    return found


def mixed_effect(logit_DQ: Floats) -> MixedEffect:
    """Fit the model to differences of logits, one per dataset and question.

    Raises:
        InputError: fewer than `MIN_DATASETS` datasets, fewer than 2 questions, or a value that is
            not finite.
    """
    d, q = logit_DQ.shape
    if d < MIN_DATASETS or q < 2:
        raise InputError(f"{d} datasets and {q} questions; {MIN_DATASETS} and 2 are needed")
    if not np.isfinite(logit_DQ).all():
        raise InputError("a logit is missing or infinite; use logit_of_count for counts")
    grand = float(logit_DQ.mean())
    of_datasets = q * float(((logit_DQ.mean(1) - grand) ** 2).sum())
    of_questions = d * float(((logit_DQ.mean(0) - grand) ** 2).sum())
    rest = max(0.0, float(((logit_DQ - grand) ** 2).sum()) - of_datasets - of_questions)
    squares = {"dataset": (of_datasets, d - 1, q), "question": (of_questions, q - 1, d)}
    rest_df = (d - 1) * (q - 1)
    # A component below 0 is 0 at the likelihood's maximum, and its squares are of the rest.
    while low := [n for n, (own, df, _) in squares.items() if own / df < rest / rest_df]:
        least = min(low, key=lambda n: squares[n][0] / squares[n][1])
        own, df, _ = squares.pop(least)
        rest, rest_df = rest + own, rest_df + df
    noise = rest / rest_df
    variance = {n: (own / df - noise) / each for n, (own, df, each) in squares.items()}
    dataset, question = variance.get("dataset", 0.0), variance.get("question", 0.0)
    se = math.sqrt(dataset / d + question / q + noise / (d * q))
    half = float(stats.t.ppf(0.975, d - 1)) * se
    return MixedEffect(
        effect=grand,
        se=se,
        low=grand - half,
        high=grand + half,
        dataset_sd=math.sqrt(dataset),
        question_sd=math.sqrt(question),
        rest_sd=math.sqrt(noise),
    )
