"""Over datasets: the unit of replication. Means, and an interval where there are enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.arrays import Floats
from sublim_plugin.analysis.cluster_intervals import Interval, interval, p_beyond
from sublim_plugin.analysis.transmission import TransmissionRow


class Effect(BaseModel):
    """Students that differ in seeds only: the mean over datasets, and an interval if there are 3.

    `low` and `high` bound the mean over datasets and questions (95%, `cluster_intervals`); both
    are None with fewer datasets, and `reason` says so. `p` is two-sided, against no difference from
    the base. The `neutral_*` fields are of the difference from the neutral students, over the
    datasets that have one (questions fixed).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    condition: str
    target: str
    role: Literal["student", "control"]
    method: str
    rank: int | None
    train_context: str
    eval_context: str
    n_datasets: int
    n_students: int
    n_questions: int
    vs_base_logprob: float
    sd_over_datasets: float | None
    low: float | None
    high: float | None
    p: float | None
    reason: str
    vs_neutral_logprob: float | None
    neutral_low: float | None
    neutral_high: float | None
    neutral_datasets: int
    rows: tuple[str, ...]


def effects(
    rows: Iterable[TransmissionRow], differences: Mapping[str, Sequence[float]]
) -> tuple[Effect, ...]:
    """Average students over training seeds, then over datasets (the unit of replication).

    Only rows that agree in everything but seeds are pooled.

    Args:
        differences: by row, student minus base for each question (`question_differences`).
    """
    groups: dict[tuple[str, str, str], list[TransmissionRow]] = {}
    for row in rows:
        if row.role != "base" and row.vs_base_logprob is not None:
            groups.setdefault((row.target, row.eval_context, row.condition), []).append(row)
    return tuple(_effect(group, differences) for group in groups.values())


def by_dataset(
    rows: Iterable[TransmissionRow], differences: Mapping[str, Sequence[float]]
) -> Floats:
    """Differences from the base, averaged over the training seeds of each dataset (D, Q)."""
    groups: dict[str | None, list[Sequence[float]]] = {}
    for row in rows:
        groups.setdefault(row.dataset, []).append(differences[row.row])
    return np.array([np.mean(values, axis=0) for values in groups.values()])


def _effect(group: Sequence[TransmissionRow], differences: Mapping[str, Sequence[float]]) -> Effect:
    values_DQ = by_dataset(group, differences)
    found = interval(values_DQ)
    n, n_questions = values_DQ.shape
    neutral = _over_neutral(group)
    first = group[0]
    return Effect(
        condition=first.condition,
        target=first.target,
        role="control" if first.role == "control" else "student",
        method=first.method,
        rank=first.rank,
        train_context=first.train_context or "",
        eval_context=first.eval_context,
        n_datasets=n,
        n_students=len(group),
        n_questions=n_questions,
        vs_base_logprob=found.mean,
        sd_over_datasets=float(values_DQ.mean(1).std(ddof=1)) if n > 1 else None,
        low=found.low,
        high=found.high,
        p=None if found.reason else 2 * p_beyond(found, 0.0),
        reason=found.reason,
        vs_neutral_logprob=neutral.mean if neutral else None,
        neutral_low=neutral.low if neutral else None,
        neutral_high=neutral.high if neutral else None,
        neutral_datasets=neutral.n_datasets if neutral else 0,
        rows=tuple(row.row for row in group),
    )


def _over_neutral(group: Sequence[TransmissionRow]) -> Interval | None:
    values: dict[str | None, list[float]] = {}
    for row in group:
        if row.vs_neutral_logprob is not None:
            values.setdefault(row.dataset, []).append(row.vs_neutral_logprob)
    if not values:
        return None
    return interval(np.array([[float(np.mean(own))] for own in values.values()]))
