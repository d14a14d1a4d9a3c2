"""Over datasets: the unit of replication. Means, and an interval where there are enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.cluster_intervals import interval, p_beyond
from sublim_plugin.analysis.transmission import QuestionDifferences, TransmissionRow


class Effect(BaseModel):
    """Students that differ in seeds only: the mean over datasets, and an interval if there are 3.

    `low` and `high` bound the mean over datasets and questions (95%, `cluster_intervals`); both
    are None with fewer datasets, and `reason` says so. `p` is two-sided, against no difference from
    the base; `se_datasets` and `se_questions` are the parts of its standard error. The `neutral_*`
    fields are the same for the difference from the neutral students of the same condition and
    seeds, over the datasets that have one. `n_replicates` students were left out because their
    weights equal another's (`TransmissionRow.replicate_of`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    condition: str
    target: str
    role: Literal["student", "control"]
    settings: str
    settings_name: str
    scalings: str
    method: str
    rank: int | None
    train_context: str
    eval_context: str
    n_datasets: int
    n_students: int
    n_replicates: int
    n_questions: int
    vs_base_logprob: float
    sd_over_datasets: float | None
    se_datasets: float | None
    se_questions: float | None
    low: float | None
    high: float | None
    p: float | None
    reason: str
    vs_neutral_logprob: float | None
    neutral_low: float | None
    neutral_high: float | None
    neutral_p: float | None
    neutral_datasets: int
    rows: tuple[str, ...]


def effects(
    rows: Iterable[TransmissionRow], differences: QuestionDifferences
) -> tuple[Effect, ...]:
    """Average students over training seeds, then over datasets (the unit of replication).

    Only rows that agree in everything but seeds are pooled.
    """
    groups: dict[tuple[str, str, str], list[TransmissionRow]] = {}
    left_out: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = (row.target, row.eval_context, row.condition)
        if row.pooled:
            groups.setdefault(key, []).append(row)
        elif row.replicate_of is not None:
            left_out[key] = left_out.get(key, 0) + 1
    return tuple(_effect(group, differences, left_out.get(key, 0)) for key, group in groups.items())


def by_dataset(
    rows: Iterable[TransmissionRow], differences: Mapping[str, Sequence[float]]
) -> Floats:
    """Differences by question, averaged over the training seeds of each dataset (D, Q).

    Args:
        differences: by row; rows that are not in it are left out.
    """
    groups: dict[str | None, list[Sequence[float]]] = {}
    for row in rows:
        if row.row in differences:
            groups.setdefault(row.dataset, []).append(differences[row.row])
    return np.array([np.mean(values, axis=0) for values in groups.values()])


def _effect(
    group: Sequence[TransmissionRow], differences: QuestionDifferences, n_replicates: int
) -> Effect:
    values_DQ = by_dataset(group, differences.base)
    found = interval(values_DQ)
    n, n_questions = values_DQ.shape
    neutral_DQ = by_dataset(group, differences.neutral)
    neutral = interval(neutral_DQ) if len(neutral_DQ) else None
    first = group[0]
    return Effect(
        condition=first.condition,
        target=first.target,
        role="control" if first.role == "control" else "student",
        settings=first.settings,
        settings_name=first.settings_name,
        scalings=first.scalings,
        method=first.method,
        rank=first.rank,
        train_context=first.train_context or "",
        eval_context=first.eval_context,
        n_datasets=n,
        n_students=len(group),
        n_replicates=n_replicates,
        n_questions=n_questions,
        vs_base_logprob=found.mean,
        sd_over_datasets=float(values_DQ.mean(1).std(ddof=1)) if n > 1 else None,
        se_datasets=found.se_datasets,
        se_questions=found.se_questions,
        low=found.low,
        high=found.high,
        p=None if found.reason else 2 * p_beyond(found, 0.0),
        reason=found.reason,
        vs_neutral_logprob=neutral.mean if neutral else None,
        neutral_low=neutral.low if neutral else None,
        neutral_high=neutral.high if neutral else None,
        neutral_p=2 * p_beyond(neutral, 0.0) if neutral and not neutral.reason else None,
        neutral_datasets=neutral.n_datasets if neutral else 0,
        rows=tuple(row.row for row in group),
    )
