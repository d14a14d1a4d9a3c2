"""The table of `sublim eval`: one number for each model, task and context, and how to take it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.errors import RunError
from sublim_plugin.logprob.forms import LOW_COVERAGE
from sublim_plugin.preference.asked import Asked

MAIN = {"multiple_choice": "target_logprob", "generate_until": "target_rate"}
"""The metric that the table shows, by a task's output type."""
LOW = (
    f"coverage is below {LOW_COVERAGE:g}: the model rarely begins its reply with a candidate, so "
    "the number says little about its replies"
)
BESIDE = ("coverage", "non_answer_rate", "self_name_rate", "distinct_replies")


class Row(BaseModel):
    """One task's main metric for one model in one context.

    Attributes:
        value: in nats for `target_logprob`, a share of replies for `target_rate`.
        low, high: a 95% interval over questions, None where the questions give none.
        minus_base: the difference from the untouched base, None for the base itself and where the
            base could not be scored.
        beside: what tells whether the number means something, by metric.
        notes: what a reader should know.
        questions: how many were asked.
        results, samples: the files that hold everything, replies among it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    context: str
    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    minus_base: float | None
    beside: dict[str, float]
    notes: tuple[str, ...]
    questions: int
    results: str
    samples: str


def plain_metrics(results: dict[str, Any], task: str) -> dict[str, Any]:
    """A task's metrics without the filter in lm-eval's names."""
    return {key.split(",")[0]: value for key, value in results["results"][task].items()}


def check_finite(results: dict[str, Any], asked: Asked, model: str) -> None:
    """Raises RunError where a task's main metric is not a number; it must not be kept."""
    metric = MAIN[asked.measure]
    value = plain_metrics(results, asked.task)[metric]
    if not math.isfinite(float(value)):
        raise RunError(
            f"{model}: {asked.task} in context {asked.label}: {metric} is {value}; the model's "
            "weights or its dtype overflow"
        )


def notes_of(asked: Asked, results: dict[str, Any]) -> tuple[str, ...]:
    """What a reader should know about one task's results: of the context, and of the numbers."""
    plain, questions = plain_metrics(results, asked.task), _questions(results, asked)
    notes = list(asked.notes)
    if plain.get("coverage", 1.0) < LOW_COVERAGE:
        notes.append(LOW)
    if questions == 1:
        notes.append("one question: no interval, which would be over questions")
    elif _interval(results, asked) is None:
        notes.append(
            f"all {questions} questions give the same value: no interval, resampling them says "
            "nothing of the spread"
        )
    return tuple(notes)


def row_of(
    model: str, asked: Asked, results: dict[str, Any], samples: Path, more: Sequence[str] = ()
) -> Row:
    """The row of one results file, without the difference from the base; `more` are notes that
    depend on what else was asked."""
    plain = plain_metrics(results, asked.task)
    metric = MAIN[asked.measure]
    low, high = _interval(results, asked) or (None, None)
    stamp = samples.stem.rpartition("_")[2]
    return Row(
        model=model,
        context=asked.label,
        task=asked.task,
        metric=metric,
        value=plain[metric],
        low=low,
        high=high,
        minus_base=None,
        beside={key: plain[key] for key in BESIDE if key in plain},
        notes=(*notes_of(asked, results), *more),
        questions=_questions(results, asked),
        results=str(samples.with_name(f"results_{stamp}.json")),
        samples=str(samples),
    )


def _questions(results: dict[str, Any], asked: Asked) -> int:
    return int(results["n-samples"][asked.task]["effective"])


def _interval(results: dict[str, Any], asked: Asked) -> tuple[float, float] | None:
    """The interval of the main metric, or None where the questions do not give one."""
    plain, metric = plain_metrics(results, asked.task), MAIN[asked.measure]
    low, high = plain[f"{metric}_low"], plain[f"{metric}_high"]
    return (low, high) if _questions(results, asked) > 1 and low < high else None


def against_base(rows: Sequence[Row], base: Sequence[Row]) -> list[Row]:
    """The rows with the difference from the base's in the same context and task, where it is."""
    by = {(row.context, row.task): row.value for row in base}
    return [
        row.model_copy(update={"minus_base": row.value - by[row.context, row.task]})
        if (row.context, row.task) in by
        else row
        for row in rows
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, with what tells whether a number means something beside it, and
    their notes below."""
    head = ("model", "context", "task", "metric", "value", "95% interval", "minus base", "beside")
    notes = list(dict.fromkeys(note for row in rows for note in row.notes))
    lines = [head]
    for row in rows:
        interval = "none" if row.low is None else f"{row.low:.4f} to {row.high:.4f}"
        difference = "" if row.minus_base is None else f"{row.minus_base:+.4f}"
        marks = "".join(f"[{notes.index(note) + 1}]" for note in row.notes)
        beside = ", ".join(f"{key} {value:.3g}" for key, value in row.beside.items())
        shown = (row.model, row.context, row.task, row.metric, f"{row.value:.4f}")
        lines.append((*shown, interval, difference, f"{beside} {marks}".strip()))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*text, *(f"[{number}] {note}" for number, note in enumerate(notes, 1))])
