"""What a localization found, as plain data, and how it follows from the scores. Pure.

In one context, with P the measure (mean over questions of log P(target), or the share of replies):

    total       = P(student) - P(base)
    sufficiency = P(on in this part alone) - P(base)
    necessity   = P(student) - P(on everywhere else)
    sum         = (P(alone) - P(base)) + (P(everywhere else) - P(base))

The sum is the total where the part and the rest act independently of each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sublim_plugin.localize.sweep import Kind, Part
from sublim_plugin.preference.intervals import interval

Measure = Literal["logprob", "sampled"]
METRIC: dict[Measure, tuple[str, str]] = {
    "logprob": ("target_logprob", "nats"),
    "sampled": ("target_rate", "share of replies"),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Measured(_Frozen):
    """A mean over questions with its 95% interval over questions (not over datasets or seeds)."""

    value: float
    low: float
    high: float


class PartResult(_Frozen):
    """One part.

    Attributes:
        gates: hash of each gate; decode: the state of generated tokens under each.
        text: the tokens where the first gate is on, in the first prompt; None for layers and
            modules; tokens: how many they are.
        shares: sufficiency and necessity over the total; None where the total's interval holds 0,
            or one question gives no interval.
        beside: other numbers of the measure, by gate.
    """

    kind: Kind
    name: str
    band: str | None
    module: str | None
    text: str | None
    tokens: int | None
    gates: dict[str, str]
    decode: dict[str, str]
    sufficiency: Measured
    necessity: Measured | None
    sum: float | None
    shares: tuple[float, float | None] | None
    beside: dict[str, dict[str, float]] = {}


class MeasureResult(_Frozen):
    """All parts by one measure. `beside` holds further numbers of the base and the student."""

    measure: Measure
    metric: str
    unit: str
    base: Measured
    student: Measured
    total: Measured
    beside: dict[str, dict[str, float]]
    parts: tuple[PartResult, ...]


Keep = Literal["top", "rest", "all"]


class Spectrum(_Frozen):
    """The change of one matrix [out, in].

    Attributes:
        norm: Frobenius norm of dW.
        effective_rank: exp of the entropy of the singular values over their sum (Roy and Vetterli,
            "The effective rank", EUSIPCO 2007); 0 where dW is 0.
        stable_rank: squared Frobenius norm over squared largest singular value.
        singular_values: the largest, descending; at most 64.
    """

    name: str
    layer: int | None
    module: str
    shape: tuple[int, int]
    norm: float
    effective_rank: float
    stable_rank: float
    singular_values: tuple[float, ...]


class FilterScore(_Frozen):
    """The base with the `top` k singular directions of the change of every matrix in the decoder's
    layers, with the `rest` of them, or with `all` (`k` is None). Whatever else the student changed
    (embeddings, norms, biases, the output layer) is the base's.

    `effect` is the difference from the base, `share` that over the whole student's.
    """

    measure: Measure
    keep: Keep
    k: int | None
    effect: Measured
    share: float | None


class Spectra(_Frozen):
    """Every matrix in the decoder's layers that the student changes, its filtered scores, and the
    matrices of further students by name."""

    modules: tuple[Spectrum, ...]
    scores: tuple[FilterScore, ...]
    beside: dict[str, tuple[Spectrum, ...]] = {}


class PatchScore(_Frozen):
    """The base with activations put in at one token, minus the base without."""

    at: str
    token: str
    effect: Measured


class Patching(_Frozen):
    """All places. `donor` is the student in its context, `recipient` the base in the other one, in
    nats of log P(target); the first prompt of each is shown with the tokens marked."""

    context: dict[str, str]
    modules: tuple[str, ...]
    layers: tuple[int, ...]
    donor_marked: str
    recipient_marked: str
    donor: Measured
    recipient: Measured
    places: tuple[PatchScore, ...]


class TokenScores(_Frozen):
    """The tokens of one kind; means over rows of each row's mean over its tokens.

    Attributes:
        base, student: log-probability of the token that was written, in nats.
        minus_base: their difference, with an interval over rows.
        base_agrees, student_agrees: share of tokens that are the model's likeliest.
    """

    kind: Literal["divergent", "other"]
    tokens: int
    rows: int
    base: Measured
    student: Measured
    minus_base: Measured
    base_agrees: float
    student_agrees: float


class Divergence(_Frozen):
    """A student on a dataset; `rows_sha256` is that of the rows' file."""

    rows_sha256: str
    context: dict[str, str]
    kinds: tuple[TokenScores, ...]
    notes: tuple[str, ...]


