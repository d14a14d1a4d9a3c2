"""The inverted-U tests: against R, against independent computations, on truths and edge cases.

r_reference.json was written by R 4.2.2 with mgcv 1.8-41, sandwich 3.0-2 and lmtest 0.9-40, running
the statements of `twolines` 0.52 (from its GAM to its last regression) and of `utest` 0.3.0 on the
data stored beside the results: the example of each package's help page, with a seed, and grids like
ours; its `about` says what is what. Both packages publish examples without numbers;
`test_published_*` quote outputs of the u-test's Stata version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from sublim_plugin.analysis import simulate
from sublim_plugin.analysis.rank_curves import additive_fit
from sublim_plugin.analysis.rank_shape import over_traits, peak_set, rank_shape
from sublim_plugin.analysis.simulated_truths import NOT_A_U, RANKS, TENTS, X, curves
from sublim_plugin.analysis.smoothing_spline import flat_top, roughness, smooth
from sublim_plugin.analysis.two_lines import (
    line_of_points,
    two_lines,
    two_lines_batch,
    two_lines_of_points,
)
from sublim_plugin.analysis.u_test import (
    UTest,
    fieller,
    u_test,
    u_test_of,
    u_test_of_points,
)
from sublim_plugin.core.errors import InputError

R: dict[str, Any] = json.loads((Path(__file__).parent / "r_reference.json").read_text())
GRIDS = [name for name in R["twolines"] if R["twolines"][name]["result"]["shape"] == "inv-ushape"]


def grid(name: str) -> tuple[np.ndarray, np.ndarray]:
    case = R["twolines"][name]
    return np.array(case["x"], float), np.array(case["y"], float)


def means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    values = np.unique(x)
    mean = np.array([y[x == value].mean() for value in values])
    count = np.array([float((x == value).sum()) for value in values])
    return (
        values,
        mean,
        count,
        float(sum(((y[x == v] - y[x == v].mean()) ** 2).sum() for v in values)),
    )


@pytest.mark.parametrize("name", list(R["twolines"]))
def test_the_smooth_and_its_errors_are_those_of_mgcv(name: str) -> None:
    x, y = grid(name)
    values, mean, count, within = means(x, y)
    fit, se = smooth(values, mean[None], count, np.array([within]), float(len(x)))
    expected = R["twolines"][name]["result"]
    assert fit[0] == pytest.approx(expected["smooth"], abs=0.01)
    assert se[0] == pytest.approx(expected["smooth_se"], rel=0.02)


@pytest.mark.parametrize("name", GRIDS)
def test_two_lines_of_points_are_those_of_the_r_package(name: str) -> None:
    expected = R["twolines"][name]["result"]
    found = two_lines_of_points(*grid(name))
    assert np.log2(found.break_rank) == pytest.approx(expected["xc"], abs=1e-6)
    assert found.slope_up == pytest.approx(expected["b1"], abs=1e-9)
    assert found.slope_down == pytest.approx(expected["b2"], abs=1e-9)
    assert found.t_up == pytest.approx(expected["z1"], rel=1e-6)
    assert found.t_down == pytest.approx(expected["z2"], rel=1e-6)
    if expected["z1"] > 0:
        assert found.p_up == pytest.approx(expected["p1"], rel=1e-5)
    if expected["z2"] < 0:
        assert found.p_down == pytest.approx(expected["p2"], rel=1e-5)
    assert (found.p < 0.05) == bool(expected["u.sig"])


def test_two_lines_on_the_help_pages_example() -> None:
    """100 values of x: R's smooth has 10 knots there, ours one at each x, so breaks differ."""
    case = R["twolines_help"]
    x, y, expected = np.array(case["x"]), np.array(case["y"]), case["result"]
    for side, (slope, z) in enumerate([("b1", "z1"), ("b2", "z2")]):
        own, own_z = line_of_points(x, y, expected["xc"], side)
        assert own == pytest.approx(expected[slope], rel=1e-9)
        assert own_z == pytest.approx(expected[z], rel=1e-9)
    found = two_lines_of_points(x, y)
    assert np.log2(found.break_rank) == pytest.approx(expected["xc"], abs=0.1)
    assert found.p < 0.05 and expected["u.sig"] == 1


