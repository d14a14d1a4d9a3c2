"""Diagonal contrasts (specificity, context), rank or scale, and agreement of measures."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from sublim_plugin.analysis import simulate
from sublim_plugin.analysis.agreement import agreement, warnings_of
from sublim_plugin.analysis.diagonal_contrast import (
    block_contrasts,
    contrast_interval,
    permutation_test,
)
from sublim_plugin.analysis.rank_or_scale import rank_or_scale
from sublim_plugin.core.errors import InputError


def tables(blocks: int, size: int, effect: float, seed: int = 0) -> np.ndarray:
    """Tables with rows, columns, noise and a diagonal raised by `effect`."""
    generator = np.random.default_rng(seed)
    return (
        generator.normal(0, 2, (blocks, size, 1))
        + generator.normal(0, 2, (1, 1, size))
        + generator.normal(0, 0.3, (blocks, size, size))
        + effect * np.eye(size)
    )


def test_the_contrast_is_the_coefficient_of_least_squares() -> None:
    import statsmodels.formula.api as smf

    values = tables(1, 4, 1.0)
    values[0, 0, 2] = values[0, 3, 3] = np.nan
    row, column = np.nonzero(np.isfinite(values[0]))
    table = {"y": values[0][row, column], "i": row, "j": column, "own": (row == column) * 1.0}
    model = smf.ols("y ~ C(i) + C(j) + own", table).fit()
    assert block_contrasts(values)[0] == pytest.approx(model.params["own"], rel=1e-9)


def test_two_by_two_is_the_interaction() -> None:
    (a, b), (c, d) = block = np.array([[3.0, 1.0], [0.5, 2.0]])
    assert block_contrasts(block[None])[0] == pytest.approx((a + d - b - c) / 2)


def test_rows_and_columns_do_not_matter() -> None:
    values = tables(4, 3, 0.7)
    moved = values + np.array([[[9.0], [0.0], [-5.0]]]) + np.array([[[0.0, 7.0, 1.0]]])
    assert block_contrasts(moved) == pytest.approx(block_contrasts(values))


def test_interval_and_p_are_students_t_over_blocks() -> None:
    values = tables(5, 3, 0.5)
    found, p = contrast_interval(values)
    assert p == pytest.approx(stats.ttest_1samp(block_contrasts(values), 0).pvalue, rel=1e-6)
    assert found.n_datasets == 5
    few, p = contrast_interval(values[:2])
    assert p is None and few.low is None and "at least 3" in few.reason


def test_exact_permutations_by_brute_force() -> None:
    values = tables(2, 3, 0.2, seed=3)
    seen = []
    for first in permutations(range(3)):
        for second in permutations(range(3)):
            moved = np.stack([values[0][list(first)], values[1][list(second)]])
            seen.append(np.mean(block_contrasts(moved)))
    found = permutation_test(values)
    assert found.exact and found.total == 36 and found.least == 1 / 36
    expected = np.mean(np.array(seen) >= np.mean(block_contrasts(values)) - 1e-12)
    assert found.p == pytest.approx(expected)


def test_one_block_has_few_permutations() -> None:
    found = permutation_test(tables(1, 3, 5.0))
    assert found.p == found.least == pytest.approx(1 / 6)


def test_drawn_permutations_where_there_are_too_many() -> None:
    found = permutation_test(tables(3, 5, 2.0))
    assert not found.exact and found.total == 20_000
    assert found.p < 0.001
    assert found == permutation_test(tables(3, 5, 2.0))


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 1)])
def test_a_table_is_square(shape: tuple[int, ...]) -> None:
    for of in (block_contrasts, permutation_test):
        with pytest.raises(InputError, match="square table"):
            of(np.zeros(shape))


def test_a_table_with_too_few_cells_is_refused() -> None:
    values = tables(3, 3, 1.0)
    values[1][~np.eye(3, dtype=bool)] = np.nan
    with pytest.raises(InputError, match="too few cells"):
        block_contrasts(values)


def test_a_permutation_test_of_incomplete_blocks_is_refused() -> None:
    """A hole moves with its row, so the shuffles would not be exchangeable with the table."""
    values = tables(3, 3, 1.0)
    values[1, 0, 2] = np.nan
    assert np.isfinite(block_contrasts(values)).all()
    with pytest.raises(InputError, match="needs complete blocks"):
        permutation_test(values)


def test_specificity_level_quickly() -> None:
    assert simulate.specificity_errors(100, 2) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [2, 3])
def test_the_permutation_test_keeps_its_level(blocks: int) -> None:
    assert simulate.specificity_errors(600, blocks) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 600)


@pytest.mark.slow
@pytest.mark.parametrize("n_datasets", [3, 6])
def test_context_and_rank_or_scale_keep_their_level(n_datasets: int) -> None:
    limit = 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
    assert simulate.context_errors(1000, n_datasets) <= limit
    assert simulate.rank_or_scale_errors(1000, n_datasets) <= limit


def students(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log2 rank, log2 norm and dataset number: 6 datasets, 7 ranks, 2 learning rates."""
    generator = np.random.default_rng(seed)
    dataset = np.repeat(np.arange(6), 14)
    rank = np.tile(np.repeat(np.arange(7.0), 2), 6)
    rate = np.tile([0.0, 3.0], 42)
    return rank, 0.3 * rank + rate + generator.normal(0, 0.1, 84), dataset


