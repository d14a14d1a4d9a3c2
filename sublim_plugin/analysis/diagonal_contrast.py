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

from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.arrays import Bools, Floats
from sublim_plugin.analysis.cluster_intervals import Interval, interval, p_beyond
from sublim_plugin.core.errors import InputError

EXACT_UP_TO = 20_000
"""Permutations that are enumerated; above, as many are drawn."""


class Permutations(BaseModel):
    """One-sided p of a raised diagonal when the rows' labels are shuffled within blocks.

    `total` shuffles were looked at, all that there are if `exact`. `least` is the smallest p that
    so many blocks and rows can give.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    p: float
    total: int
    exact: bool
    least: float


def block_contrasts(values_DIJ: Floats) -> Floats:
    """Least-squares contrast of the diagonal in each of D blocks of an I x I table (D,).

    NaN marks missing cells; for a mean over blocks they must be the same cells in each, or the
    blocks measure different things.

    Raises:
        InputError: the table is not square, has fewer than two rows, or a block misses so many
            cells that rows, columns and diagonal cannot be told apart.
    """
    _check_square(values_DIJ)
    found = []
    for block_IJ in values_DIJ:
        seen_IJ = np.isfinite(block_IJ)
        found.append(float((_weights(seen_IJ) * np.where(seen_IJ, block_IJ, 0.0)).sum()))
    return np.array(found)


def contrast_interval(values_DIJ: Floats) -> tuple[Interval, float | None]:
    """Mean contrast over blocks with its t interval, and the two-sided p, None below 3 blocks."""
    found = interval(block_contrasts(values_DIJ)[:, None])
    return found, None if found.reason else 2 * p_beyond(found, 0.0)


def permutation_test(values_DIJ: Floats, seed: int = 0) -> Permutations:
    """Test the mean contrast by shuffling rows within blocks; it needs no normality.

    Raises:
        InputError: the table is not square, or a cell is missing: shuffled, the hole would move
            with its row, and the shuffles would not measure what the table does.
    """
    _check_square(values_DIJ)
    if not np.isfinite(values_DIJ).all():
        raise InputError("a permutation test needs complete blocks; leave out the others")
    d, size, _ = values_DIJ.shape
    orders = np.array(list(permutations(range(size)))) if size <= 7 else np.empty((0, size), int)
    exact = len(orders) > 0 and len(orders) ** d <= EXACT_UP_TO
    observed = float(_complete(values_DIJ, np.arange(size)[None]).mean())
    threshold = observed - 1e-9 * max(1.0, abs(observed))
    if exact:
        means_P = _complete(values_DIJ, orders)[0]
        for block_P in _complete(values_DIJ, orders)[1:]:
            means_P = (means_P[:, None] + block_P).ravel()
        means_P = means_P / d
    else:
        generator = np.random.default_rng(seed)
        unmoved = np.tile(np.arange(size), (EXACT_UP_TO, 1))
        means_P = np.mean(
            [
                _complete(block_IJ[None], generator.permuted(unmoved, axis=1))[0]
                for block_IJ in values_DIJ
            ],
            axis=0,
        )
    exceeding = int((means_P >= threshold).sum())
    # Drawn shuffles count the observed labelling once more (Phipson and Smyth 2010).
    p = exceeding / len(means_P) if exact else (exceeding + 1) / (len(means_P) + 1)
    least = 1 / len(means_P) if exact else 1 / (len(means_P) + 1)
    return Permutations(p=p, total=len(means_P), exact=exact, least=least)


def _check_square(values_DIJ: Floats) -> None:
    _, rows, columns = values_DIJ.shape
    if rows != columns or rows < 2:
        raise InputError(f"a square table of at least 2 x 2 is needed, found {rows} x {columns}")


def _complete(values_DIJ: Floats, orders_PI: NDArray[np.int64]) -> Floats:
    """Contrasts of complete tables with their rows in each order (D, P).

    Without gaps least squares is the mean of the diagonal minus the mean of the rest.
    """
    size = values_DIJ.shape[1]
    on_DP = values_DIJ[:, orders_PI, np.arange(size)].sum(2)
    rest_DP = values_DIJ.sum((1, 2))[:, None] - on_DP
    found: Floats = on_DP / size - rest_DP / (size * (size - 1))
    return found


def _weights(seen_IJ: Bools) -> Floats:
    """Weights of the cells whose sum is the least-squares contrast of the diagonal."""
    size = len(seen_IJ)
    row, column = np.nonzero(seen_IJ)
    if not len(row):
        raise InputError("a block without any cell has no contrast; leave it out")
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
