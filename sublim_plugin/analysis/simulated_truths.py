"""Data with known truth, in the sizes of this field, for the checks in `simulate.py`.

Rank curves are those of the project's notes on statistics, section 2: ranks 1 to 512, dataset SD
0.8 and cell SD 0.8, tents of 0.5 per doubling on both sides of the 4th or 7th rank.
"""

from __future__ import annotations

import numpy as np

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.mixed import logit_of_count

RANKS: Floats = np.exp2(np.arange(10.0))
X: Floats = np.log2(RANKS)
DATASET_SD = 0.8
CELL_SD = 0.8

NOT_A_U: dict[str, Floats] = {
    "flat": np.zeros(10),
    "linear, 0.1 per doubling": 0.1 * X,
    "linear, 0.5 per doubling": 0.5 * X,
    "linear down, 0.3 per doubling": -0.3 * X,
    "log-saturating, to 3": 3 * np.log1p(X) / np.log(10),
    "exponential approach, to 1.5": 1.5 * (1 - np.exp(-X / 2)),
    "exponential approach, to 3": 3 * (1 - np.exp(-X / 2)),
    "rise to 1.5 by the 4th rank, then level": np.minimum(X, 3) / 2,
    "rise to 4.5 by the 4th rank, then level": 1.5 * np.minimum(X, 3),
    "rise to 3 by the 7th rank, then level": np.minimum(X, 6) / 2,
    "level to the 6th rank, then down by 3": -0.75 * np.maximum(X - 5, 0),
    "step up by 3 at the 4th rank": np.where(X >= 3, 3.0, 0.0),
    "step up by 3 at the 6th rank": np.where(X >= 5, 3.0, 0.0),
    "step down by 3 at the 7th rank": np.where(X >= 6, -3.0, 0.0),
}
"""Flat, monotone, saturating and stepped curves."""

TENTS: dict[str, Floats] = {
    "tent, peak at the 4th rank": -0.5 * np.abs(X - 3),
    "tent, peak at the 7th rank": -0.5 * np.abs(X - 6),
}


def curves(
    truth_K: Floats,
    draws: int,
    n_datasets: int,
    generator: np.random.Generator,
    *,
    own_shape: float = 0.0,
    cell_sd: float = CELL_SD,
) -> Floats:
    """Rank curves around a truth (N, D, K): a level per dataset, noise per cell.

    `own_shape` is the SD of two slow waves that give each dataset a curve of its own, so that
    errors at neighbouring ranks go together.
    """
    size = (draws, n_datasets)
    values = truth_K + generator.normal(0, DATASET_SD, (*size, 1))
    values = values + generator.normal(0, cell_sd, (*size, len(truth_K)))
    for wave in (1, 2):
        turn_K = np.cos(np.pi * wave * np.linspace(0, 1, len(truth_K)))
        values = values + own_shape * generator.normal(size=(*size, 1)) * turn_K
    return np.asarray(values)


CLUSTERED = (
    "normal",
    "skewed datasets",
    "two kinds of datasets",
    "heavy-tailed datasets",
    "questions differ more than datasets",
    "sampled replies, 50 x 100",
)
"""Kinds of `clustered` data."""


def clustered(
    kind: str, draws: int, n_datasets: int, generator: np.random.Generator
) -> tuple[Floats, float]:
    """Effects by dataset and question (N, D, Q) and their true mean.

    Log-probs: dataset SD 0.8, question SD 0.5, rest 0.5 (nats), 50 questions. `skewed`: gamma with
    skewness 1; `two kinds`: 4 in 10 datasets transfer, the others hardly; `heavy-tailed`: Student's
    t with 5 degrees. `sampled`: logit of the share of 5,000 replies, by dataset (Q = 1), dataset SD
    0.8 on the logit scale, base rates from 0.1% to 20% by question.
    """
    size = (draws, n_datasets, 1)
    if kind == "sampled replies, 50 x 100":
        return _sampled(draws, n_datasets, generator)
    dataset_sd, question_sd = (
        (0.2, 1.0) if kind == "questions differ more than datasets" else (DATASET_SD, 0.5)
    )
    if kind == "skewed datasets":
        dataset = (generator.gamma(4, 1, size) - 4) / 2
    elif kind == "two kinds of datasets":
        transfers = (generator.random(size) < 0.4) - 0.4
        dataset = 0.9 * transfers / np.sqrt(0.24) + generator.normal(0, np.sqrt(0.19), size)
    elif kind == "heavy-tailed datasets":
        dataset = generator.standard_t(5, size) / np.sqrt(5 / 3)
    else:
        dataset = generator.normal(size=size)
    values = (
        1.0
        + dataset_sd * dataset
        + question_sd * generator.normal(size=(draws, 1, 50))
        + 0.5 * generator.normal(size=(draws, n_datasets, 50))
    )
    return np.asarray(values), 1.0


def _sampled(draws: int, n_datasets: int, generator: np.random.Generator) -> tuple[Floats, float]:
    base_Q = np.linspace(-7.0, -1.4, 50)

    def rates(count: int) -> Floats:
        level = 1.0 + DATASET_SD * generator.normal(size=(count, 1))
        rest = 0.3 * generator.normal(size=(count, 50))
        share: Floats = 1 / (1 + np.exp(-(base_Q + level + rest)))
        return share

    share_NDQ = rates(draws * n_datasets).reshape(draws, n_datasets, 50)
    named_ND = generator.binomial(100, share_NDQ).sum(2).astype(float)
    many = rates(200_000).mean(1)
    truth = float(np.log(many / (1 - many)).mean())
    return logit_of_count(named_ND, np.full_like(named_ND, 5000.0))[:, :, None], truth
