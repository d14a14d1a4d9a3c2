"""One answer of the report, and how its numbers are written."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """One answer. Numbers are None where `verdict` says that no claim is made.

    `estimate` and its 95% bounds are in `unit`; `p` is that of `test` and `p_adjusted` the one
    after Benjamini and Hochberg's adjustment within the answer's family.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    topic: str
    target: str
    train_context: str
    eval_context: str
    verdict: str
    sentence: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    test: str = ""
    p: float | None = None
    p_adjusted: float | None = None
    n_datasets: int
    rows: tuple[str, ...]


def where(topic: str, target: str, train: str, asked: str) -> dict[str, Any]:
    """What an answer is about."""
    return {"topic": topic, "target": target, "train_context": train, "eval_context": asked}


def bounds(low: float | None, high: float | None) -> str:
    """[low, high] with signs, or nothing where there is no interval."""
    return "" if low is None or high is None else f"[{low:+.2f}, {high:+.2f}]"


def p_text(p: float | None) -> str:
    """p to three digits, never 0."""
    if p is None:
        return "p not given"
    return "p < .001" if p < 0.001 else "p = 1" if p > 0.9995 else f"p = {p:.3f}".replace("0.", ".")
