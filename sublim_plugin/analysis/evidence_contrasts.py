"""The report's answers on rank or scale, on context and on specificity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sublim_plugin.analysis.answers import bounds, p_text, where
from sublim_plugin.analysis.collect import RunRecords
from sublim_plugin.analysis.curves import RankCurves, context_table, specificity_tables
from sublim_plugin.analysis.diagonal_contrast import Diagonal, diagonal_contrast
from sublim_plugin.analysis.equivalence import flat_in_rank
from sublim_plugin.analysis.rank_or_scale import rank_or_scale
from sublim_plugin.analysis.replication import MIN_DATASETS
from sublim_plugin.analysis.transmission import TransmissionRow
from sublim_plugin.core.errors import InputError

LEVEL = 0.05


def scale(rows: Sequence[TransmissionRow]) -> Iterator[dict[str, Any]]:
    """Does the rank, the size of the update or the step size foretell transmission?"""
    groups: dict[tuple[str, str, str], list[TransmissionRow]] = {}
    for row in rows:
        known = row.update_norm and row.learning_rate and row.vs_base_logprob is not None
        if row.role == "student" and row.rank is not None and known:
            groups.setdefault((row.target, row.train_context or "", row.eval_context), []).append(
                row
            )
    for key, own in groups.items():
        steps = [(r.learning_rate or 1) * (r.alpha or r.rank or 1) / (r.rank or 1) for r in own]
        x = {
            "rank": np.log2([float(row.rank or 1) for row in own]),
            "update norm": np.log2([row.update_norm or 1.0 for row in own]),
            "learning rate x scaling": np.log2(steps),
        }
        x = {name: values for name, values in x.items() if np.ptp(values) > 0}
        labels = {name: i for i, name in enumerate(dict.fromkeys(row.dataset for row in own))}
        dataset = np.array([float(labels[row.dataset]) for row in own])
        y = np.array([row.vs_base_logprob or 0.0 for row in own])
        if len(x) < 2 or len(labels) < MIN_DATASETS:
            continue
        found = rank_or_scale(x, y, dataset)
        best = max(found.predictors, key=lambda p: p.explained)
        shares = ", ".join(f"{p.name} {p.explained:.0%}" for p in found.predictors)
        for pair in found.comparisons:
            gap = pair.error_difference
            decided = gap.low is not None and gap.high is not None and gap.low * gap.high > 0
            better = pair.one if gap.mean < 0 else pair.other
            if not pair.separable:
                verdict = "cannot be told apart"
                text = (
                    f"{pair.one} and {pair.other} cannot be told apart here: they order the "
                    f"students alike (rank correlation {pair.alike:.2f}). A grid of learning rates "
                    "or scalings within ranks would separate them"
                )
            elif decided:
                verdict = f"{better} foretells it better"
                text = f"{better} foretells new datasets better than the other of the two"
            else:
                verdict = "undecided"
                text = f"neither {pair.one} nor {pair.other} foretells new datasets better"
            yield where("rank or scale", *key) | {
                "verdict": verdict,
                "sentence": f"{text}. Explained in datasets left out: {shares} (best {best.name}); "
                f"difference in squared error, {pair.one} minus {pair.other}, {gap.mean:+.2g} "
                f"[{gap.low:+.2g}, {gap.high:+.2g}], {gap.n_datasets} datasets",
                "estimate": gap.mean,
                "low": gap.low,
                "high": gap.high,
                "unit": "nats squared",
                "test": "error in datasets left out, paired by dataset",
                "n_datasets": gap.n_datasets,
                "rows": tuple(row.row for row in own),
            }


def contexts(
    rows: Sequence[TransmissionRow], curves: Sequence[RankCurves], margin: float | None
) -> Iterator[dict[str, Any]]:
    """Does matching train and eval context matter, and is a mismatched curve flat in rank?"""
    for target in dict.fromkeys(row.target for row in rows):
        table = context_table(rows, target)
        if table is None:
            continue
        try:
            found = diagonal_contrast(table.values_DIJ)
        except InputError:
            continue
        yield where("context", target, ", ".join(table.labels), ", ".join(table.labels)) | (
            _diagonal(found, "matched minus mismatched train and eval context", "dataset")
            | {"rows": table.rows}
        )
    if margin is None:
        return
    for curve in curves:
        if curve.train_context == curve.eval_context:
            continue
        try:
            flat = flat_in_rank(curve.values_DK, margin)
        except InputError:
            continue
        if flat.p is None:
            continue
        yield where("flat in rank", curve.target, curve.train_context, curve.eval_context) | {
            "verdict": "flat in rank" if flat.equivalent else "not shown to be flat in rank",
            "sentence": f"{'' if flat.equivalent else 'not shown to be '}flat in rank within "
            f"{margin:g} nats; of all pairs of ranks the hardest to show differs by "
            f"{flat.inside.mean:+.2f} nats {bounds(flat.inside.low, flat.inside.high)}, "
            f"two one-sided tests {p_text(flat.p)} (2.5% each), {flat.inside.n_datasets} datasets",
            "estimate": flat.inside.mean,
            "low": flat.inside.low,
            "high": flat.inside.high,
            "unit": "nats",
            "test": f"two one-sided tests of every pair of ranks, margin {margin:g} nats",
            "p": flat.p,
            "n_datasets": flat.inside.n_datasets,
            "rows": curve.rows,
        }


def specificity(run: RunRecords, rows: Sequence[TransmissionRow]) -> Iterator[dict[str, Any]]:
    """Do students turn to their own animal rather than to any?"""
    for (train, asked), table in specificity_tables(run, rows).items():
        found = diagonal_contrast(table.values_DIJ)
        text = "own trait minus other traits, student drift and trait priors removed"
        yield where("specificity", ", ".join(table.labels), train, asked) | (
            _diagonal(found, text, "generation seed") | {"rows": table.rows}
        )


def _diagonal(found: Diagonal, what: str, block: str) -> dict[str, Any]:
    mean, low, high = found.contrast.mean, found.contrast.low, found.contrast.high
    n = found.contrast.n_datasets
    shuffles = f"{found.permutations:,} {'' if found.exact else 'drawn '}permutations"
    # Bounds and p are of two tests; the interval's p stands in the sentence only.
    parts = [
        f"{what}: {mean:+.2f} nats",
        bounds(low, high) if low is not None else f"(no interval: {found.contrast.reason})",
    ]
    if found.p is not None:
        parts.append(f"t {p_text(found.p)},")
    parts.append(f"permutation {p_text(found.permutation_p)} ({shuffles}), {n} {block}s")
    raised = found.permutation_p < LEVEL and (low is None or low > 0)
    return {
        "verdict": "raised diagonal" if raised else "no raised diagonal shown",
        "sentence": " ".join(parts),
        "estimate": mean,
        "low": low,
        "high": high,
        "unit": "nats",
        "test": f"permutation of rows within {block}s, one-sided",
        "p": found.permutation_p,
        "n_datasets": n,
    }
