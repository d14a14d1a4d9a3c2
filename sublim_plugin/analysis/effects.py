"""Over datasets: the unit of replication. Means, and an interval where there are enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.transmission import (
    MIN_DATASETS,
    TransmissionRow,
    mean,
    no_interval_reason,
    standard_error,
)
from sublim_plugin.core.errors import MissingDependencyError


class Effect(BaseModel):
    """Students that differ in seeds only: the mean over datasets, and an interval if there are 3.

    `low` and `high` bound the mean over datasets (Student's t on the means of datasets, 95%); both
    are None with fewer datasets, and `reason` says so.
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
    vs_base_logprob: float
    sd_over_datasets: float | None
    low: float | None
    high: float | None
    reason: str
    rows: tuple[str, ...]


def effects(rows: Iterable[TransmissionRow]) -> tuple[Effect, ...]:
    """Average students over training seeds, then over datasets (the unit of replication).

    Only rows that agree in everything but seeds are pooled.
    """
    groups: dict[tuple[str, str, str], list[TransmissionRow]] = {}
    for row in rows:
        if row.role != "base" and row.vs_base_logprob is not None:
            groups.setdefault((row.target, row.eval_context, row.condition), []).append(row)
    return tuple(_effect(group) for group in groups.values())


def _effect(group: Sequence[TransmissionRow]) -> Effect:
    by_dataset: dict[str | None, list[float]] = {}
    for row in group:
        if row.vs_base_logprob is not None:
            by_dataset.setdefault(row.dataset, []).append(row.vs_base_logprob)
    means = [mean(values) for values in by_dataset.values()]
    n = len(means)
    se = standard_error(means)
    low = high = None
    if n >= MIN_DATASETS and se is not None:
        half = _t_quantile(n - 1) * se
        low, high = mean(means) - half, mean(means) + half
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
        vs_base_logprob=mean(means),
        sd_over_datasets=se * math.sqrt(n) if se is not None else None,
        low=low,
        high=high,
        reason=no_interval_reason(n),
        rows=tuple(row.row for row in group),
    )


def _t_quantile(degrees: int) -> float:
    try:
        stats: Any = import_module("scipy.stats")
    except ImportError as error:
        raise MissingDependencyError(
            "intervals over datasets need scipy: pip install scipy"
        ) from error
    return float(stats.t.ppf(0.975, degrees))