class Localization(_Frozen):
    """The content of results.json.

    Attributes:
        id: hash of everything that determines the numbers.
        spec: that everything.
        prompt: the first question's rendered prompt; tokens: its tokens' texts.
        spans: name -> token indices in that prompt.
        spectra, patching, divergence: where they were asked for.
    """

    schema_version: Literal[1] = 1
    id: str
    spec: dict[str, Any]
    student: str
    trait: str
    context: dict[str, str]
    n_questions: int
    prompt: str
    tokens: tuple[str, ...]
    spans: dict[str, tuple[int, ...]]
    measures: tuple[MeasureResult, ...]
    spectra: Spectra | None
    patching: Patching | None
    divergence: Divergence | None
    notes: tuple[str, ...]
    versions: dict[str, str]


Scores = Mapping[str, Sequence[float]]
"""Value of each question by the gate's hash; the base and the student under their names."""

BASE, STUDENT = "base", "student"


def measured(values: Sequence[float]) -> Measured:
    low, high = interval(values)
    return Measured(value=math.fsum(values) / len(values), low=low, high=high)


def difference(first: Sequence[float], second: Sequence[float]) -> Measured:
    return measured([a - b for a, b in zip(first, second, strict=True)])


def share(effect: Measured, total: Measured, questions: int) -> float | None:
    """An effect over the total, if the total's interval leaves out 0; one question has none."""
    if questions < 2 or total.low <= 0 <= total.high:
        return None
    return effect.value / total.value


def measure_result(
    measure: Measure,
    parts: Sequence[Part],
    scores: Scores,
    texts: Mapping[str, tuple[str, int]],
    beside: Mapping[str, dict[str, float]],
) -> MeasureResult:
    """All parts by one measure.

    Args:
        scores: for every gate of the parts, the base and the student.
        texts: text and number of the tokens where a part that is about positions is on, by the
            hash of its first gate.
        beside: further numbers, by the gate's hash or `base` and `student`.
    """
    base, student = scores[BASE], scores[STUDENT]
    total = difference(student, base)
    metric, unit = METRIC[measure]
    return MeasureResult(
        measure=measure,
        metric=metric,
        unit=unit,
        base=measured(base),
        student=measured(student),
        total=total,
        beside={name: beside[name] for name in (BASE, STUDENT)},
        parts=tuple(_part_result(part, scores, total, texts, beside) for part in parts),
    )


def _part_result(
    part: Part,
    scores: Scores,
    total: Measured,
    texts: Mapping[str, tuple[str, int]],
    beside: Mapping[str, dict[str, float]],
) -> PartResult:
    gates = {"alone": part.alone} | ({"left_out": part.left_out} if part.left_out else {})
    base, student, alone = scores[BASE], scores[STUDENT], scores[part.alone.sha256]
    sufficiency, necessity, both = difference(alone, base), None, None
    if part.left_out is not None:
        left = scores[part.left_out.sha256]
        necessity = difference(student, left)
        both = sufficiency.value + difference(left, base).value
    held = share(sufficiency, total, len(base))
    lost = None if necessity is None else share(necessity, total, len(base))
    shares = None if held is None else (held, lost)
    text, tokens = texts.get(part.alone.sha256, (None, None))
    return PartResult(
        kind=part.kind,
        name=part.name,
        band=part.band,
        module=part.module,
        text=text,
        tokens=tokens,
        gates={name: gate.sha256 for name, gate in gates.items()},
        decode={name: gate.decode_label for name, gate in gates.items()},
        sufficiency=sufficiency,
        necessity=necessity,
        sum=both,
        shares=shares,
        beside={n: beside[gate.sha256] for n, gate in gates.items() if gate.sha256 in beside},
    )
