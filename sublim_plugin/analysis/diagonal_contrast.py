"""The diagonal of a square table against its rows and columns, datasets as blocks.

Two questions have this form:
- Context: rows are train contexts, columns eval contexts (each value against that eval context's
  own base). The contrast, matched minus mismatched, is the train x eval interaction: a context
  that raises everything, trained or asked in, cancels.
- Specificity: rows are the animals whose numbers a student saw, columns the animals asked about.
  Rows take up a student's general drift, columns what every student drifts to; the diagonal is
  transfer.

value[i, j] = row i + column j + contrast x (i = j), by least squares, in each block by itself.
"""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.cluster_intervals import Interval, interval, p_beyond
from sublim_plugin.core.errors import InputError

EXACT_UP_TO = 20_000
"""Permutations that are enumerated; above, as many are drawn."""


class Diagonal(BaseModel):
    """Mean contrast over blocks (generation seeds), its t interval and two-sided p over blocks.

    `permutation_p` is the one-sided p of a raised diagonal when the rows' labels are shuffled
    within blocks; `permutations` says how many there were and `exact` whether that is all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    contrast: Interval
    p: float | None
    permutation_p: float
    permutations: int
    exact: bool
    by_block: tuple[float, ...]


def diagonal_contrast(values_DIJ: Floats, seed: int = 0) -> Diagonal:
    """Contrast of the diagonal in D blocks of an I x I table; NaN marks missing cells.

    Shuffling needs no normality and no 3 datasets, but few blocks of few rows have few shuffles:
    one block of three rows cannot give p below 1/6.

    Raises:
        InputError: the table is not square, has fewer than two rows, or a block misses so many
            cells that rows, columns and diagonal cannot be told apart.
    """
    _, rows, columns = values_DIJ.shape
    if rows != columns or rows < 2:
        raise InputError(f"a square table of at least 2 x 2 is needed, found {rows} x {columns}")
    contrast_D = np.array([_contrast(block_IJ) for block_IJ in values_DIJ])
    found = interval(contrast_D[:, None])
    p = None
    if not found.reason:
        p = 2 * p_beyond(found, 0.0)
    exceeding, total, exact = _shuffles(values_DIJ, float(contrast_D.mean()), seed)
    # Drawn shuffles count the observed labelling once more (Phipson and Smyth 2010).
    permutation_p = exceeding / total if exact else (exceeding + 1) / (total + 1)
    return Diagonal(
        contrast=found,
        p=p,
        permutation_p=permutation_p,
        permutations=total,
        exact=exact,
        by_block=tuple(float(value) for value in contrast_D),
    )


def _contrast(block_IJ: Floats) -> float:
    weights_IJ = _weights(np.isfinite(block_IJ))
    return float((weights_IJ * np.where(np.isfinite(block_IJ), block_IJ, 0.0)).sum())


def _weights(seen_IJ: Floats) -> Floats:
    """Weights of the cells whose sum is the least-squares contrast of the diagonal."""
    size = len(seen_IJ)
    row, column = np.nonzero(seen_IJ)
    design = np.zeros((len(row), 2 * size))
    design[np.arange(len(row)), row] = 1.0
    later = column > 0
    design[np.nonzero(later)[0], size + column[later] - 1] = 1.0
    design[:, -1] = row == column
    others = int(np.linalg.matrix_rank(design[:, :-1]))
    if int(np.linalg.matrix_rank(design)) == others:
        raise InputError("too few cells to tell the diagonal from its rows and columns")
    weights_IJ = np.zeros((size, size))
    weights_IJ[row, column] = np.linalg.pinv(design)[-1]
    return weights_IJ


def _shuffles(values_DIJ: Floats, observed: float, seed: int) -> tuple[int, int, bool]:
    """Shuffles of the rows within blocks whose mean contrast is at least the observed one."""
    d, size, _ = values_DIJ.shape
    orders = list(permutations(range(size))) if size <= 7 else []
    each = [math.factorial(size)] * d
    exact = bool(orders) and math.prod(each) <= EXACT_UP_TO
    threshold = observed - 1e-9 * max(1.0, abs(observed))
    if exact:
        by_order_DP = np.array(
            [[_shuffled(block, np.array(order)) for order in orders] for block in values_DIJ]
        )
        means = [sum(choice) / d for choice in product(*by_order_DP)]
        return sum(value >= threshold for value in means), len(means), True
    generator = np.random.default_rng(seed)
    drawn_D = [
        [_shuffled(block, generator.permutation(size)) for _ in range(EXACT_UP_TO)]
        for block in values_DIJ
    ]
    means_P = np.mean(drawn_D, axis=0)
    return int((means_P >= threshold).sum()), EXACT_UP_TO, False


def _shuffled(block_IJ: Floats, order: NDArray[np.int64]) -> float:
    """The contrast when row i is taken for a student of row order[i]'s label."""
    moved_IJ = block_IJ[order]
    if np.isfinite(block_IJ).all():
        size = len(block_IJ)
        on = float(np.trace(moved_IJ))
        # complete tables: mean of the diagonal minus mean of the rest, the same least squares
        return on / size - (float(moved_IJ.sum()) - on) / (size * (size - 1))
    try:
        return _contrast(moved_IJ)
    except InputError:
        return 0.0
