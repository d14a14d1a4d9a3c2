"""What a localization found, as plain data, and how it follows from the scores. Pure.

In one context, with P the measure (mean over questions of log P(target), or the share of replies):

    total       = P(student) - P(base)
    sufficiency = P(on in this part alone) - P(base)
    necessity   = P(student) - P(on everywhere else)
    sum         = (P(alone) - P(base)) + (P(everywhere else) - P(base))

The sum is the total where the part and the rest act independently of each other.
"""

from __future__ import annotations

import csv
import io
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
        text: the part's tokens in the first prompt; None for layers and modules.
        tokens: how many they are.
        gates: hash of each gate; decode: the state of generated tokens under each.
        shares: sufficiency and necessity over the total; None where the total's interval holds 0.
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


class Localization(_Frozen):
    """The content of results.json.

    Attributes:
        id: hash of everything that determines the numbers.
        spec: that everything.
        prompt: the first question's rendered prompt; tokens: its tokens' texts.
        spans: name -> token indices in that prompt.
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
    shares = None
    if not total.low <= 0 <= total.high:
        lost = None if necessity is None else necessity.value / total.value
        shares = (sufficiency.value / total.value, lost)
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


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a header line; floats keep every digit, None is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def flat(part: PartResult) -> dict[str, Any]:
    """A part as a row of a CSV."""
    suff, lost = part.sufficiency, part.necessity
    return {
        "kind": part.kind,
        "name": part.name,
        "band": part.band,
        "module": part.module,
        "tokens": part.tokens,
        "text": part.text,
        "sufficiency": suff.value,
        "sufficiency_low": suff.low,
        "sufficiency_high": suff.high,
        "necessity": lost.value if lost else None,
        "necessity_low": lost.low if lost else None,
        "necessity_high": lost.high if lost else None,
        "sum": part.sum,
        "sufficiency_share": part.shares[0] if part.shares else None,
        "necessity_share": part.shares[1] if part.shares else None,
        "decode_alone": part.decode["alone"],
        "decode_left_out": part.decode.get("left_out"),
    }


def table(result: MeasureResult, kinds: Sequence[Kind]) -> str:
    """The parts of some kinds as aligned text."""
    head = ("part", "tokens", "alone - base", "95% interval", "student - left out", "95% interval")
    lines: list[tuple[str, ...]] = [(*head, "sum", "of total", "text")]
    for part in result.parts:
        if part.kind not in kinds:
            continue
        lines.append(
            (
                part.name,
                "" if part.tokens is None else str(part.tokens),
                *_columns(part.sufficiency),
                *_columns(part.necessity),
                "" if part.sum is None else f"{part.sum:+.3f}",
                _percentages(part),
                _short(part.text or ""),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _columns(value: Measured | None) -> tuple[str, str]:
    if value is None:
        return "", ""
    return f"{value.value:+.3f}", f"{value.low:+.3f} to {value.high:+.3f}"


def _percentages(part: PartResult) -> str:
    if part.shares is None:
        return ""
    return " / ".join("" if share is None else f"{share:.0%}" for share in part.shares)


def _short(text: str) -> str:
    return text if len(text) <= 50 else f"{text[:24]} … {text[-23:]}"
