"""The report's answers in words. Each sentence carries the rows of results.csv that it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.replication import MIN_DATASETS, too_few_datasets
from sublim_plugin.analysis.tables import blocks
from sublim_plugin.analysis.transmission import TransmissionRow

if TYPE_CHECKING:
    from sublim_plugin.analysis.effects import Effect

CLEAR = 2.0
"""Standard errors over questions beyond which a difference between two models is called clear."""


class Finding(BaseModel):
    """One statement: a verdict in a few words, the sentence, and the rows it was read from.

    `eval_context` is None for what holds for the target as a whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    eval_context: str | None
    verdict: str
    text: str
    rows: tuple[str, ...]


def findings(rows: Sequence[TransmissionRow], effects: Sequence[Effect]) -> tuple[Finding, ...]:
    """What the table says, target by target and eval context by eval context.

    With fewer than `MIN_DATASETS` datasets a finding describes the students at hand and makes no
    claim over datasets. A null is called a null.
    """
    found: list[Finding] = []
    for target in dict.fromkeys(row.target for row in rows):
        mine = [row for row in rows if row.target == target]
        found.append(_about_target(target, mine))
        for block in blocks(mine):
            context = block[0].eval_context
            own = [e for e in effects if e.target == target and e.eval_context == context]
            found.append(_about_context(target, context, block, own))
    return tuple(found)


def _about_target(target: str, rows: Sequence[TransmissionRow]) -> Finding:
    students = [row for row in rows if row.role == "student"]
    datasets = {row.dataset: row.generation_seed for row in students}
    if not students:
        return Finding(
            target=target,
            eval_context=None,
            verdict="Nothing to say yet",
            text="No student trained on this trait's numbers has been scored.",
            rows=(),
        )
    seeds = ", ".join(str(seed) for seed in sorted({s or 0 for s in datasets.values()}))
    n = len(datasets)
    if n < MIN_DATASETS:
        count = "One dataset" if n == 1 else f"{n} datasets"
        return Finding(
            target=target,
            eval_context=None,
            verdict=f"{count}: no claim over datasets can be made",
            text=(
                f"Generation seed {seeds}. Datasets are the unit of replication and at least "
                f"{MIN_DATASETS} are needed for an interval, so what follows describes these "
                "students and not what another dataset would do. Standard errors are over "
                f"questions; a difference is called clear beyond {CLEAR:g} of them, uncorrected "
                f"for the {len(students)} comparisons with a base."
            ),
            rows=tuple(row.row for row in students),
        )
    return Finding(
        target=target,
        eval_context=None,
        verdict=f"{n} datasets",
        text=(
            f"Generation seeds {seeds}. Intervals are over datasets and questions (95%). Tests, "
            "also of the shape over rank, are in the section on evidence."
        ),
        rows=tuple(row.row for row in students),
    )


def _about_context(
    target: str, context: str, block: Sequence[TransmissionRow], effects: Sequence[Effect]
) -> Finding:
    students = [row for row in block if row.role == "student" and row.vs_base_logprob is not None]
    base = next((row for row in block if row.role == "base"), None)
    word = target.split("/")[-1]
    if not students or base is None:
        return Finding(
            target=target,
            eval_context=context,
            verdict="Not compared",
            text="No student has both its own score and its base's under this context.",
            rows=tuple(row.row for row in block),
        )
    ordered = sorted(students, key=_shift)
    low, high = ordered[0], ordered[-1]
    sentences = [
        f"The base gives {word} a mean log-prob of {base.target_logprob:.3f} nats "
        f"({_share(base.target_share)} among the candidates)."
    ]
    if len(students) == 1:
        sentences.append(f"The one student moved by {_with_se(high)} ({high.method}).")
    else:
        sentences.append(
            f"The {len(students)} students moved by {_with_se(low)} ({low.method}) to "
            f"{_with_se(high)} ({high.method})."
        )
    replicated = [e for e in effects if e.role == "student" and e.low is not None]
    verdict = _replicated_verdict(replicated, sentences) if replicated else ""
    if not verdict:
        verdict = _single_verdict(word, students, sentences)
    if base.warning:
        sentences.append(f"Low coverage: {base.coverage:.2%} of the mass is on any candidate.")
    return Finding(
        target=target,
        eval_context=context,
        verdict=verdict,
        text=" ".join(sentences),
        rows=tuple(row.row for row in [base, *students]),
    )