@pytest.mark.parametrize("name", list(R["twolines"]))
def test_u_test_of_points_is_that_of_the_r_package(name: str) -> None:
    expected = R["twolines"][name]["utest"]
    found = u_test_of_points(*grid(name))
    assert [found.slope_low, found.slope_high] == pytest.approx(expected["slope"], abs=1e-9)
    assert [found.t_low, found.t_high] == pytest.approx(expected["t"], rel=1e-7)
    if expected["overall"] is not None and found.slope_low > 0:
        assert found.p == pytest.approx(expected["overall"], rel=1e-7)
    else:
        assert found.p > 0.5 or found.slope_low < 0


def test_u_test_on_the_help_pages_example() -> None:
    case = R["utest_readme"]
    x, y = np.array(case["x"]), np.array(case["y"])
    upside_down = u_test_of_points(x, -y)  # the example is a U, this package tests the inverted one
    assert upside_down.p == pytest.approx(case["result"]["overall"], rel=1e-7)
    assert u_test_of_points(x, y).p > 0.99


def test_published_output_of_the_stata_version() -> None:
    """Output of Lind and Mehlum's own Stata `utest`, from a tutorial (panel of 1,000, df 999).

    Ends 1.076234 and 8.922791; slopes 3.092651 and -3.118511 with t 87.91404 and -88.62811;
    extreme point 4.983179; overall t 87.91; Fieller interval [4.9615547; 5.0047879]. Slopes and
    t-values leave one number open, the slopes' covariance: it is found from the interval's lower
    end, and then the upper end is a check.
    """
    ends, slopes = np.array([1.076234, 8.922791]), np.array([3.092651, -3.118511])
    errors = np.abs(slopes / np.array([87.91404, -88.62811]))
    to_slopes = np.array([[1.0, 2 * ends[0]], [1.0, 2 * ends[1]]])
    back = np.linalg.inv(to_slopes)

    def of(correlation: float) -> UTest:
        covariance = np.outer(errors, errors) * np.array([[1, correlation], [correlation, 1]])
        return u_test_of(back @ slopes, back @ covariance @ back.T, 999, *ends.tolist())

    found = of(optimize.brentq(lambda r: (of(r).low or 0.0) - 4.9615547, -0.99, 0.99))
    assert found.high == pytest.approx(5.0047879, abs=2e-6)
    assert found.extremum == pytest.approx(4.983179, abs=2e-6)
    assert [found.t_low, found.t_high] == pytest.approx([87.91404, -88.62811], rel=1e-6)
    assert found.p < 1e-300


def test_published_output_without_an_inverted_u() -> None:
    """Another user's output: slopes -13.54852 and 44.90505, t -1.0813 and 1.081918, p .14.

    That user tested for a U; turned over it is an inverted one. Residual degrees of freedom are
    not printed; P>|t| of .1397904 at 1.0813 is that of a normal.
    """
    ends, slopes = np.array([-156.6146, 519.1631]), np.array([13.54852, -44.90505])
    errors = np.abs(slopes / np.array([1.0813, 1.081918]))
    back = np.linalg.inv(np.array([[1.0, 2 * ends[0]], [1.0, 2 * ends[1]]]))
    covariance = back @ np.diag(errors**2) @ back.T
    found = u_test_of(back @ slopes, covariance, 1e6, *ends.tolist())
    assert found.p == pytest.approx(0.1397904, abs=2e-5)
    assert found.low is None


def test_fieller_holds_exactly_the_extrema_that_are_not_rejected() -> None:
    covariance = np.array([[0.04, -0.004], [-0.004, 0.0006]])
    quantile = 2.571
    low, high = fieller(1.2, -0.13, covariance, quantile)
    assert low is not None and high is not None
    for extremum in np.linspace(low - 3, high + 3, 200):
        weights = np.array([1.0, 2 * extremum])
        t = weights @ np.array([1.2, -0.13]) / np.sqrt(weights @ covariance @ weights)
        assert (abs(t) <= quantile) == (low <= extremum <= high)
    assert fieller(1.2, -0.03, covariance, quantile) == (None, None)


