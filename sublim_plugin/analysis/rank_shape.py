"""Is transmission an inverted U over rank? The decision for one trait, and over traits.

The claim needs the two-lines test at p < .05 and a highest mean strictly inside the grid of ranks.
The u-test is reported beside it and marks the claim as supported by both or by one; a significant
quadratic term is never looked at. Traits peak at different ranks, so each is tested by itself and
the p-values are then combined (Benjamini-Hochberg, Fisher).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from sublim_plugin.analysis.arrays import Bools, Floats
from sublim_plugin.analysis.rank_curves import additive_fit, check_curves, larger_variance
from sublim_plugin.analysis.replication import MIN_DATASETS, too_few_datasets
from sublim_plugin.analysis.two_lines import MIN_RANKS, TwoLines, two_lines, two_lines_batch
from sublim_plugin.analysis.u_test import UTest, too_few_curves, u_test

LEVEL = 0.05

Verdict = Literal["inverted U", "no inverted U shown", "no claim"]


class RankShape(BaseModel):
    """The decision for one trait. `peak_low` and `peak_high` bound the set of ranks that may be
    the highest (95%, see `peak_set`); they are None without a claim about the peak. `quadratic` is
    None where `quadratic_reason` says why there is no u-test.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: Verdict
    reason: str
    n_datasets: int
    ranks: tuple[float, ...]
    means: tuple[float, ...]
    peak_rank: float | None
    peak_low: float | None
    peak_high: float | None
    lines: TwoLines | None
    quadratic: UTest | None
    quadratic_reason: str

    @property
    def supported(self) -> bool:
        """The u-test agrees with an inverted U."""
        return self.quadratic is not None and self.quadratic.p < LEVEL


def rank_shape(ranks: Floats, values_DK: Floats) -> RankShape:
    """Decide for one trait's curves: transmission of each dataset at each rank, NaN if missing."""
    check_curves(ranks, values_DK[None])
    n = len(values_DK)
    fit = additive_fit(values_DK[None])
    means_K = fit.mean_NK[0]
    peak = int(means_K.argmax())
    found: dict[str, Any] = {
        "n_datasets": n,
        "ranks": tuple(float(rank) for rank in ranks),
        "means": tuple(float(value) for value in means_K),
        "peak_rank": float(ranks[peak]),
        "peak_low": None,
        "peak_high": None,
        "lines": None,
        "quadratic": None,
        "quadratic_reason": "",
    }
    if n < MIN_DATASETS:
        return RankShape(verdict="no claim", reason=too_few_datasets(n), **found)
    if len(ranks) < MIN_RANKS:
        return RankShape(
            verdict="no claim",
            reason=f"{len(ranks)} ranks, at least {MIN_RANKS} are needed",
            **found,
        )
    if fit.links:
        return RankShape(verdict="no claim", reason=fit.links, **found)
    lines, few = two_lines(ranks, values_DK), too_few_curves(values_DK)
    found |= {"lines": lines, "quadratic_reason": few}
    if not few:
        found["quadratic"] = u_test(ranks, values_DK)
    may_be_highest = ranks[peak_set(values_DK[None])[0]]
    found |= {"peak_low": float(may_be_highest[0]), "peak_high": float(may_be_highest[-1])}
    if np.ptp(means_K) == 0:
        return RankShape(verdict="no inverted U shown", reason="all ranks are equal", **found)
    if peak in (0, len(ranks) - 1):
        end = "lowest" if peak == 0 else "highest"
        reason = f"the mean is highest at the {end} rank, {ranks[peak]:g}: the grid does not reach"
        return RankShape(verdict="no inverted U shown", reason=reason + " past a peak", **found)
    if lines.p >= LEVEL:
        part = "rising" if lines.p_up >= lines.p_down else "falling"
        reason = f"two-lines test: the {part} line has p = {lines.p:.3f}"
        return RankShape(verdict="no inverted U shown", reason=reason, **found)
    return RankShape(verdict="inverted U", reason="", **found)


def claims_batch(ranks: Floats, values_NDK: Floats) -> Bools:
    """Whether `rank_shape` says "inverted U", for N draws at once (N,)."""
    peak_N = additive_fit(values_NDK).mean_NK.argmax(1)
    inside_N = (peak_N > 0) & (peak_N < len(ranks) - 1)
    claims: Bools = inside_N & (two_lines_batch(ranks, values_NDK)["p"] < LEVEL)
    return claims


def peak_set(values_NDK: Floats) -> Bools:
    """Ranks that may have the highest mean, 95% (N, K): Hsu's comparison with the best (1984).

    A rank is left out where another's mean exceeds it in a one-sided test of their difference at
    5% over the number of other ranks (Bonferroni). The difference's standard error is the larger
    of that between datasets and that from the dataset x rank mean square, on Satterthwaite's
    degrees of freedom.
    """
    fit = additive_fit(values_NDK)
    k = values_NDK.shape[2]
    kept = np.ones((len(values_NDK), k), dtype=bool)
    for rank in range(k):
        for other in range(k):
            if other == rank:
                continue
            apart_ND = values_NDK[:, :, other] - values_NDK[:, :, rank]
            apart_ND = apart_ND[:, np.isfinite(apart_ND[0])]
            n = apart_ND.shape[1]
            if n < MIN_DATASETS:
                continue
            between_N = apart_ND.var(1, ddof=1) / n
            square_N, df_N = larger_variance(
                between_N, np.full(len(between_N), n - 1.0), 2 * fit.error_N / n, fit.df
            )
            critical_N = stats.t.ppf(1 - 0.05 / (k - 1), df_N)
            kept[:, rank] &= ~(apart_ND.mean(1) > critical_N * np.sqrt(square_N))
    # Where no difference at all is left, every rank stays.
    kept[~kept.any(1)] = True
    return kept


class OverTraits(BaseModel):
    """p-values of several traits together: adjusted ones (false-discovery rate) and Fisher's.

    `fisher_p` tests that no trait at all has the shape.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adjusted: tuple[float, ...]
    fisher_p: float


def over_traits(p_values: Sequence[float]) -> OverTraits:
    """Combine traits' p-values (Benjamini and Hochberg 1995; Fisher 1932)."""
    return OverTraits(
        adjusted=tuple(float(p) for p in stats.false_discovery_control(list(p_values))),
        fisher_p=float(stats.combine_pvalues(list(p_values), method="fisher").pvalue),
    )
