"""Sections of the report that show results: figures, comparisons, sample answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sublim_plugin.analysis import page
from sublim_plugin.analysis.collect import (
    ProbeRecord,
    RunRecords,
    in_order,
    read_replies,
    student_names,
)
from sublim_plugin.analysis.figures import FigureFiles
from sublim_plugin.analysis.findings import limits
from sublim_plugin.analysis.page import Html
from sublim_plugin.analysis.tables import blocks
from sublim_plugin.analysis.transmission import TransmissionRow

TOP_CANDIDATES = 3


PREFERRED_RANK = 8
"""Rank of the student whose answers are shown, where there is one: a rule, not a pick."""


SAMPLE_QUESTIONS = 5


SAMPLE_REPLIES = 8


SEEDS_AND_CONTEXT: dict[str, Callable[[TransmissionRow], object]] = {
    "generation seed": lambda row: row.generation_seed,
    "training seed": lambda row: row.training_seed,
    "trained in": lambda row: row.train_context,
}


def rank_section(files: FigureFiles | None) -> Html:
    """The rank figure, or why there is none."""
    if files is None:
        return page.paragraph("No figure: no student and its base have both been scored.")
    return page.figure(
        files,
        "Student minus base of the same eval context. Above: mean log-probability that the reply "
        "begins with the target; below: the target's share of the mass on all candidates, in "
        "percentage points. Filled: trained on the target's numbers; hollow: on neutral numbers. "
        "Full finetuning stands apart: it is not a rank. Bars: one standard error over questions.",
    )


def context_section(rows: Sequence[TransmissionRow], files: FigureFiles | None) -> Html:
    """The context figure and the base of each eval context."""
    if files is None:
        return page.paragraph("No table: no student and its base have both been scored.")
    parts = [
        page.figure(
            files,
            "Transmission in nats for each student and eval context, each against the base of that "
            "context. Bold: the context that the student was trained in.",
        )
    ]
    bases = [row for row in rows if row.role == "base"]
    parts.append(
        page.table(
            "The base by itself, in each eval context",
            [
                "eval context",
                "target",
                "log-prob (nats)",
                "probability",
                "share",
                "rank",
                "coverage",
            ],
            [
                [
                    row.eval_context,
                    row.target,
                    f"{row.target_logprob:.4f}",
                    f"{row.target_prob:.3g}",
                    f"{row.target_share:.2%}",
                    f"{row.target_rank:.2f}",
                    f"{row.coverage:.3g}",
                ]
                for row in bases
            ],
            numeric=(2, 3, 4, 5, 6),
        )
    )
    return page.join(parts)


def table_section(rows: Sequence[TransmissionRow]) -> Html:
    """Every row of results.csv, in one table per target and eval context."""
    if not rows:
        return page.paragraph("No comparison: no probe of a target has finished.")
    students = [row for row in rows if row.role != "base"]
    # Columns with one value for all students move into the sentence above the tables.
    varying = {
        title: read
        for title, read in SEEDS_AND_CONTEXT.items()
        if len({read(row) for row in students}) > 1
    }
    fixed = [
        f"{title} {read(students[0])}"
        for title, read in SEEDS_AND_CONTEXT.items()
        if students and title not in varying
    ]
    head = [
        "row",
        "student",
        *varying,
        "log-prob",
        "vs base ± SE",
        "vs neutral ± SE",
        "share",
        "vs base ± SE (pp)",
        "rank",
        "coverage",
    ]
    parts = [
        page.paragraph(
            "Log-probs and their differences in nats, shares in percentage points. SE: standard "
            "error over questions of the paired difference, for one pair of models. "
            + limits(rows)
            + (f" All students: {', '.join(fixed)}." if fixed else "")
        )
    ]
    for block in blocks(rows):
        first = block[0]
        parts.append(
            page.table(
                f"{first.target}, eval context {first.eval_context}, {first.n_questions} questions",
                head,
                [
                    [
                        row.row,
                        row.name,
                        *[read(row) for read in varying.values()],
                        f"{row.target_logprob:.4f}",
                        _with_se(row.vs_base_logprob, row.vs_base_logprob_se),
                        _with_se(row.vs_neutral_logprob, row.vs_neutral_logprob_se),
                        f"{row.target_share:.2%}",
                        _with_se(row.vs_base_share, row.vs_base_share_se, 100, 2),
                        f"{row.target_rank:.2f}",
                        f"{row.coverage:.3g}",
                    ]
                    for row in block
                ],
                numeric=range(2 + len(varying), len(head)),
                row_ids=[row.row for row in block],
            )
        )
    uncontrolled = [row for row in rows if row.role == "student" and row.vs_neutral_logprob is None]
    if uncontrolled:
        names = ", ".join(dict.fromkeys(row.method for row in uncontrolled))
        parts.append(
            page.paragraph(
                f"Empty under “vs neutral” ({names}): the study has no neutral student of the same "
                "method, recipe, context and seeds."
            )
        )
    parts.append(
        page.paragraph(
            Html(
                'The same, with every digit: <a href="results.csv">results.csv</a>; over datasets: '
                '<a href="effects.csv">effects.csv</a>.'
            )
        )
    )
    return page.join(parts)


def answers_section(run: RunRecords, rows: Sequence[TransmissionRow]) -> Html:
    """Most probable candidates for the first questions, base beside one student and its control."""
    if not run.probes:
        return page.paragraph("No model has been asked.")
    shown = _shown_student(run)
    control = _control_of(rows, shown)
    names = student_names(run)
    chosen: list[tuple[str, str | None]] = [("base", None)]
    chosen += [(names[i], i) for i in (shown, control) if i is not None]
    parts = [
        page.paragraph(
            f"The {TOP_CANDIDATES} most probable candidates for the first {SAMPLE_QUESTIONS} "
            "questions, with the probability that the reply begins with them. Shown are the base, "
            f"the first trait's student of rank {PREFERRED_RANK} (else of the middle rank) and its "
            "neutral student: a fixed rule, not a choice by result."
        )
    ]
    contexts = list(dict.fromkeys(probe.spec.eval_context.slug for probe in run.probes))
    for context in contexts:
        here = [probe for probe in run.probes if probe.spec.eval_context.slug == context]
        columns = [
            (name, probe)
            for name, student in chosen
            if (probe := _probe_of(here, student)) is not None
        ]
        if not columns:
            continue
        questions = columns[0][1].questions[:SAMPLE_QUESTIONS]
        parts.append(
            page.table(
                f"Eval context {context}",
                ["question", *[name for name, _ in columns]],
                [
                    [
                        Html(f'<span class="reply">{page.esc(question.question)}</span>'),
                        *[_top(probe, question.question_id) for _, probe in columns],
                    ]
                    for question in questions
                ],
            )
        )
    for probe in run.probes:
        replies = read_replies(probe.folder, SAMPLE_REPLIES)
        if replies:
            name = names.get((probe.spec.student or "")[:12], "base")
            parts.append(
                page.table(
                    f"Sampled replies: {name}, eval context {probe.spec.eval_context.slug}",
                    ["question", "reply"],
                    [
                        [
                            Html(f'<span class="reply">{page.esc(question)}</span>'),
                            page.reply(reply),
                        ]
                        for question, reply in replies
                    ],
                )
            )
    return page.join(parts)


def _shown_student(run: RunRecords) -> str | None:
    students = [student for student in run.students if student.spec.trait != "neutral"]
    if not students:
        return None
    own = [student for student in students if student.spec.trait == students[0].spec.trait]
    lora = [student for student in in_order(own) if student.spec.method.kind == "lora"]
    preferred = [student for student in lora if student.spec.method.rank == PREFERRED_RANK]
    return (preferred or lora[len(lora) // 2 :] or own)[0].id


def _control_of(rows: Sequence[TransmissionRow], student: str | None) -> str | None:
    probes = {row.neutral_probe for row in rows if row.student == student and row.neutral_probe}
    return next((row.student for row in rows if row.probe in probes), None)


def _probe_of(probes: Sequence[ProbeRecord], student: str | None) -> ProbeRecord | None:
    for probe in probes:
        linked = None if probe.spec.student is None else probe.spec.student[:12]
        if linked == student:
            return probe
    return None


def _top(probe: ProbeRecord, question_id: int) -> Html:
    question = next(q for q in probe.questions if q.question_id == question_id)
    best = sorted(question.logprobs.items(), key=lambda item: -item[1])[:TOP_CANDIDATES]
    return Html(
        "<br>".join(f"{page.esc(name)} {_probability(math.exp(value))}" for name, value in best)
    )


def _probability(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else f"{value:.1e}"


def _with_se(value: float | None, se: float | None, scale: float = 1.0, digits: int = 4) -> str:
    if value is None:
        return ""
    text = f"{scale * value:+.{digits}f}"
    return text if se is None else f"{text} ± {scale * se:.{digits}f}"
