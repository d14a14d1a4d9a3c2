"""The report's answers: each a sentence with its number, interval, test and number of datasets.

Every answer is one row of evidence.csv, and names the rows of results.csv that it was made from.
Nothing is claimed over fewer than three datasets; the answer then says so. An answer is about one
trait and one setting: nothing is averaged over students that differ in more than their seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

from sublim_plugin.analysis.answers import Answer
from sublim_plugin.analysis.collect import RunRecords
from sublim_plugin.analysis.effects import Effect
from sublim_plugin.analysis.evidence_agreement import agreements
from sublim_plugin.analysis.evidence_contrasts import contexts, flatness, scale, specificity
from sublim_plugin.analysis.evidence_shapes import full_finetuning, shapes
from sublim_plugin.analysis.evidence_signal import dose_and_response
from sublim_plugin.analysis.evidence_transmission import cross_checks, planned, transmission
from sublim_plugin.analysis.transmission import QuestionDifferences, TransmissionRow


def evidence(
    run: RunRecords,
    rows: Sequence[TransmissionRow],
    differences: QuestionDifferences,
    effects: Sequence[Effect],
    margin: float | None = None,
) -> tuple[Answer, ...]:
    """All answers that the finished cells allow, by question.

    Args:
        differences, effects: from `question_differences` and `effects` of the same rows.
        margin: the study file's equivalence margin in nats, named before the run.
    """
    drafts = [
        *planned(rows),
        *transmission(rows, effects),
        *cross_checks(rows, effects, differences),
        *shapes(rows),
        *full_finetuning(rows, differences, margin),
        *scale(rows),
        *contexts(rows),
        *flatness(rows, margin),
        *specificity(run, rows),
        *agreements(run, rows),
        *dose_and_response(run, rows),
    ]
    return tuple(Answer(id=f"E{i}", **draft) for i, draft in enumerate(drafts, start=1))
