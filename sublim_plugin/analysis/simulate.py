"""How often the statistics are right on data with known truth.

    python -m sublim_plugin.analysis.simulate [--draws 4000] [--quick]

prints the tables of docs/statistics.md as Markdown, with seeds and counts. Each function below is
also what the tests run, with the counts that the tables name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import click
import numpy as np
from scipy import stats

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.cluster_bootstrap import bootstrap_intervals
from sublim_plugin.analysis.cluster_intervals import half_widths, variances
from sublim_plugin.analysis.diagonal_contrast import contrast_interval, permutation_test
from sublim_plugin.analysis.equivalence import LEVEL, against_best, flat_in_rank
from sublim_plugin.analysis.power import detectable
from sublim_plugin.analysis.rank_or_scale import rank_or_scale
from sublim_plugin.analysis.rank_shape import claims_batch, peak_set
from sublim_plugin.analysis.simulated_truths import (
    CELL_SD,
    CLUSTERED,
    DATASET_SD,
    NOT_A_U,
    RANKS,
    TENTS,
    X,
    clustered,
    curves,
)
from sublim_plugin.analysis.u_test import u_test

SEED = 20260531
COUNTS = (3, 6, 12)
"""Numbers of datasets."""


def claims(
    truth_K: Floats, draws: int, n_datasets: int, seed: int = SEED, own_shape: float = 0.0
) -> float:
    """Share of draws in which `rank_shape` claims an inverted U."""
    generator = np.random.default_rng(seed)
    values = curves(truth_K, draws, n_datasets, generator, own_shape=own_shape)
    return float(claims_batch(RANKS, values).mean())


def quadratic_alone(truth_K: Floats, draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share in which a quadratic of the rank means has a negative term with p < .05 (never used).

    The usual test, on 10 means with ordinary least-squares errors.
    """
    mean_NK = curves(truth_K, draws, n_datasets, np.random.default_rng(seed)).mean(1)
    design = np.vander(X, 3, increasing=True)
    solve = np.linalg.pinv(design)
    coefficients = mean_NK @ solve.T
    residual = mean_NK - coefficients @ design.T
    df = len(X) - 3
    se = np.sqrt((residual**2).sum(1) / df * np.linalg.inv(design.T @ design)[2, 2])
    return float((coefficients[:, 2] / se < stats.t.ppf(0.025, df)).mean())


