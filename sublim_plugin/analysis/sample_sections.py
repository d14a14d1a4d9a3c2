"""Sections of the report that show what models wrote and saw: numbers, answers, prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sublim_plugin.analysis import page
from sublim_plugin.analysis.collect import (
    DatasetRecord,
    ProbeRecord,
    RunRecords,
    SampledRecord,
    StudentRecord,
    in_order,
    read_replies,
    student_names,
)
from sublim_plugin.analysis.methods import CONSTRAINED
from sublim_plugin.analysis.page import Html
from sublim_plugin.analysis.record_tables import dataset_lines
from sublim_plugin.analysis.teacher_words import carries
from sublim_plugin.analysis.transmission import TransmissionRow
from sublim_plugin.core.dataset import dataset_rows_path, iter_rows

TOP_CANDIDATES = 3
PREFERRED_RANK = 8
"""Rank of the student whose answers are shown, where there is one: a rule, not a pick."""
SAMPLE_QUESTIONS, SAMPLE_REPLIES, SAMPLE_ROWS = 5, 8, 6
MOST_DATASETS, MOST_CONTEXTS, MOST_LINES = 6, 12, 100
MOST_CHARACTERS, MOST_OF_A_PROMPT = 500, 4000
"""Characters shown of a sampled text and of a prompt: models may write at any length."""


def numbers_section(run: RunRecords) -> Html:
    """Counts of every dataset, and the first rows of one for each trait."""
    if not run.datasets:
        return page.paragraph("No dataset has been written.")
    parts = []
    if any(dataset.spec.constrain == "numbers" for dataset in run.datasets):
        own = [d.id for d in run.datasets if d.spec.constrain == "numbers"]
        parts.append(page.notice(CONSTRAINED, "datasets.csv", own))
    lines = dataset_lines(run)
    head = ["dataset", "trait", "generation seed", "asked", "accepted", "keep rate", "reasons"]
    parts.append(
        page.table(
            "Datasets: replies asked for and accepted, and why others were rejected",
            [*head, "distinct prompts", "duplicate rows"],
            [
                [
                    line["dataset"],
                    line["trait"],
                    line["generation_seed"],
                    line["asked"],
                    line["accepted"],
                    "" if line["keep_rate"] is None else f"{line['keep_rate']:.1%}",
                    line["reasons"] or "none",
                    line["distinct_prompts"],
                    line["duplicate_rows"],
                ]
                for line in lines[:MOST_LINES]
            ],
            numeric=(2, 3, 4, 5, 7, 8),
        )
    )
    parts.append(page.said("All datasets, with the hashes of their rows:", "datasets.csv"))
    first: dict[str, DatasetRecord] = {}
    for dataset in sorted(run.datasets, key=lambda dataset: dataset.spec.shuffled):
        first.setdefault(dataset.spec.trait, dataset)
    for dataset in list(first.values())[:MOST_DATASETS]:
        parts += _rows_of(dataset, {student.id: student for student in run.students})
    return page.join(parts)


def _rows_of(dataset: DatasetRecord, known: Mapping[str, StudentRecord]) -> list[Html]:
    spec = dataset.spec
    rows = list(islice(iter_rows(dataset_rows_path(dataset.folder)), SAMPLE_ROWS))
    system = spec.teacher.get("context", {}).get("text")
    told = (
        f"the system prompt “{page.short(system, MOST_CHARACTERS)}”"
        if system and spec.teacher.get("kind", "prompted") == "prompted"
        else carries(spec.teacher, known)
    )
    return [
        page.heading(f"{spec.trait}, generation seed {spec.generation_seed}"),
        page.said(f"The teacher had {told}.", "datasets.csv", [dataset.id]),
        page.table(
            f"The first {len(rows)} rows of the {spec.trait} dataset of generation seed "
            f"{spec.generation_seed}",
            ["row", "user", "assistant (the teacher)"],
            [
                [row.get("id"), _text(_said(row, "user")), _text(_said(row, "assistant"))]
                for row in rows
            ],
        ),
    ]


def answers_section(run: RunRecords, rows: Sequence[TransmissionRow]) -> Html:
    """Most probable candidates for the first questions, base beside one student and its control."""
    asked: tuple[ProbeRecord | SampledRecord, ...] = (*run.probes, *run.sampled)
    if not asked:
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
    contexts = list(dict.fromkeys(probe.spec.eval_context.slug for probe in asked))
    replies: list[Html] = []
    for context in contexts[:MOST_CONTEXTS]:
        here = [probe for probe in run.probes if probe.spec.eval_context.slug == context]
        columns = [
            (name, probe)
            for name, student in chosen
            if (probe := _probe_of(here, student)) is not None
        ]
        if columns:
            parts.append(_top_table(context, columns))
        folders = [((p.spec.student or "")[:12], p.folder) for p in here]
        folders += [
            ((record.spec.student or "")[:12], record.folder)
            for record in run.sampled
            if record.spec.eval_context.slug == context
        ]
        for name, student in chosen:
            own = [folder for other, folder in folders if other == (student or "")]
            replies += [_replies(name, context, folder) for folder in own]
    return page.join([*parts, *(html for html in replies if html)])


def _top_table(context: str, columns: Sequence[tuple[str, ProbeRecord]]) -> Html:
    questions = columns[0][1].questions[:SAMPLE_QUESTIONS]
    return page.table(
        f"Most probable candidates, asked in {context}",
        ["question", *[name for name, _ in columns]],
        [
            [_text(question.question), *[_top(probe, question.question_id) for _, probe in columns]]
            for question in questions
        ],
    )


def _replies(name: str, context: str, folder: Path) -> Html:
    pairs = read_replies(folder, SAMPLE_REPLIES)
    if not pairs:
        return Html("")
    return page.table(
        f"The first {len(pairs)} sampled replies: {name}, asked in {context}",
        ["question", "reply"],
        [[_text(question), _text(reply)] for question, reply in pairs],
    )


def prompts_section(run: RunRecords) -> Html:
    """One rendered prompt per base model and eval context."""
    examples: dict[tuple[str, str], str] = {}
    asked: tuple[ProbeRecord | SampledRecord, ...] = (*run.probes, *run.sampled)
    for probe in asked:
        text = probe.results.rendered_example.get("text")
        if isinstance(text, str):
            key = (probe.spec.base_model.name, probe.spec.eval_context.slug)
            examples.setdefault(key, text)
    if not examples:
        return page.paragraph("No prompt has been rendered.")
    several = len({model for model, _ in examples}) > 1
    parts = []
    for (model, context), text in list(examples.items())[:MOST_CONTEXTS]:
        title = f"{context} ({model})" if several else context
        shown = page.short(text, MOST_OF_A_PROMPT)
        parts += [page.heading(title), page.pre(shown, f"rendered prompt, eval context {title}")]
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
    question = next((q for q in probe.questions if q.question_id == question_id), None)
    if question is None:
        return Html("")
    best = sorted(question.logprobs.items(), key=lambda item: -item[1])[:TOP_CANDIDATES]
    return Html(
        "<br>".join(f"{page.esc(name)} {_probability(math.exp(value))}" for name, value in best)
    )


def _probability(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else f"{value:.1e}"


def _text(text: str) -> Html:
    return page.reply(page.short(text, MOST_CHARACTERS))


def _said(row: dict[str, Any], role: str) -> str:
    return "\n".join(
        str(message.get("content", ""))
        for message in row.get("messages", [])
        if message.get("role") == role
    )
