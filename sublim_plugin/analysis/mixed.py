"""A logit-scale mixed model of one effect, as a cross-check of `cluster_intervals`.

logit P(target)[dataset, question] - logit of the base = effect + dataset + question + rest, with
random and crossed datasets and questions, by restricted maximum likelihood (statsmodels' MixedLM).
Its standard error rests on normality and on the variance components; a large disagreement with the
interval over datasets and questions says that one of the two is not to be trusted.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.replication import MIN_DATASETS
from sublim_plugin.core.errors import InputError


class MixedEffect(BaseModel):
    """The effect in logits, its standard error, standard deviations of the components, interval.

    The interval uses Student's t with datasets - 1 degrees of freedom. `converged` is False where
    the optimiser gave up; then nothing here should be read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    effect: float
    se: float
    low: float
    high: float
    dataset_sd: float
    question_sd: float
    rest_sd: float
    converged: bool


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
    models: Any = import_module("statsmodels.regression.mixed_linear_model")
    dataset, question = np.divmod(np.arange(d * q), q)
    components = models.VCSpec(
        ["dataset", "question"],
        [[[f"d{i}" for i in range(d)]], [[f"q{i}" for i in range(q)]]],
        [[np.eye(d)[dataset]], [np.eye(q)[question]]],
    )
    # The optimiser starts far away if values are large; the scale is put back below.
    scale = float(logit_DQ.std()) or 1.0
    model = models.MixedLM(
        logit_DQ.ravel() / scale,
        np.ones((d * q, 1)),
        groups=np.zeros(d * q),
        exog_vc=components,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a component at 0 is a finding here, not a fault
        result = model.fit(reml=True, method=["lbfgs", "powell"])
    effect, se = float(result.fe_params[0]) * scale, float(result.bse_fe[0]) * scale
    variances = np.maximum(np.asarray(result.vcomp), 0.0)
    half = float(stats.t.ppf(0.975, d - 1)) * se
    return MixedEffect(
        effect=effect,
        se=se,
        low=effect - half,
        high=effect + half,
        dataset_sd=float(np.sqrt(variances[0])) * scale,
        question_sd=float(np.sqrt(variances[1])) * scale,
        rest_sd=float(np.sqrt(result.scale)) * scale,
        converged=bool(result.converged),
    )
