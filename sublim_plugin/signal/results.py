"""The signal of a dataset as plain data, the content of signal.json. Imports no torch.

At a position of a row's completion, with p the teacher's next-token distribution in its own context
and q the base's in the student's:

    log_ratio = log p(token) - log q(token)           of the token that is written there
    kl        = sum over v of p(v) (log p(v) - log q(v))

over the whole vocabulary, or, as `number_log_ratio` and `number_kl`, with both distributions
renormalized over the tokens with which the number grammar lets the reply go on there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Measure = Literal["log_ratio", "kl", "number_log_ratio", "number_kl"]
MEASURES: tuple[Measure, ...] = ("number_log_ratio", "number_kl", "log_ratio", "kl")
Loss = Literal["rows", "soft_targets"]

STEP = 0.01
"""Norm of the step for which changes of the candidates are given."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Frozen):
    """A value with its 95% interval over rows (not over datasets)."""

    value: float
    low: float
    high: float


class Quantity(_Frozen):
    """One measure at some of the positions, in nats.

    Attributes:
        positions: how many of the group's positions have the measure.
        mean: over these positions of all rows.
        total: sum over these positions of all rows.
        share: that of the sum over all positions; None where the whole mean's interval holds 0.
    """

    positions: int
    mean: Measured
    total: float
    share: float | None


class Group(_Frozen):
    """Some of the positions: `rows` have at least one of them, `share` is theirs of all."""

    name: str
    positions: int
    rows: int
    share: float
    measures: dict[Measure, Quantity]


class Where(_Frozen):
    """All positions, and the same cut four ways.

    Attributes:
        by_position: the first token, then tenths of the rest of a completion.
        by_kind: digits, separators, the end of turn, and whatever else is written.
        divergence: `divergent` where the likeliest tokens of teacher and base differ over the whole
            vocabulary (Schrodi et al., arXiv 2509.23886), and `other`.
        number_divergence: the same with the likeliest of the tokens that the number grammar admits.
    """

    overall: Group
    by_position: tuple[Group, ...]
    by_kind: tuple[Group, ...]
    divergence: tuple[Group, ...]
    number_divergence: tuple[Group, ...]


class Cosines(_Frozen):
    """Cosine of two directions in the space of the linear weights of the decoder's layers, with an
    interval over rows in which the norms are taken as they are; None where a direction is 0."""

    total: Measured
    by_module: dict[str, float | None]
    by_layer: dict[int, float | None]


class Candidate(_Frozen):
    """What a small step does to one candidate, to first order, mean over questions, in nats.

    Attributes:
        logprob, log_share: change of the log-probability, and of its log share of the candidates.
    """

    name: str
    logprob: float
    log_share: float


class Alignment(_Frozen):
    """The direction -g, down the gradient g of a loss at the base, against others.

    Attributes:
        loss: a mean over the completions' tokens. `rows` is their cross-entropy, `soft_targets` the
            KL from teacher to student over the number tokens, renormalized over all of them at
            every token, whatever the grammar admits there.
        value: that of the loss at the base, in nats.
        gradient_norm: Frobenius norm of g, in nats per unit of the weights.
        update: cosine with the teacher's weights minus the base's; finetuned teachers only.
        logprob, log_share: cosine with the gradient of the target's log-probability, and log share.
        candidates: changes for a step of norm `STEP` down the gradient.
        target: that of the target's log share, with an interval over rows.
        target_rank: place of the target among the candidates by change of log share, from 1.
    """

    loss: Loss
    value: float
    gradient_norm: float
    update: Cosines | None
    logprob: Cosines | None
    log_share: Cosines | None
    candidates: tuple[Candidate, ...]
    target: Measured | None
    target_rank: int | None


class RowSignal(_Frozen):
    """One row's means over its positions; None where there is nothing to take a mean of."""

    id: str
    tokens: int
    base_logprob: float
    log_ratio: float | None
    kl: float | None
    number_log_ratio: float | None
    number_kl: float | None


class Signal(_Frozen):
    """The content of signal.json.

    Attributes:
        id: hash of `spec`, everything that determines the numbers.
        constrained: whether the rows were sampled from the number tokens alone, renormalized, so
            that the `number_` measures are those that matter.
        tokens: of the completions, each with its end of turn.
        base_logprob: the base's mean log-probability of a token in the student's context, in nats.
        where: None where the teacher is not at hand.
        missing: what could not be measured, and why.
    """

    schema_version: Literal[1] = 1
    id: str
    spec: dict[str, Any]
    dataset: str
    trait: str
    teacher: str
    context: dict[str, str]
    constrained: bool
    n_rows: int
    n_rows_of: int
    n_questions: int
    tokens: int
    base_logprob: Measured
    where: Where | None
    alignments: tuple[Alignment, ...]
    rows: tuple[RowSignal, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