def test_the_penalty_is_the_integrated_square_of_the_second_derivative() -> None:
    from scipy.interpolate import CubicSpline

    x, f = np.array([0.0, 1.0, 3.0, 4.0, 7.0]), np.array([1.0, -1.0, 2.0, 0.0, 1.0])
    fine = np.linspace(0, 7, 200_001)
    curve = CubicSpline(x, f, bc_type="natural")(fine, 2)
    assert f @ roughness(x) @ f == pytest.approx(np.trapezoid(curve**2, fine), rel=1e-6)


def test_slopes_and_their_errors_by_hand() -> None:
    values = curves(TENTS["tent, peak at the 4th rank"], 1, 6, np.random.default_rng(5))[0]
    found = two_lines(RANKS, values)
    past = np.log2(found.break_rank) - X
    low, high = past > 1e-9, past < -1e-9
    shorter = low if low.sum() < high.sum() else high
    shorter |= np.abs(past) <= 1e-9
    grand = values.mean()
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + grand
    error = (rest**2).sum() / 45
    for side, slope, t, df in (
        (low, found.slope_up, found.t_up, found.df_up),
        (high, found.slope_down, found.t_down, found.df_down),
    ):
        own = np.array([stats.linregress(X[side], row[side]).slope for row in values])
        spread = ((X[side] - X[side].mean()) ** 2).sum()
        between, pooled = own.var(ddof=1) / 6, error / spread / 6
        excess = max(between - pooled, 0.0)
        freedom = (pooled + excess) ** 2 / (pooled**2 / 45 + excess**2 / 5)
        assert slope == pytest.approx(own.mean(), abs=1e-12)
        assert t == pytest.approx(own.mean() / np.sqrt(max(between, pooled)), abs=1e-10)
        assert df == pytest.approx(freedom, rel=1e-9)
    assert found.p_up == pytest.approx(2 * stats.t.sf(found.t_up, found.df_up), rel=1e-10)


def test_u_test_of_datasets_by_hand() -> None:
    values = curves(TENTS["tent, peak at the 7th rank"], 1, 6, np.random.default_rng(2))[0]
    found = u_test(RANKS, values)
    own = np.array([np.polyfit(X, row, 2) for row in values])
    at_ends = [own[:, 1] + 2 * own[:, 0] * end for end in (0.0, 9.0)]
    p = max(
        stats.ttest_1samp(at_ends[0], 0, alternative="greater").pvalue,
        stats.ttest_1samp(at_ends[1], 0, alternative="less").pvalue,
    )
    assert found.p == pytest.approx(p, rel=1e-8)
    assert found.extremum == pytest.approx(-own[:, 1].mean() / (2 * own[:, 0].mean()), rel=1e-9)


def test_additive_fit_with_missing_cells_is_least_squares() -> None:
    import statsmodels.formula.api as smf

    values = curves(np.zeros(10), 1, 5, np.random.default_rng(0))
    values[0, 1, 3] = values[0, 4, 9] = np.nan
    fit = additive_fit(values)
    dataset, rank = np.nonzero(np.isfinite(values[0]))
    table = {"y": values[0][dataset, rank], "d": dataset, "r": rank}
    model = smf.ols("y ~ C(d) + C(r)", table).fit()
    assert fit.error_N[0] == pytest.approx(model.mse_resid, rel=1e-9)
    assert fit.df == model.df_resid
    apart = fit.mean_NK[0, 3] - fit.mean_NK[0, 0]
    rank_3 = model.params.iloc[1 + 4 + 2]  # after the intercept, 4 datasets and ranks 1 and 2
    assert apart == pytest.approx(rank_3, abs=1e-9)


def test_a_clear_tent_is_an_inverted_u_with_its_peak() -> None:
    values = curves(2 * TENTS["tent, peak at the 4th rank"], 1, 6, np.random.default_rng(3))[0]
    found = rank_shape(RANKS, values)
    assert found.verdict == "inverted U"
    assert found.supported
    assert found.peak_rank == 8
    assert found.peak_low is not None and found.peak_low <= 8 <= (found.peak_high or 0)


