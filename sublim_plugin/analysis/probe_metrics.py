"""A probe's metrics for one target, recomputed from its questions and checked against the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.collect import METRICS, ProbeRecord
from sublim_plugin.core.errors import InputError

TOLERANCE = 1e-6
"""Largest difference allowed between our numbers and the scoring host's."""


class Metrics(BaseModel):
    """A probe's metrics for one target: per question (in the file's order) and their means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    question_ids: tuple[int, ...]
    logprob_Q: tuple[float, ...]
    prob_Q: tuple[float, ...]
    share_Q: tuple[float, ...]
    rank_Q: tuple[int, ...]
    coverage_Q: tuple[float, ...]

    @property
    def means(self) -> dict[str, float]:
        columns = (self.logprob_Q, self.prob_Q, self.share_Q, self.rank_Q, self.coverage_Q)
        return {name: mean(values) for name, values in zip(METRICS, columns, strict=True)}


class Difference(BaseModel):
    """Mean over questions of a paired difference and its standard error (None for one question)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    se: float | None


def metrics(probe: ProbeRecord, target: str) -> Metrics:
    """Recompute a probe's metrics for `target` ("animals/cat") from its questions.

    Raises:
        InputError: the target is no candidate of the probe, or a number differs from the one in
            results.json by more than `TOLERANCE` (absolute, or relative above 1).
    """
    key = candidate_key(probe, target)
    logprob: list[float] = []
    share: list[float] = []
    rank: list[int] = []
    coverage: list[float] = []
    for question in probe.questions:
        scores = question.logprobs
        own = scores[key]
        mass = math.fsum(math.exp(value) for value in scores.values())
        logprob.append(own)
        coverage.append(mass)
        # The ratio through the largest term stays exact where every probability underflows.
        top = max(scores.values())
        share.append(
            math.exp(own - top) / math.fsum(math.exp(value - top) for value in scores.values())
        )
        rank.append(1 + sum(value > own for value in scores.values()))
    found = Metrics(
        target=target,
        question_ids=tuple(question.question_id for question in probe.questions),
        logprob_Q=tuple(logprob),
        prob_Q=tuple(math.exp(value) for value in logprob),
        share_Q=tuple(share),
        rank_Q=tuple(rank),
        coverage_Q=tuple(coverage),
    )
    check_against_host(probe, target, found.means)
    return found


def paired(ours: Metrics, theirs: Metrics, field: Literal["logprob_Q", "share_Q"]) -> Difference:
    """Mean of the per-question difference `ours - theirs` and its standard error.

    Each question is one cluster with one difference, so the cluster-robust standard error is the
    sample standard deviation (n - 1) over the square root of n.
    """
    left = dict(zip(ours.question_ids, getattr(ours, field), strict=True))
    right = dict(zip(theirs.question_ids, getattr(theirs, field), strict=True))
    differences = [left[i] - right[i] for i in ours.question_ids]
    return Difference(mean=mean(differences), se=standard_error(differences))


def candidate_key(probe: ProbeRecord, target: str) -> str:
    """The key of `target` in the probe's log-probs: `cat` for `animals/cat`."""
    keys = probe.asked.candidates
    for key in (target, target.split("/", 1)[-1]):
        if key in keys:
            return key
    raise InputError(
        f"{probe.folder / 'questions.jsonl'}: {target!r} was not scored; "
        f"candidates are {', '.join(sorted(keys))}"
    )


def check_against_host(probe: ProbeRecord, target: str, means: Mapping[str, float]) -> None:
    """Compare a probe's metrics for a target with results.json.

    Raises:
        InputError: one of them differs.
    """
    reported = probe.results.targets.get(target)
    path = probe.folder / "results.json"
    if reported is None:
        raise InputError(f"{path}: no entry for {target!r} under targets")
    for name, value in means.items():
        theirs = reported.get(name)
        if not isinstance(theirs, int | float) or not math.isclose(
            theirs, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE
        ):
            raise InputError(
                f"{path}: {target} {name} is {theirs!r}, but questions.jsonl gives "
                f"{value!r}; delete the cell's folder and run the study again"
            )


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, summed without loss."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Sample standard deviation over sqrt(n); None for a single value."""
    n = len(values)
    if n < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (n - 1) / n)
