"""Does what a signal predicts order the datasets as transmission does, within each trait?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations, product

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import rankdata

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.diagonal_contrast import EXACT_UP_TO


class WithinRanks(BaseModel):
    """Rank correlation within groups, with a two-sided p by permutation.

    `total` permutations were looked at, all that there are if `exact`; `least` is the smallest p
    that these groups can give, None where it was not enumerated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    correlation: float
    p: float
    least: float | None
    total: int
    exact: bool


def within_ranks(
    groups: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0
) -> WithinRanks | None:
    """Spearman's correlation of x and y with ranks taken within each group.

    Ranks are centred in their group and pooled: r = Σ a b / sqrt(Σ a² Σ b²) over all groups, a and
    b the centred ranks of x and y (ties share the mean). p is the share of the permutations of y
    within groups whose |r| is at least the observed one; drawn permutations count the observed
    order once more (Phipson and Smyth 2010).

    Returns:
        None where all x, or all y, are alike within their groups.
    """
    a_G = [_centred(x) for x, _ in groups]
    b_G = [_centred(y) for _, y in groups]
    scale = math.sqrt(sum(float(a @ a) for a in a_G) * sum(float(b @ b) for b in b_G))
    if scale == 0:
        return None
    observed = sum(float(a @ b) for a, b in zip(a_G, b_G, strict=True))
    count = math.prod(math.factorial(len(b)) for b in b_G)
    exact = count <= EXACT_UP_TO
    if exact:
        sums_P = np.array([sum(one) for one in product(*map(_every_sum, a_G, b_G))])
    else:
        generator = np.random.default_rng(seed)
        sums_P = np.zeros(EXACT_UP_TO)
        for a, b in zip(a_G, b_G, strict=True):
            sums_P += generator.permuted(np.tile(b, (EXACT_UP_TO, 1)), axis=1) @ a
    # sums of halves and their products: equal ones differ by rounding alone
    beyond = int((np.abs(sums_P) >= abs(observed) - 1e-9 * scale).sum())
    total = len(sums_P)
    return WithinRanks(
        correlation=observed / scale,
        p=beyond / total if exact else (beyond + 1) / (total + 1),
        least=_share_of_largest(sums_P, scale) if exact else None,
        total=total,
        exact=exact,
    )


def _centred(values: Sequence[float]) -> Floats:
    ranks: Floats = rankdata(values)
    centred: Floats = ranks - ranks.mean()
    return centred


def _every_sum(a: Floats, b: Floats) -> Floats:
    found: Floats = np.array(list(permutations(b))) @ a
    return found


def _share_of_largest(sums_P: Floats, scale: float) -> float:
    size_P = np.abs(sums_P)
    return float((size_P >= size_P.max() - 1e-9 * scale).mean())