def test_it_is_scale_free_and_ignores_levels_of_datasets() -> None:
    values = curves(TENTS["tent, peak at the 7th rank"], 1, 6, np.random.default_rng(9))[0]
    moved = 10 * values + np.arange(6)[:, None]
    for name, value in two_lines(RANKS, values).model_dump().items():
        expected = 10 * value if name.startswith("slope") else value
        assert two_lines(RANKS, moved).model_dump()[name] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n_datasets", [1, 2])
def test_fewer_than_three_datasets_make_no_claim(n_datasets: int) -> None:
    found = rank_shape(RANKS, np.tile(TENTS["tent, peak at the 4th rank"], (n_datasets, 1)))
    assert found.verdict == "no claim"
    assert "at least 3 are needed" in found.reason
    assert found.lines is None and found.peak_low is None


def test_too_few_ranks_make_no_claim() -> None:
    found = rank_shape(np.array([2.0, 8.0, 64.0]), np.random.default_rng(0).normal(size=(6, 3)))
    assert (found.verdict, found.reason) == ("no claim", "3 ranks, at least 4 are needed")


@pytest.mark.parametrize(("slope", "end"), [(0.5, "highest"), (-0.5, "lowest")])
def test_a_peak_at_the_edge_makes_no_claim(slope: float, end: str) -> None:
    values = curves(slope * X, 1, 6, np.random.default_rng(0))[0]
    found = rank_shape(RANKS, values)
    assert found.verdict == "no inverted U shown"
    assert f"highest at the {end} rank" in found.reason


def test_all_cells_equal() -> None:
    found = rank_shape(RANKS, np.zeros((6, 10)))
    assert (found.verdict, found.reason) == ("no inverted U shown", "all ranks are equal")
    assert found.lines is not None and found.lines.p == 1


def test_a_curve_without_noise_is_seen() -> None:
    found = rank_shape(RANKS, np.tile(TENTS["tent, peak at the 4th rank"], (6, 1)))
    assert found.verdict == "inverted U" and found.peak_rank == 8


def test_a_missing_cell_and_a_missing_rank() -> None:
    values = curves(2 * TENTS["tent, peak at the 4th rank"], 1, 6, np.random.default_rng(3))[0]
    values[0, 4] = values[5, 0] = np.nan
    assert rank_shape(RANKS, values).verdict == "inverted U"
    values[:, 4] = np.nan
    with pytest.raises(InputError, match="rank 16 has no value; leave it out"):
        rank_shape(RANKS, values)
    kept = np.delete(values, 4, axis=1)
    assert rank_shape(np.delete(RANKS, 4), kept).verdict == "inverted U"


def test_datasets_with_two_ranks_leave_no_u_test_but_a_decision() -> None:
    """A half-failed study: 3 datasets of 4 ranks, one of which has 2 only."""
    values = np.random.default_rng(0).normal(size=(3, 4))
    values[2, 2:] = np.nan
    found = rank_shape(RANKS[:4], values)
    assert found.quadratic is None and not found.supported
    assert found.quadratic_reason == "2 datasets with 3 ranks, a u-test needs at least 3"
    assert found.lines is not None and found.verdict == "no inverted U shown"
    with pytest.raises(InputError, match="2 datasets with 3 ranks"):
        u_test(RANKS[:4], values)


def test_ranks_that_no_dataset_compares_make_no_claim() -> None:
    values = np.full((4, 4), np.nan)
    values[:2, :2] = values[2:, 2:] = 1.0
    assert "share too few ranks" in rank_shape(RANKS[:4], values).reason
    chain = np.full((3, 4), np.nan)
    for number in range(3):
        chain[number, number : number + 2] = 1.0
    assert "too many cells are missing" in rank_shape(RANKS[:4], chain).reason


@pytest.mark.parametrize("seed", range(60))
def test_whatever_cells_are_missing_there_is_an_answer(seed: int) -> None:
    generator = np.random.default_rng(seed)
    d, k = generator.integers(2, 7), generator.integers(4, 9)
    values = generator.normal(size=(d, k))
    values[generator.random((d, k)) < generator.uniform(0, 0.6)] = np.nan
    values = values[np.isfinite(values).any(1)]
    kept = np.isfinite(values).any(0)
    found = rank_shape(RANKS[:k][kept], values[:, kept])
    assert (found.reason == "") == (found.verdict == "inverted U")
    assert (found.lines is None) == (found.verdict == "no claim")