@pytest.mark.parametrize("driver", ["rank", "norm"])
def test_the_predictor_that_drives_is_found(driver: str) -> None:
    rank, norm, dataset = students()
    x = {"rank": rank, "norm": norm}
    generator = np.random.default_rng(1)
    y = -((x[driver] - x[driver].mean()) ** 2) + dataset + generator.normal(0, 0.3, 84)
    found = rank_or_scale(x, y, dataset)
    explained = {p.name: p.explained for p in found.predictors}
    assert explained[driver] > 0.8 > max(v for n, v in explained.items() if n != driver)
    (pair,) = found.comparisons
    assert pair.separable
    assert pair.error_difference.high is not None and pair.error_difference.low is not None
    if driver == "rank":
        assert pair.error_difference.high < 0
    else:
        assert pair.error_difference.low > 0


def test_a_norm_that_follows_the_rank_cannot_be_told_from_it() -> None:
    rank, _, dataset = students()
    norm = 0.5 * rank + 1
    y = -((rank - 3) ** 2) + dataset
    (pair,) = rank_or_scale({"rank": rank, "norm": norm}, y, dataset).comparisons
    assert not pair.separable and pair.alike == pytest.approx(1)
    assert pair.error_difference.mean == pytest.approx(0, abs=1e-9)


def test_nothing_predicts_noise() -> None:
    rank, norm, dataset = students()
    y = np.random.default_rng(0).normal(size=84)
    found = rank_or_scale({"rank": rank, "norm": norm}, y, dataset)
    assert all(p.explained < 0.1 for p in found.predictors)


def test_rank_or_scale_says_what_is_missing() -> None:
    rank, norm, dataset = students()
    few = dataset < 2
    assert "2 datasets" in rank_or_scale({"rank": rank[few]}, rank[few], dataset[few]).reason
    with pytest.raises(InputError, match="norm: a value is missing"):
        rank_or_scale({"norm": np.where(norm > 2, np.nan, norm)}, rank, dataset)
    with pytest.raises(InputError, match="3 values for 84"):
        rank_or_scale({"norm": norm[:3]}, rank, dataset)


def test_agreement_is_of_orders_only() -> None:
    generator = np.random.default_rng(0)
    logprob, dataset = generator.normal(size=40), np.repeat(np.arange(4), 10)
    found = agreement(logprob, np.exp(3 * logprob), dataset)
    assert found.by_dataset == pytest.approx([1.0] * 4)
    noisy = agreement(logprob, logprob + generator.normal(size=40), dataset)
    assert noisy.tau is not None and 0 < noisy.tau.mean < 1
    own = dataset == 0
    expected = stats.kendalltau(logprob[own], np.exp(logprob[own])).statistic
    assert found.by_dataset[0] == pytest.approx(expected)


def test_agreement_leaves_out_datasets_that_say_nothing() -> None:
    constant = agreement(np.arange(8.0), np.zeros(8), np.repeat([0, 1], 4))
    assert constant.tau is None and "differ in both measures" in constant.reason
    few = agreement(np.arange(6.0), np.arange(6.0), np.repeat([0, 1], 3))
    assert few.tau is None
    with pytest.raises(InputError, match="missing"):
        agreement(np.array([1.0, np.nan]), np.zeros(2), np.zeros(2))


def test_warnings_name_what_should_not_be_read() -> None:
    assert warnings_of(coverage=0.5, non_answer_rate=0.1, self_name_rate=0.0) == ()
    assert "coverage is 0.50%" in warnings_of(coverage=0.005)[0]
    assert warnings_of(non_answer_rate=0.8) == ("80% of the replies name no candidate",)
    assert "own name" in warnings_of(self_name_rate=0.93)[0]
    assert "2.0% of the replies are distinct" in warnings_of(distinct_replies=0.02)[0]
    assert warnings_of(distinct_replies=0.9) == ()
