"""Square tables of transmission: train x eval contexts, and animals x animals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.collect import RunRecords
from sublim_plugin.analysis.curves import group_names, groups
from sublim_plugin.analysis.transmission import TransmissionRow


@dataclass(frozen=True)
class SquareTable:
    """Values of D blocks in an I x I table with the same labels on both sides, NaN if missing."""

    labels: tuple[str, ...]
    blocks: tuple[str, ...]
    values_DIJ: Floats
    rows: tuple[str, ...]


@dataclass(frozen=True)
class ContextTables:
    """`square` tables of one trait, settings and scaling, or the `reason` why there is none.

    `dropped` datasets miss a cell that others have, at a rank that all of the table shares.
    """

    target: str
    name: str
    labels: tuple[str, ...]
    square: SquareTable | None
    dropped: int
    reason: str
    rows: tuple[str, ...]


def context_tables(rows: Iterable[TransmissionRow]) -> list[ContextTables]:
    """Train x eval contexts of LoRA students, each value against its own eval base.

    Datasets are the blocks. A value is the mean over training seeds and over the ranks that every
    cell of the table has. Only datasets with all cells are kept; a cell that no dataset has is NaN.
    Settings with fewer than two contexts that were both trained and asked in have no table.
    """
    own = groups(row for row in rows if row.rank is not None)
    names = group_names(own)
    tables: dict[tuple[str, str, str], list[TransmissionRow]] = {}
    titles: dict[tuple[str, str, str], str] = {}
    for key, mine in own.items():
        place = (key.target, key.settings, key.scaling)
        tables.setdefault(place, []).extend(mine)
        titles[place] = names[key]
    found = []
    for place, mine in tables.items():
        table = _context_table(place[0], titles[place], mine)
        if table is not None:
            found.append(table)
    return found


def _context_table(target: str, name: str, own: list[TransmissionRow]) -> ContextTables | None:
    asked = {row.eval_context for row in own}
    labels = tuple(c for c in dict.fromkeys(row.train_context or "" for row in own) if c in asked)
    if len(labels) < 2:
        return None
    cells: dict[tuple[str, str], dict[tuple[str, int], list[TransmissionRow]]] = {
        (i, j): {} for i in labels for j in labels
    }
    for row in own:
        cell = cells.get((row.train_context or "", row.eval_context))
        if cell is not None and row.rank is not None:
            cell.setdefault((row.dataset or "", row.rank), []).append(row)
    ranks = [{rank for _, rank in cell} for cell in cells.values() if cell]
    shared = sorted(set.intersection(*ranks))
    rows = tuple(dict.fromkeys(row.row for row in own))
    base = ContextTables(target, name, labels, None, 0, "", rows)
    if not shared:
        return replace(base, reason="its cells have no rank in common")
    datasets = tuple(dict.fromkeys(row.dataset or "" for row in own))
    values_DIJ = np.array(
        [[[_mean_of(cells[i, j], d, shared) for j in labels] for i in labels] for d in datasets]
    )
    seen_DIJ = np.isfinite(values_DIJ)
    kept_D = (seen_DIJ == seen_DIJ.any(0)).all((1, 2)) & seen_DIJ.any((1, 2))
    dropped = int((~kept_D).sum())
    if not kept_D.any():
        return replace(base, dropped=dropped, reason="no dataset has every cell")
    kept = tuple(d for d, keep in zip(datasets, kept_D, strict=True) if keep)
    used = tuple(
        dict.fromkeys(
            row.row
            for cell in cells.values()
            for (d, rank), mine in cell.items()
            if d in kept and rank in shared
            for row in mine
        )
    )
    square = SquareTable(labels, kept, values_DIJ[kept_D], used)
    return replace(base, square=square, dropped=dropped, rows=used)


def _mean_of(
    cell: Mapping[tuple[str, int], Sequence[TransmissionRow]], dataset: str, ranks: Iterable[int]
) -> float:
    """Mean over training seeds, then over ranks; NaN where a rank is missing."""
    means = []
    for rank in ranks:
        values = [row.vs_base_logprob or 0.0 for row in cell.get((dataset, rank), ())]
        if not values:
            return np.nan
        means.append(float(np.mean(values)))
    return float(np.mean(means))


@dataclass(frozen=True)
class SpecificityTable:
    """Animals x animals of one family of settings; `dropped` seeds miss a cell."""

    name: str
    train_context: str
    eval_context: str
    square: SquareTable | None
    dropped: int
    reason: str
    labels: tuple[str, ...]
    rows: tuple[str, ...]


def specificity_tables(run: RunRecords, rows: Sequence[TransmissionRow]) -> list[SpecificityTable]:
    """Transmission of each animal's students to each animal, by contexts and settings.

    Rows are the trait whose numbers the student saw, columns the trait asked about, against the
    base's probability of that trait; blocks are generation seeds. A value is the mean over training
    seeds, then over the LoRA ranks that every trait has. Needs two traits. Teachers of one trait
    are never put together; those of two traits are, where each has one.
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

    by_target = groups(row for row in rows if row.rank is not None)
    names = group_names(by_target)
    alike = Counter(
        (g.target, *g.contexts, own[0].family, g.scaling) for g, own in by_target.items()
    )
    pooled = {key[1:] for key, count in alike.items() if count > 1}
    families: dict[tuple[str, ...], list[TransmissionRow]] = {}
    titles: dict[tuple[str, ...], str] = {}
    for group, own in by_target.items():
        key: tuple[str, ...] = (*group.contexts, own[0].family, group.scaling)
        if key in pooled:  # a trait has several teachers: one table for each, by its name
            key += (names[group],)
        families.setdefault(key, []).extend(own)
        titles.setdefault(key, names[group])
    found = []
    for key, own in families.items():
        labels = tuple(dict.fromkeys(row.target for row in own))
        if len(labels) < 2:
            continue
        shared = set.intersection(*({r.rank for r in own if r.target == t} for t in labels))
        table = SpecificityTable(
            titles[key], key[0], key[1], None, 0, "", labels, tuple(row.row for row in own)
        )
        if not shared:
            found.append(replace(table, reason="its traits have no rank in common"))
            continue
        cells: dict[tuple[str, str], dict[int | None, list[TransmissionRow]]] = {}
        for row in own:
            if row.rank in shared:
                cell = cells.setdefault((str(row.generation_seed), row.target), {})
                cell.setdefault(row.rank, []).append(row)
        seeds = tuple(dict.fromkeys(seed for seed, _ in cells))
        kept = tuple(
            seed
            for seed in seeds
            if all(cells.get((seed, label), {}).keys() == shared for label in labels)
        )
        table = replace(table, dropped=len(seeds) - len(kept))
        if not kept:
            found.append(replace(table, reason="no generation seed has a student of every trait"))
            continue

        def value(seed: str, label: str, asked: str, cells: Any = cells) -> float:
            return float(
                np.mean(
                    [
                        np.mean(
                            [
                                mean_logprob(r.probe, asked)
                                - mean_logprob(r.base_probe or "", asked)
                                for r in mine
                            ]
                        )
                        for mine in cells[seed, label].values()
                    ]
                )
            )

        values = [[[value(s, i, j) for j in labels] for i in labels] for s in kept]
        used = tuple(
            row.row
            for (seed, _), cell in cells.items()
            if seed in kept
            for mine in cell.values()
            for row in mine
        )
        square = SquareTable(labels, kept, np.array(values), used)
        found.append(replace(table, square=square, rows=used))
    return found