def test_ranks_must_ascend() -> None:
    with pytest.raises(InputError, match="ascend"):
        rank_shape(RANKS[::-1], np.zeros((6, 10)))


def test_over_traits_against_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    p = [0.01, 0.04, 0.03, 0.5]
    found = over_traits(p)
    assert found.adjusted == pytest.approx(multipletests(p, method="fdr_bh")[1])
    assert found.fisher_p == pytest.approx(
        stats.chi2.sf(-2 * np.log(p).sum(), 2 * len(p)), rel=1e-9
    )


def test_a_singular_quadratic_is_no_inverted_u() -> None:
    found = u_test_of(np.array([0.0, 0.0]), np.zeros((2, 2)), 5, 0.0, 9.0)
    assert found.p == 0.5 and found.extremum is None and found.low is None


def test_the_flat_top_leaves_out_the_ends() -> None:
    flat = flat_top(X, (0.5 * X)[None], np.full(10, 6.0), np.array([30.0]), 55.0)
    assert not flat[0, 0] and not flat[0, -1] and flat[0, 1:-1].any()


def test_draws_at_once_are_the_draws_one_by_one() -> None:
    values = curves(TENTS["tent, peak at the 7th rank"], 20, 6, np.random.default_rng(4))
    batch = two_lines_batch(RANKS, values)
    for number, value in enumerate(values):
        assert two_lines(RANKS, value).p == pytest.approx(batch["p"][number], rel=1e-9)


QUICK, FULL = 400, 4000


def allowed(share: float, draws: int) -> float:
    """Three standard errors of a simulated share."""
    return float(3 * np.sqrt(share * (1 - share) / draws))


@pytest.mark.parametrize("name", ["flat", "step up by 3 at the 4th rank", "log-saturating, to 3"])
def test_not_a_u_quickly(name: str) -> None:
    assert simulate.claims(NOT_A_U[name], QUICK, 6) <= 0.05 + allowed(0.05, QUICK)


@pytest.mark.parametrize("name", list(TENTS))
def test_tents_quickly(name: str) -> None:
    assert simulate.claims(TENTS[name], QUICK, 6) >= 0.80


def test_a_quadratic_alone_would_be_wrong() -> None:
    """Why it is not used: most draws of a saturating curve have a significant negative term."""
    assert simulate.quadratic_alone(NOT_A_U["exponential approach, to 3"], QUICK, 6) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("n_datasets", [3, 6, 12])
@pytest.mark.parametrize("name", list(NOT_A_U))
def test_not_a_u(name: str, n_datasets: int) -> None:
    """Wrong in at most 5% of the truths that are no inverted U (within one simulation error)."""
    assert simulate.claims(NOT_A_U[name], FULL, n_datasets) <= 0.05 + allowed(0.05, FULL) / 3


@pytest.mark.slow
@pytest.mark.parametrize("n_datasets", [3, 6])
@pytest.mark.parametrize("name", list(NOT_A_U))
def test_not_a_u_where_each_dataset_has_a_shape_of_its_own(name: str, n_datasets: int) -> None:
    share = simulate.claims(NOT_A_U[name], FULL, n_datasets, own_shape=0.5)
    assert share <= 0.05 + allowed(0.05, FULL) / 3


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TENTS))
def test_tents(name: str) -> None:
    assert simulate.claims(TENTS[name], FULL, 6) >= 0.80


@pytest.mark.slow
@pytest.mark.parametrize("n_datasets", [3, 6, 12])
@pytest.mark.parametrize("name", list(TENTS))
def test_the_peak_interval_holds_the_peak(name: str, n_datasets: int) -> None:
    assert simulate.peak_coverage(TENTS[name], FULL, n_datasets) >= 0.95


@pytest.mark.slow
def test_the_peak_set_holds_a_rank_that_ties_with_others() -> None:
    values = curves(np.zeros(10), FULL, 6, np.random.default_rng(0))
    assert peak_set(values).mean(0).min() >= 0.95
