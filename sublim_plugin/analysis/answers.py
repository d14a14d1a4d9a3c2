"""One answer of the report, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """One answer. Numbers are None where `verdict` says that no claim is made.

    `estimate` and its 95% bounds are in `unit`; `p` is that of `test` and `p_adjusted` the one
    after Benjamini and Hochberg's adjustment within the answer's family. `settings` names what the
    students share beside trait and contexts. The `neutral_*` fields are of the same students
    against the neutral student of their settings, `smallest_effect` is what could have been seen
    with power 0.8, and `fieller_*` bound the peak of a quadratic (in ranks).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    topic: str
    target: str
    train_context: str
    eval_context: str
    settings: str = ""
    verdict: str
    sentence: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    test: str = ""
    p: float | None = None
    p_adjusted: float | None = None
    neutral_estimate: float | None = None
    neutral_low: float | None = None
    neutral_high: float | None = None
    neutral_p: float | None = None
    neutral_datasets: int | None = None
    smallest_effect: float | None = None
    fieller_low: float | None = None
    fieller_high: float | None = None
    n_datasets: int
    rows: tuple[str, ...]


LEVEL = 0.05
NO_MARGIN = "no equivalence_margin was stated in the study file, so none can be claimed"


def where(topic: str, target: str, train: str, asked: str, settings: str = "") -> dict[str, Any]:
    """What an answer is about."""
    about = {"topic": topic, "target": target, "train_context": train, "eval_context": asked}
    return about | {"settings": settings}


def no_claim(why: str, n_datasets: int, rows: Sequence[str]) -> dict[str, Any]:
    """An answer that is none, and its reason."""
    return {
        "verdict": "no claim",
        "sentence": f"no claim: {why}",
        "n_datasets": n_datasets,
        "rows": tuple(rows),
    }


def bounds(low: float | None, high: float | None) -> str:
    """[low, high] with signs, or nothing where there is no interval."""
    return "" if low is None or high is None else f"[{low:+.2f}, {high:+.2f}]"


def p_text(p: float | None) -> str:
    """p to three digits, never 0."""
    if p is None:
        return "p not given"
    return "p < .001" if p < 0.001 else "p = 1" if p > 0.9995 else f"p = {p:.3f}".replace("0.", ".")