def u_test_alone(truth_K: Floats, draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share in which the u-test alone has p < .05."""
    values = curves(truth_K, draws, n_datasets, np.random.default_rng(seed))
    return float(np.mean([u_test(RANKS, value_DK).p < 0.05 for value_DK in values]))


def peak_coverage(truth_K: Floats, draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share in which the set of ranks that may be highest holds the highest."""
    values = curves(truth_K, draws, n_datasets, np.random.default_rng(seed))
    return float(peak_set(values)[:, int(truth_K.argmax())].mean())


def coverage(kind: str, draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share in which `cluster_intervals.interval` holds the true mean."""
    values, truth = clustered(kind, draws, n_datasets, np.random.default_rng(seed))
    half = half_widths(*variances(values), n_datasets, values.shape[2], 0.95)
    return float((np.abs(values.mean((1, 2)) - truth) <= half).mean())


def bootstrap_coverage(
    kind: str, draws: int, n_datasets: int, seed: int = SEED
) -> dict[str, float]:
    """Share in which each interval of `bootstrap_intervals` holds the true mean."""
    values, truth = clustered(kind, draws, n_datasets, np.random.default_rng(seed))
    held: dict[str, list[bool]] = {}
    for number, value in enumerate(values):
        for method, (low, high) in bootstrap_intervals(value, seed=number).items():
            held.setdefault(method, []).append(low <= truth <= high)
    return {method: float(np.mean(own)) for method, own in held.items()}


def equivalence_errors(kind: str, draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share that `equivalence` passes although the true mean lies on the margin (the worse side).

    All draws at once: its interval must lie inside the margin, which is 1.
    """
    values, truth = clustered(kind, draws, n_datasets, np.random.default_rng(seed))
    half = half_widths(*variances(values), n_datasets, values.shape[2], 1 - 2 * LEVEL)
    mean = values.mean((1, 2)) - truth
    return float(max((np.abs(mean + side) + half < 1).mean() for side in (1.0, -1.0)))


def equivalence_power(margin: float, draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share called equivalent where the true mean is 0 (normal kind, dataset SD 0.8)."""
    values, truth = clustered("normal", draws, n_datasets, np.random.default_rng(seed))
    half = half_widths(*variances(values), n_datasets, values.shape[2], 1 - 2 * LEVEL)
    return float((np.abs(values.mean((1, 2)) - truth) + half < margin).mean())


def power_at_the_smallest_effect(
    draws: int, n_datasets: int, level: float = 0.05, seed: int = SEED
) -> float:
    """Share of studies that show an effect of just the size that `power.detectable` names.

    Datasets SD 0.5, questions SD 1, rest 0.5, 50 questions; the test is that of the interval.
    """
    spread = float(np.sqrt(0.5**2 + 0.5**2 / 50))
    effect = detectable(
        n_datasets, spread, se_questions=1 / np.sqrt(50), n_questions=50, level=level
    ).effect
    generator = np.random.default_rng(seed)
    values = generator.normal(0, 0.5, (draws, n_datasets, 50)) + (effect or np.nan)
    values += generator.normal(0, 0.5, (draws, n_datasets, 1))
    values += generator.normal(0, 1.0, (draws, 1, 50))
    half = half_widths(*variances(values), n_datasets, 50, 1 - level)
    return float((values.mean((1, 2)) > half).mean())


def flat_errors(draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share called flat although one of 10 ranks lies exactly a margin (2) above the others."""
    truth_K = np.zeros(10)
    truth_K[4] = 2.0
    values = curves(truth_K, draws, n_datasets, np.random.default_rng(seed))
    return float(np.mean([flat_in_rank(value, margin=2.0).equivalent for value in values]))


def against_best_errors(
    draws: int, n_datasets: int, seed: int = SEED, own_shape: float = 0.0
) -> tuple[float, float]:
    """Shares that call full finetuning different from the best LoRA where all methods are equal.

    First `against_best`, then a paired t-test with the best rank of the same data (naive).
    """
    generator = np.random.default_rng(seed)
    values = curves(np.zeros(11), draws, n_datasets, generator, own_shape=own_shape)
    honest = naive = 0
    for value in values:
        full_D, lora_DK = value[:, 0], value[:, 1:]
        p = against_best(full_D, lora_DK, RANKS).p
        honest += p is not None and p < 0.05
        best = int(lora_DK.mean(0).argmax())
        naive += stats.ttest_rel(full_D, lora_DK[:, best]).pvalue < 0.05
    return honest / draws, naive / draws


def rank_or_scale_errors(draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share that prefers one of two predictors which matter alike.

    16 students per dataset, 4 values of one predictor by 4 of the other; both raise transmission by
    0.3 per step, dataset SD and noise SD 0.8.
    """
    generator = np.random.default_rng(seed)
    dataset = np.repeat(np.arange(float(n_datasets)), 16)
    one, other = np.divmod(np.tile(np.arange(16.0), n_datasets), 4)
    preferred = 0
    for _ in range(draws):
        level = np.repeat(generator.normal(0, DATASET_SD, n_datasets), 16)
        y = 0.3 * (one + other) + level + generator.normal(0, CELL_SD, len(dataset))
        (pair,) = rank_or_scale({"one": one, "other": other}, y, dataset).comparisons
        gap = pair.error_difference
        preferred += pair.separable and (gap.low or 0.0) * (gap.high or 0.0) > 0
    return preferred / draws


def context_errors(draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share with an interaction (p < .05) in tables of 2 contexts that have none.

    Train and eval contexts SD 1, cells SD 0.8.
    """
    found = 0
    for table in _tables_without_diagonal(draws, n_datasets, 2, seed):
        p = contrast_interval(table)[1]
        found += p is not None and p < 0.05
    return found / draws


def specificity_errors(draws: int, blocks: int, seed: int = SEED) -> float:
    """Share with a raised diagonal (permutation p < .05) where rows and columns are all there is.

    Tables of 4 x 4 with rows and columns of SD 1 and cells of SD 0.8.
    """
    found = 0
    for draw, table in enumerate(_tables_without_diagonal(draws, blocks, 4, seed)):
        found += permutation_test(table, seed=draw).p < 0.05
    return found / draws


def _tables_without_diagonal(draws: int, blocks: int, size: int, seed: int) -> Iterator[Floats]:
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        table = generator.normal(0, 0.8, (blocks, size, size))
        yield (
            table + generator.normal(size=(blocks, size, 1)) + generator.normal(size=(1, 1, size))
        )


def tables(draws: int, slow_draws: int) -> Iterator[str]:
    """The tables as Markdown, one string each."""
    yield _shape_tables(draws, slow_draws)
    yield _coverage_table(5 * draws, slow_draws)
    yield _error_table(draws, slow_draws)


def _shape_tables(draws: int, slow_draws: int) -> str:
    lines = [
        f"Inverted U: share of {draws:,} draws with the claim, 10 ranks, seed {SEED}. "
        f"The last two columns ({slow_draws:,} draws, 6 datasets) are not used for a claim.",
        "",
        "| truth | 3 datasets | 6 | 12 | 3, own shapes | 6, own shapes | u-test alone | "
        "quadratic alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, truth_K in {**NOT_A_U, **TENTS}.items():
        shares = (
            *(claims(truth_K, draws, d) for d in COUNTS),
            *(claims(truth_K, draws, d, own_shape=0.5) for d in (3, 6)),
            u_test_alone(truth_K, slow_draws, 6),
            quadratic_alone(truth_K, slow_draws, 6),
        )
        lines.append(f"| {name} | " + _row(shares))
    lines.append("")
    for name, truth_K in TENTS.items():
        held = [f"{peak_coverage(truth_K, draws, d):.3f} with {d}" for d in COUNTS]
        lines.append(f"Peak interval, {name}: holds the peak in {', '.join(held)} datasets.")
    return "\n".join(lines)


def _coverage_table(draws: int, slow_draws: int) -> str:
    lines = [
        f"Coverage of nominal 95% intervals, {draws:,} draws (sampled replies: {draws // 5:,}; "
        f"bootstrap: {slow_draws:,} draws of 999 resamples of datasets and questions), 50 "
        f"questions, seed {SEED}. The first three columns are the report's.",
        "",
        "| data | 3 datasets | 6 | 12 | studentized, 3 | studentized, 6 | studentized, 12 | "
        "BCa, 6 | BCa, 12 | percentile, 6 | percentile, 12 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in CLUSTERED:
        own = draws // 5 if "sampled" in kind else draws
        resampled = {d: bootstrap_coverage(kind, slow_draws, d) for d in COUNTS}
        shares = (
            *(coverage(kind, own, d) for d in COUNTS),
            *(resampled[d]["studentized"] for d in COUNTS),
            *(resampled[d]["BCa"] for d in (6, 12)),
            *(resampled[d]["percentile"] for d in (6, 12)),
        )
        lines.append(f"| {kind} | " + _row(shares))
    return "\n".join(lines)


def _error_table(draws: int, slow_draws: int) -> str:
    lines = [
        f"Errors of the tests, nominal 5% (equivalence: 2.5% a side), and power; seed {SEED}.",
        "",
        "| test, truth | draws | 3 datasets | 6 | 12 |",
        "|---|---|---|---|---|",
    ]

    def line(name: str, count: int, share: Callable[[int, int], float]) -> None:
        lines.append(f"| {name} | {count:,} | " + _row(share(count, d) for d in COUNTS))

    for kind in CLUSTERED:
        name = f"equivalence, mean on the margin, {kind}"
        line(name, draws, partial(equivalence_errors, kind))
    few = slow_draws // 4
    line("flat in rank, one rank a margin higher", few, flat_errors)
    line("full against best LoRA, all equal", slow_draws, lambda n, d: against_best_errors(n, d)[0])
    line("the same, own shapes", slow_draws,
         lambda n, d: against_best_errors(n, d, own_shape=0.5)[0])  # fmt: skip
    line("the same with the best of the same data (not used)", slow_draws,
         lambda n, d: against_best_errors(n, d)[1])  # fmt: skip
    line("rank or scale, both matter alike", slow_draws, rank_or_scale_errors)
    line("context, no interaction, 2 contexts", slow_draws, context_errors)
    line("specificity, rows and columns only, 4 animals", few, specificity_errors)
    line("power at the smallest effect named, one test", draws, power_at_the_smallest_effect)
    line("the same, one of 10 tests", draws, lambda n, d: power_at_the_smallest_effect(n, d, 0.005))
    return "\n".join(lines)


def _row(shares: Iterable[float]) -> str:
    return " | ".join(f"{share:.3f}" for share in shares) + " |"


@click.command()
@click.option("--draws", default=4000, show_default=True, help="Draws for the vectorised checks.")
@click.option("--quick", is_flag=True, help="200 draws: a look at the tables within a minute.")
def main(draws: int, quick: bool) -> None:
    """Print the tables."""
    draws = 200 if quick else draws
    for table in tables(draws, max(40, draws // 4)):
        click.echo(table + "\n")


if __name__ == "__main__":
    main()