def _single_verdict(word: str, students: Sequence[TransmissionRow], sentences: list[str]) -> str:
    """Verdict on the students at hand; appends its sentences."""
    if any(row.vs_base_logprob_se is None for row in students):
        sentences.append("With one question there is no standard error to judge this by.")
        return "No verdict"
    raised = [row for row in students if _clear(row.vs_base_logprob, row.vs_base_logprob_se)]
    lowered = [row for row in students if _clear(-_shift(row), row.vs_base_logprob_se)]
    controlled = [row for row in students if row.vs_neutral_logprob is not None]
    for row in controlled:
        sentences.append(
            f"Against the neutral student of the same recipe, {row.method}: "
            f"{row.vs_neutral_logprob:+.3f} nats"
            + (
                f" (SE {row.vs_neutral_logprob_se:.3f})."
                if row.vs_neutral_logprob_se is not None
                else "."
            )
        )
    if not raised:
        also = f"; {_names(lowered)} lie below it" if lowered else ""
        sentences.append(
            f"No student lies above its base by more than {CLEAR:g} standard errors over "
            f"questions{also}: no sign that {word} was transmitted."
        )
        return "Null"
    specific = [
        row for row in controlled if _clear(row.vs_neutral_logprob, row.vs_neutral_logprob_se)
    ]
    both = [row for row in raised if row in specific]
    if both:
        sentences.append(
            f"{_names(both)}: above the base and above the neutral student by more than "
            f"{CLEAR:g} standard errors over questions. Another dataset may not show it."
        )
        return "Raised in this dataset" if len({r.dataset for r in both}) == 1 else "Raised"
    if any(row in controlled for row in raised):
        sentences.append(
            f"{_names(raised)}: above the base, but where a neutral student exists the difference "
            "from it is not clear, so this reads as drift from training on numbers, not as "
            f"transmission of {word}."
        )
        return "Null against the neutral control"
    sentences.append(
        f"{_names(raised)}: above the base, but no neutral student matches there, so drift from "
        "training on numbers cannot be told from transmission."
    )
    return "Above the base, uncontrolled"


def _replicated_verdict(effects: Sequence[Effect], sentences: list[str]) -> str:
    """Verdict on means over datasets; appends its sentences."""
    for effect in effects:
        sentences.append(
            f"{effect.method}: mean over {effect.n_datasets} datasets "
            f"{effect.vs_base_logprob:+.3f} nats, 95% interval "
            f"[{effect.low:+.3f}, {effect.high:+.3f}]."
        )
    above = [effect for effect in effects if (effect.low or 0.0) > 0]
    if above:
        sentences.append(
            "Intervals are not corrected for the number of students; compare with the neutral "
            "students below before calling this transmission."
        )
        return "Above the base over datasets"
    return "No interval lies above the base"


def limits(rows: Sequence[TransmissionRow]) -> str:
    """The sentence on intervals for table captions, or "" where intervals exist."""
    counts = [row.n_datasets for row in rows if row.role != "base"]
    reason = too_few_datasets(max(counts, default=0))
    return f"No interval over datasets is given: {reason}." if reason else ""


def _shift(row: TransmissionRow) -> float:
    return row.vs_base_logprob or 0.0


def _clear(difference: float | None, se: float | None) -> bool:
    return difference is not None and se is not None and difference > CLEAR * se


def _with_se(row: TransmissionRow) -> str:
    se = "" if row.vs_base_logprob_se is None else f", SE {row.vs_base_logprob_se:.3f}"
    return f"{_shift(row):+.3f} nats{se}"


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else f"{value:.2g}"


def _names(rows: Sequence[TransmissionRow]) -> str:
    return ", ".join(dict.fromkeys(row.method for row in rows))
