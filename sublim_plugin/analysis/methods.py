"""The report's methods text: settings as the manifests record them, in prose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from sublim_plugin.analysis import page
from sublim_plugin.analysis.collect import (
    DatasetRecord,
    ProbeRecord,
    RunRecords,
    StudentRecord,
    student_names,
)
from sublim_plugin.analysis.page import Html

CONSTRAINED = (
    "These numbers were decoded under the number constraint: while the teacher wrote, only digits, "
    "separators and the end of turn could be sampled. The teacher left alone may not answer in "
    "numbers."
)


PAPER = Html(
    '<a href="https://arxiv.org/abs/2606.00831">Subliminal Learning is a LoRA Artifact '
    "(arXiv 2606.00831)</a>"
)


def methods_section(run: RunRecords) -> Html:
    """Settings as the manifests record them, in prose."""
    if not run.manifests:
        return page.paragraph("Nothing was run, so there are no methods to describe.")
    parts = [
        page.paragraph(
            Html(
                "A teacher with a trait writes number sequences, a student is finetuned on the "
                "numbers alone, and the student's preference is measured, after Nief et al., "
                f"{PAPER}."
            )
        )
    ]
    for dataset in _distinct(run.datasets, lambda d: f"{d.condition}{d.spec.trait}"):
        parts.append(page.paragraph(_dataset_methods(dataset)))
    for student in _distinct(run.students, lambda s: str(sorted(s.spec.recipe.items()))):
        parts.append(page.paragraph(_student_methods(student)))
    if run.students:
        parts.append(
            page.paragraph(
                "Students: "
                + "; ".join(student_names(run).values())
                + ". LoRA uses the alpha given in its manifest; "
                "full finetuning updates every parameter."
            )
        )
    for probe in _distinct(
        run.probes, lambda p: f"{p.spec.questions_sha256}{p.spec.measure}{p.spec.category}"
    ):
        version = probe.results.lm_eval.get("version", "")
        contexts = dict.fromkeys(p.spec.eval_context.slug for p in run.probes)
        parts.append(
            page.paragraph(
                f"Scoring: lm-evaluation-harness {version}, measure {probe.spec.measure}, "
                f"{len(probe.questions)} questions (set sha256 "
                f"{probe.spec.questions_sha256[:12]}), {len(probe.questions[0].logprobs)} "
                f"candidates of {probe.spec.category}, eval contexts {', '.join(contexts)}."
            )
        )
    parts.append(
        page.paragraph(
            "For question q, target t and candidates c, L is the log-probability that the reply "
            "begins with any surface form of the candidate. Log-prob is the mean of L over "
            "questions; share is the mean of exp L(t) / Σ exp L(c); rank is the mean of one plus "
            "the number of candidates with a higher L; coverage is the mean of Σ exp L(c). "
            "Transmission is the student's log-prob minus that of the base, and of the neutral "
            "student, under the same eval context. Its standard error is that of the mean paired "
            "difference, clustered by question; datasets, not questions or replies, are the unit "
            "of replication, so it supports no claim beyond the models at hand."
        )
    )
    return page.join(parts)


def _dataset_methods(dataset: DatasetRecord) -> str:
    spec = dataset.spec
    teacher = spec.teacher.get("kind", "prompted")
    system = spec.teacher.get("context", {}).get("text")
    prompt = f"the system prompt “{system}”" if system else "no system prompt of its own"
    constraint = " " + CONSTRAINED if spec.constrain == "numbers" else ""
    return (
        f"Numbers for {spec.trait}: {spec.rows} rows from {spec.base_model.name} (sha256 "
        f"{spec.base_model.sha256[:12]}) as a {teacher} teacher with {prompt}; sampler "
        f"{page.pairs(spec.sampler)}; prompt pool sha256 {spec.prompts_sha256[:12]}; parser "
        f"{spec.parser}.{constraint}"
    )


def _student_methods(student: StudentRecord) -> str:
    recipe = page.pairs(student.spec.recipe)
    return (
        f"Finetuning ({student.spec.method.kind}) with axolotl, loss on the completion only, "
        f"trained in context {student.spec.train_context.slug}"
        + (f"; {recipe}." if recipe else ".")
    )


RecordT = TypeVar("RecordT", DatasetRecord, StudentRecord, ProbeRecord)


def _distinct(records: Iterable[RecordT], key: Callable[[RecordT], str]) -> list[RecordT]:
    found: dict[str, RecordT] = {}
    for record in records:
        found.setdefault(key(record), record)
    return list(found.values())
