"""Rows of the transmission table as arrays: rank curves, context tables, animals x animals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.collect import RunRecords
from sublim_plugin.analysis.transmission import TransmissionRow


@dataclass(frozen=True)
class RankCurves:
    """LoRA students of one trait that differ in rank and seeds only.

    `values_DK` is transmission in nats, averaged over training seeds, NaN where a cell is missing.
    """

    target: str
    train_context: str
    eval_context: str
    settings: str
    ranks: Floats
    datasets: tuple[str, ...]
    values_DK: Floats
    rows: tuple[str, ...]


def rank_curves(rows: Iterable[TransmissionRow]) -> list[RankCurves]:
    """Every rank curve in the table, in its order; one rank makes none."""
    groups: dict[tuple[str, str, str, str], list[TransmissionRow]] = {}
    for row in rows:
        if row.role == "student" and row.rank is not None and row.vs_base_logprob is not None:
            key = (row.target, row.train_context or "", row.eval_context, row.settings)
            groups.setdefault(key, []).append(row)
    found = []
    for (target, train, asked, settings), own in groups.items():
        ranks = sorted({row.rank for row in own if row.rank is not None})
        if len(ranks) < 2:
            continue
        datasets = tuple(dict.fromkeys(row.dataset or "" for row in own))
        values_DK = np.array(
            [
                [_mean(r for r in own if (r.dataset, r.rank) == (d, k)) for k in ranks]
                for d in datasets
            ]
        )
        found.append(
            RankCurves(
                target=target,
                train_context=train,
                eval_context=asked,
                settings=settings,
                ranks=np.array(ranks, dtype=float),
                datasets=datasets,
                values_DK=values_DK,
                rows=tuple(row.row for row in own),
            )
        )
    return found


@dataclass(frozen=True)
class SquareTable:
    """Values of D blocks in an I x I table with the same labels on both sides, NaN if missing."""

    labels: tuple[str, ...]
    blocks: tuple[str, ...]
    values_DIJ: Floats
    rows: tuple[str, ...]


def context_table(rows: Iterable[TransmissionRow], target: str) -> SquareTable | None:
    """Train x eval contexts of one trait's LoRA students, each value against its own eval base.

    Datasets are the blocks. A value is the mean over ranks and training seeds, of the conditions
    that every cell of the table has; None with fewer than two contexts that were both trained and
    asked in, or if the cells have no rank in common.
    """
    own = [r for r in rows if r.target == target and r.role == "student" and r.rank is not None]
    own = [row for row in own if row.vs_base_logprob is not None]
    asked = {row.eval_context for row in own}
    labels = [c for c in dict.fromkeys(row.train_context or "" for row in own) if c in asked]
    if len(labels) < 2:
        return None
    cells = {
        (i, j): [r for r in own if (r.train_context, r.eval_context) == (i, j)]
        for i in labels
        for j in labels
    }
    shared = set.intersection(*({r.rank for r in cell} for cell in cells.values() if cell))
    datasets = tuple(dict.fromkeys(row.dataset or "" for row in own))
    used: list[str] = []

    def value(dataset: str, i: str, j: str) -> float:
        mine = [r for r in cells[i, j] if r.dataset == dataset and r.rank in shared]
        used.extend(r.row for r in mine)
        return _mean(mine) if {r.rank for r in mine} == shared else np.nan

    values = [[[value(d, i, j) for j in labels] for i in labels] for d in datasets]
    if not shared:
        return None
    return SquareTable(
        labels=tuple(labels), blocks=datasets, values_DIJ=np.array(values), rows=tuple(used)
    )


def specificity_tables(
    run: RunRecords, rows: Sequence[TransmissionRow]
) -> dict[tuple[str, str], SquareTable]:
    """Animals x animals by (train context, eval context): transmission of each animal's students.

    Rows are the trait whose numbers the student saw, columns the trait asked about, against the
    base's probability of that trait; blocks are generation seeds. A value is the mean over the LoRA
    students of that trait and seed; only ranks that every trait has are taken. Needs two traits.
    """
    probes = {probe.id: probe for probe in run.probes}
    means: dict[str, dict[str, float]] = {}

    def mean_logprob(probe: str, trait: str) -> float:
        if probe not in means:
            questions = probes[probe].questions
            means[probe] = {
                name: float(np.mean([q.logprobs[name] for q in questions]))
                for name in questions[0].logprobs
            }
        known = means[probe]
        return known[trait] if trait in known else known[trait.split("/", 1)[-1]]

    groups: dict[tuple[str, str], list[TransmissionRow]] = {}
    for row in rows:
        if row.role == "student" and row.rank is not None and row.base_probe is not None:
            groups.setdefault((row.train_context or "", row.eval_context), []).append(row)
    found = {}
    for key, own in groups.items():
        labels = tuple(dict.fromkeys(row.target for row in own))
        ranks = [{r.rank for r in own if r.target == label} for label in labels]
        shared = set.intersection(*ranks)
        if len(labels) < 2 or not shared:
            continue
        blocks = tuple(dict.fromkeys(str(row.generation_seed) for row in own))
        values = np.full((len(blocks), len(labels), len(labels)), np.nan)
        used: list[str] = []
        for d, block in enumerate(blocks):
            for i, label in enumerate(labels):
                mine = [
                    r
                    for r in own
                    if r.target == label and str(r.generation_seed) == block and r.rank in shared
                ]
                if {r.rank for r in mine} != shared:
                    continue
                used += [r.row for r in mine]
                for j, asked in enumerate(labels):
                    values[d, i, j] = np.mean(
                        [
                            mean_logprob(r.probe, asked) - mean_logprob(r.base_probe or "", asked)
                            for r in mine
                        ]
                    )
        whole = np.isfinite(values).all((1, 2))
        if whole.any():
            kept = tuple(block for block, ok in zip(blocks, whole, strict=True) if ok)
            found[key] = SquareTable(labels, kept, values[whole], tuple(dict.fromkeys(used)))
    return found


def _mean(rows: Iterable[TransmissionRow]) -> float:
    values = [row.vs_base_logprob for row in rows if row.vs_base_logprob is not None]
    return float(np.mean(values)) if values else np.nan
