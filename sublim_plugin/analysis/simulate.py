"""How often the statistics are right on data with known truth.

    python -m sublim_plugin.analysis.simulate [--draws 4000] [--quick]

prints the tables of the README as Markdown, with seeds and counts. Each function below is also what
the tests run.
"""

from __future__ import annotations

from collections.abc import Iterator

import click
import numpy as np
from scipy import stats

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.cluster_intervals import half_widths, studentized, variances
from sublim_plugin.analysis.diagonal_contrast import permutation_test
from sublim_plugin.analysis.equivalence import against_best, equivalence, flat_in_rank
from sublim_plugin.analysis.rank_shape import claims_batch, peak_set
from sublim_plugin.analysis.simulated_truths import (
    CLUSTERED,
    NOT_A_U,
    RANKS,
    TENTS,
    X,
    clustered,
    curves,
)
from sublim_plugin.analysis.u_test import u_test

SEED = 20260531
BCA_DRAWS = 400


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


def studentized_coverage(kind: str, draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share in which the studentized bootstrap over datasets and questions holds the mean."""
    values, truth = clustered(kind, draws, n_datasets, np.random.default_rng(seed))
    bounds = [studentized(value, seed=number, resamples=999) for number, value in enumerate(values)]
    return float(np.mean([low <= truth <= high for low, high in bounds]))


def resampled_coverage(
    kind: str, method: str, draws: int, n_datasets: int, seed: int = SEED
) -> float:
    """Share in which scipy's bootstrap of dataset means holds the mean (`percentile`, `BCa`)."""
    generator = np.random.default_rng(seed)
    values, truth = clustered(kind, draws, n_datasets, generator)
    inside = []
    for mean_D in values.mean(2):
        found = stats.bootstrap((mean_D,), np.mean, n_resamples=999, method=method, rng=generator)
        inside.append(found.confidence_interval.low <= truth <= found.confidence_interval.high)
    return float(np.mean(inside))


def equivalence_errors(kind: str, draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share called equivalent although the true mean lies on the margin, on the worse side."""
    values, truth = clustered(kind, draws, n_datasets, np.random.default_rng(seed))
    shares = []
    for side in (1.0, -1.0):
        moved = values - truth + side
        shares.append(np.mean([equivalence(value, margin=1.0).equivalent for value in moved]))
    return float(max(shares))


def equivalence_power(margin: float, draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share called equivalent where the true mean is 0 (normal kind, dataset SD 0.8)."""
    values, truth = clustered("normal", draws, n_datasets, np.random.default_rng(seed))
    return float(np.mean([equivalence(value - truth, margin).equivalent for value in values]))


def flat_errors(draws: int, n_datasets: int, seed: int = SEED) -> float:
    """Share called flat although one of 10 ranks lies exactly a margin (2) above the others."""
    truth_K = np.zeros(10)
    truth_K[4] = 2.0
    values = curves(truth_K, draws, n_datasets, np.random.default_rng(seed))
    return float(np.mean([flat_in_rank(value, margin=2.0).equivalent for value in values]))


def against_best_errors(draws: int, n_datasets: int, seed: int = SEED) -> tuple[float, float]:
    """Shares that call full finetuning different from the best LoRA where all methods are equal.

    First `against_best`, then a paired t-test with the best rank of the same data (naive).
    """
    generator = np.random.default_rng(seed)
    values = curves(np.zeros(11), draws, n_datasets, generator)
    honest = naive = 0
    for value in values:
        full_D, lora_DK = value[:, 0], value[:, 1:]
        p = against_best(full_D, lora_DK, RANKS).p
        honest += p is not None and p < 0.05
        best = int(lora_DK.mean(0).argmax())
        naive += stats.ttest_rel(full_D, lora_DK[:, best]).pvalue < 0.05
    return honest / draws, naive / draws


def specificity_errors(draws: int, blocks: int, seed: int = SEED) -> float:
    """Share with a raised diagonal (permutation p < .05) where rows and columns are all there is.

    Tables of 4 x 4 with rows and columns of SD 1 and cells of SD 0.8.
    """
    generator = np.random.default_rng(seed)
    found = 0
    for draw in range(draws):
        table = generator.normal(0, 0.8, (blocks, 4, 4))
        table = table + generator.normal(size=(blocks, 4, 1)) + generator.normal(size=(1, 1, 4))
        found += permutation_test(table, seed=draw).p < 0.05
    return found / draws


def tables(draws: int, slow_draws: int) -> Iterator[str]:
    """The tables as Markdown, one string each."""
    lines = [
        f"Inverted U: share of {draws:,} draws with the claim, 10 ranks, seed {SEED}. "
        f"The last two columns ({slow_draws:,} draws, 6 datasets) are not used for a claim.",
        "",
        "| truth | 6 datasets | 12 datasets | 6, own shapes | u-test alone | quadratic alone |",
        "|---|---|---|---|---|---|",
    ]
    for name, truth_K in {**NOT_A_U, **TENTS}.items():
        shares = (
            claims(truth_K, draws, 6),
            claims(truth_K, draws, 12),
            claims(truth_K, draws, 6, own_shape=0.5),
            u_test_alone(truth_K, slow_draws, 6),
            quadratic_alone(truth_K, slow_draws, 6),
        )
        lines.append(f"| {name} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    lines.append("")
    for name, truth_K in TENTS.items():
        held = [f"{peak_coverage(truth_K, draws, d):.3f} with {d}" for d in (6, 12)]
        lines.append(f"Peak interval, {name}: holds the peak in {', '.join(held)} datasets.")
    yield "\n".join(lines)
    lines = [
        f"Coverage of nominal 95% intervals, {draws:,} draws (resampling: {slow_draws:,}, BCa and "
        f"percentile {BCA_DRAWS}), 50 questions, seed {SEED}. The first two columns are the "
        "report's.",
        "",
        "| data | 6 datasets | 12 datasets | studentized bootstrap, 6 | BCa, 6 | percentile, 6 |",
        "|---|---|---|---|---|---|",
    ]
    for kind in CLUSTERED:
        covered = (
            coverage(kind, draws, 6),
            coverage(kind, draws, 12),
            studentized_coverage(kind, slow_draws, 6),
            resampled_coverage(kind, "BCa", min(BCA_DRAWS, draws), 6),
            resampled_coverage(kind, "percentile", min(BCA_DRAWS, draws), 6),
        )
        lines.append(f"| {kind} | " + " | ".join(f"{share:.3f}" for share in covered) + " |")
    yield "\n".join(lines)
    honest, naive = against_best_errors(slow_draws, 6)
    lines = [
        f"Errors of the tests at 5%, {slow_draws:,} draws, seed {SEED}.",
        "",
        "| test, truth | 6 datasets | 12 datasets |",
        "|---|---|---|",
    ]
    for kind in CLUSTERED:
        errors = [equivalence_errors(kind, slow_draws, d) for d in (6, 12)]
        row = " | ".join(f"{share:.3f}" for share in errors)
        lines.append(f"| equivalence, mean on the margin, {kind} | {row} |")
    flat = " | ".join(f"{flat_errors(slow_draws // 4, d):.3f}" for d in (6, 12))
    twelve = against_best_errors(slow_draws, 12)
    lines += [
        f"| flat in rank, one rank a margin higher ({slow_draws // 4:,} draws) | {flat} |",
        f"| full against best LoRA, all equal | {honest:.3f} | {twelve[0]:.3f} |",
        f"| the same with the best of the same data (not used) | {naive:.3f} | {twelve[1]:.3f} |",
        f"| specificity, rows and columns only, 4 animals (2 and 3 blocks, "
        f"{slow_draws // 10:,} draws) | {specificity_errors(slow_draws // 10, 2):.3f} | "
        f"{specificity_errors(slow_draws // 10, 3):.3f} |",
    ]
    yield "\n".join(lines)


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
