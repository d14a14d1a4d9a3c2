"""What can be seen: the smallest effect that planned datasets show, and how many more are needed.

The spread between datasets rules everything. `ANCHORS` are the only published ones: the change of
log P(animal) by generation seed at LoRA rank 8 (Nief et al., results of 19 April 2026, means over 3
training seeds, as quoted in the project's notes on the protocol, section 6.3).
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.replication import MIN_DATASETS
from sublim_plugin.core.errors import InputError

POWER = 0.8

ANCHORS: dict[str, tuple[float, ...]] = {
    "cat, 10k rows": (2.31, -0.75, -0.85),
    "eagle, 10k rows": (3.24, 0.75, -0.53),
    "owl, 10k rows": (5.79, 5.06, 0.54),
    "cat, 30k rows": (7.30, 7.16, 4.15),
}
"""Change of log P (nats) of single datasets, by animal and rows in the file."""


class Detectable(BaseModel):
    """The smallest mean effect that `n_datasets` show with the given power; None below 3.

    The unit is that of `sd`, the standard deviation between datasets.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_datasets: int
    sd: float
    power: float
    effect: float | None


def anchor_sd() -> float:
    """Pooled standard deviation between datasets of `ANCHORS`, in nats."""
    squares = freedom = 0.0
    for values in ANCHORS.values():
        mean = math.fsum(values) / len(values)
        squares += math.fsum((value - mean) ** 2 for value in values)
        freedom += len(values) - 1
    return math.sqrt(squares / freedom)


def detectable(n_datasets: int, sd: float, power: float = POWER) -> Detectable:
    """The smallest effect a two-sided t-test at 5% over datasets shows (noncentral t).

    Raises:
        InputError: `sd` is not positive, or `power` not between 0.05 and 1.
    """
    _check(sd, power)
    effect = None
    if n_datasets >= MIN_DATASETS:
        effect = sd * float(
            _power_model().solve_power(nobs=n_datasets, alpha=0.05, power=power, effect_size=None)
        )
    return Detectable(n_datasets=n_datasets, sd=sd, power=power, effect=effect)


def datasets_needed(effect: float, sd: float, power: float = POWER) -> int:
    """Datasets with which `effect` is shown with the given power; at least 3.

    Raises:
        InputError: an effect of 0, which no number of datasets shows.
    """
    _check(sd, power)
    if not effect:
        raise InputError("an effect of 0 cannot be shown by any number of datasets")
    model = _power_model()
    n = MIN_DATASETS
    while model.power(effect_size=abs(effect) / sd, nobs=n, alpha=0.05) < power:
        n = n + 1 if n < 200 else int(n * 1.05)
    return n


def _power_model() -> Any:
    return import_module("statsmodels.stats.power").TTestPower()


def _check(sd: float, power: float) -> None:
    if not sd > 0 or not math.isfinite(sd):
        raise InputError(f"standard deviation between datasets {sd}: a positive number is expected")
    if not 0.05 < power < 1:
        raise InputError(f"power {power}: a number between 0.05 and 1 is expected")
