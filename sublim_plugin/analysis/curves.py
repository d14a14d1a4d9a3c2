"""Students that may be read together, and their rank curves as arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.transmission import SCALINGS, TransmissionRow


class Group(NamedTuple):
    """Students that may be read together: one trait, contexts, settings and rule of alpha."""

    target: str
    train_context: str
    eval_context: str
    settings: str
    scaling: str

    @property
    def contexts(self) -> tuple[str, str]:
        return self.train_context, self.eval_context


def groups(rows: Iterable[TransmissionRow]) -> dict[Group, list[TransmissionRow]]:
    """The pooled students' rows by group; a row is in the group of each of its scalings."""
    found: dict[Group, list[TransmissionRow]] = {}
    for row in rows:
        if row.role == "student" and row.pooled:
            for scaling in row.scalings.split(SCALINGS):
                key = Group(
                    row.target, row.train_context or "", row.eval_context, row.settings, scaling
                )
                found.setdefault(key, []).append(row)
    return found


def group_names(found: Mapping[Group, Sequence[TransmissionRow]]) -> dict[Group, str]:
    """A name for each group that tells it from the others: "LoRA, alpha = rank"."""
    kinds: dict[str, set[str]] = {}
    for key in found:
        if key.scaling:
            kinds.setdefault(key.target, set()).add(key.scaling)
    return {
        key: rows[0].settings_name
        + (f", {key.scaling}" if key.scaling and len(kinds[key.target]) > 1 else "")
        for key, rows in found.items()
    }


def prefixes(found: Iterable[Group], names: Mapping[Group, str]) -> dict[Group, str]:
    """The name and a colon for groups alike in trait, contexts and kind of method, else ""."""
    keys = list(found)
    alike = Counter((key.target, key.contexts, key.scaling == "") for key in keys)
    return {
        key: f"{names[key]}: " if alike[key.target, key.contexts, key.scaling == ""] > 1 else ""
        for key in keys
    }


@dataclass(frozen=True)
class RankCurves:
    """LoRA students of one group, which differ in rank and seeds only.

    `values_DK` is transmission in nats, averaged over training seeds, NaN where a cell is missing.
    """

    group: Group
    family: str
    ranks: Floats
    datasets: tuple[str, ...]
    values_DK: Floats
    rows: tuple[str, ...]


def rank_curves(rows: Iterable[TransmissionRow], least: int = 2) -> list[RankCurves]:
    """Every rank curve in the table with `least` ranks, in its order."""
    found = []
    for group, own in groups(row for row in rows if row.rank is not None).items():
        ranks = sorted({row.rank for row in own if row.rank is not None})
        if len(ranks) < least:
            continue
        cells: dict[tuple[str | None, int | None], list[float]] = {}
        for row in own:
            cells.setdefault((row.dataset, row.rank), []).append(row.vs_base_logprob or 0.0)
        datasets = tuple(dict.fromkeys(row.dataset or "" for row in own))
        found.append(
            RankCurves(
                group=group,
                family=own[0].family,
                ranks=np.array(ranks, dtype=float),
                datasets=datasets,
                values_DK=np.array(
                    [[np.mean(cells.get((d, k), [np.nan])) for k in ranks] for d in datasets]
                ),
                rows=tuple(row.row for row in own),
            )
        )
    return found
