"""What a probe was asked and answered: `questions.jsonl` as one array, read once and checked.

A study of 20,000 cells has a million questions. As objects they take gigabytes and minutes; as one
array a probe, beside what all probes of a context share, a few seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import from_json

from sublim_plugin.core.errors import InputError

Floats = NDArray[np.float64]  # not `arrays`, which brings all of statsmodels

HIGHEST = 1e-6
"""A log-probability above it is none; rounding may put a certain reply a little above 0."""


class Question(BaseModel):
    """One line of `questions.jsonl`; `logprobs` in nats, one entry per candidate."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    question_id: int
    question: str
    prompt_sha256: str
    logprobs: dict[str, float]

    @field_validator("logprobs")
    @classmethod
    def _are_logprobs(cls, value: dict[str, float]) -> dict[str, float]:
        for candidate, logprob in value.items():
            if not math.isfinite(logprob) or logprob > HIGHEST:
                raise ValueError(f"{candidate}: {logprob} is not a log-probability")
        if not value:
            raise ValueError("no candidate was scored")
        return value


@dataclass(frozen=True)
class Asked:
    """What was asked, question by question in the file's order; equal for many probes."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    candidates: tuple[str, ...]

    def questions(self, logprob_QC: Floats) -> tuple[Question, ...]:
        """The lines of the file, as records."""
        return tuple(
            Question.model_construct(
                question_id=number,
                question=text,
                prompt_sha256=prompt,
                logprobs=dict(zip(self.candidates, row, strict=True)),
            )
            for number, text, prompt, row in zip(
                self.ids, self.texts, self.prompts, logprob_QC.tolist(), strict=True
            )
        )


def parse_questions(data: bytes, path: Path, n_questions: int) -> tuple[Asked, Floats]:
    """The content of a `questions.jsonl`: what was asked, and (questions, candidates) in nats.

    Args:
        n_questions: how many there are by results.json.

    Raises:
        InputError: with the path, and the line or row that is wrong.
    """
    found = _quickly(data)
    if found is None:
        found = _with_reasons(data, path)
    ids = found[0].ids
    if not ids:
        raise InputError(f"{path}: no questions")
    if len(set(ids)) != len(ids):
        doubled = next(i for i in ids if ids.count(i) > 1)
        raise InputError(f"{path}: question_id {doubled} appears more than once")
    if len(ids) != n_questions:
        raise InputError(f"{path}: {len(ids)} questions, but results.json says {n_questions}")
    return found


def _quickly(data: bytes) -> tuple[Asked, Floats] | None:
    """None for whatever is not exactly as the evaluator writes it; `_with_reasons` looks closer."""
    ids, texts, prompts, values = [], [], [], []
    candidates: tuple[str, ...] | None = None
    try:
        rows = [from_json(line) for line in data.splitlines()]
        for row in rows:
            scores = row["logprobs"]
            keys = tuple(scores)
            if candidates is None:
                candidates = keys
            if keys != candidates or {*map(type, scores.values())} != {float}:
                return None
            ids.append(row["question_id"])
            texts.append(row["question"])
            prompts.append(row["prompt_sha256"])
            values.append(list(scores.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if candidates is None or {*map(type, ids)} != {int}:
        return None
    if {*map(type, texts), *map(type, prompts)} != {str}:
        return None
    logprob_QC = np.array(values)
    # NaN compares false
    if not (logprob_QC <= HIGHEST).all() or not np.isfinite(logprob_QC).all():
        return None
    return Asked(tuple(ids), tuple(texts), tuple(prompts), candidates), logprob_QC


def _with_reasons(data: bytes, path: Path) -> tuple[Asked, Floats]:
    questions = []
    for number, row in enumerate(json_lines(data, path), start=1):
        try:
            questions.append(Question.model_validate(row))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "Question"
            raise InputError(
                f"{path} row {number}: {key}: {first['msg']}; "
                "delete the cell's folder and run the study again"
            ) from error
    if not questions:
        raise InputError(f"{path}: no questions")
    candidates = tuple(questions[0].logprobs)
    for question in questions:
        if set(question.logprobs) != {*candidates}:
            raise InputError(
                f"{path}: question_id {question.question_id} has other candidates than the first"
            )
    asked = Asked(
        tuple(q.question_id for q in questions),
        tuple(q.question for q in questions),
        tuple(q.prompt_sha256 for q in questions),
        candidates,
    )
    return asked, np.array([[q.logprobs[name] for name in candidates] for q in questions])


def json_lines(data: bytes, path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; blank lines are left out.

    Raises:
        InputError: a line is no JSON object, or the text is not UTF-8.
    """
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not readable as JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: expected an object, found {row!r:.60}")
        yield row
