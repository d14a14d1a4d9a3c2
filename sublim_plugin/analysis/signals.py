"""Signals among a study's cells, each beside what the students of its dataset took up.

A signal is a cell folder with the signal.json that `sublim signal` writes and a manifest of kind
`signal`. It is measured before any training; transmission is what training then did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from sublim_plugin.analysis.collect import DatasetRecord, RunRecords
from sublim_plugin.analysis.teacher_words import method_of, trained_by
from sublim_plugin.analysis.transmission import TransmissionRow
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.manifest import Manifest

KIND = "signal"
RESULTS = "signal.json"
SAMPLED = "sampled tokens"


class _Read(BaseModel):
    """What is needed of signal.json; the rest is left in it."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Measured(_Read):
    value: float
    low: float
    high: float


class Quantity(_Read):
    mean: Measured


class Group(_Read):
    measures: dict[str, Quantity]


class Where(_Read):
    overall: Group


class Alignment(_Read):
    loss: str
    target: Measured | None
    target_rank: int | None


class SignalRecord(_Read):
    """`where` is None where the teacher was not at hand."""

    constrained: bool
    n_rows: int
    where: Where | None
    alignments: tuple[Alignment, ...]


class Pair(_Read):
    """One student: the signal of its dataset in its train context, and its transmission.

    `kl` and `log_ratio` are means in nats a token, teacher against base, `over` the number tokens
    or the whole vocabulary; `change` is what a small step down the gradient of the student's own
    loss does to the target's log share, in nats, and `target_rank` the target's place among the
    candidates by it. Intervals are over rows. `row` is the student's row of results.csv.
    """

    pair: str
    signal: str
    dataset: str
    trait: str
    generation_seed: int
    teacher: str
    channel: str
    dataset_rows: int
    rows_measured: int
    train_context: str
    eval_context: str
    method: str
    student: str
    over: str
    kl: float | None
    kl_low: float | None
    kl_high: float | None
    log_ratio: float | None
    log_ratio_low: float | None
    log_ratio_high: float | None
    change: float | None
    change_low: float | None
    change_high: float | None
    target_rank: int | None
    vs_base_logprob: float
    vs_base_share: float | None
    row: str


class _Found(NamedTuple):
    manifest: Manifest
    record: SignalRecord


def has_signals(run: RunRecords) -> bool:
    """Whether a signal of the run is done."""
    return any(manifest.kind == KIND for manifest in run.manifests.values())


def pairs(run: RunRecords, rows: Sequence[TransmissionRow]) -> list[Pair]:
    """A pair for each student with a signal of its dataset and train context, in the table's order.

    A student is asked in the context that it was trained in, or, where it was not asked there, in
    the first one.

    Raises:
        InputError: a signal.json is not what `sublim signal` writes.
    """
    signals = _signals(run)
    if not signals:
        return []
    datasets = {dataset.id: dataset for dataset in run.datasets}
    teachers = _teachers(run)
    own: dict[str, TransmissionRow] = {}
    for row in rows:
        if row.role == "student" and row.pooled and row.student is not None:
            known = own.setdefault(row.student, row)
            if row.eval_context == row.train_context != known.eval_context:
                own[row.student] = row
    drafts = []
    for row in rows:
        student = row.student or ""
        if own.get(student) is not row:
            continue
        found = signals.get((row.dataset or "", row.train_context or ""))
        dataset = datasets.get(row.dataset or "")
        if found is not None and dataset is not None:
            drafts.append(_pair(student, row, dataset, found, teachers))
    return [Pair(pair=f"S{i}", **draft) for i, draft in enumerate(drafts, start=1)]


def _signals(run: RunRecords) -> dict[tuple[str, str], _Found]:
    """By dataset and train context."""
    found = {}
    for cell, manifest in run.manifests.items():
        if manifest.kind == KIND:
            context = Context.parse(manifest.spec["train_context"]).slug
            key = (str(manifest.spec["dataset"])[:12], context)
            found[key] = _Found(manifest, _read(cell / RESULTS))
    return found


def _read(path: Path) -> SignalRecord:
    try:
        return SignalRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        why: object = error
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            why = f"{key}: {first['msg']}" if key else first["msg"]
        raise InputError(
            f"{path}: not what `sublim signal` writes ({why}); delete the cell's folder and run"
            " again"
        ) from error


def _pair(
    student: str,
    row: TransmissionRow,
    dataset: DatasetRecord,
    found: _Found,
    teachers: Mapping[str, str],
) -> dict[str, Any]:
    targets = dataset.manifest.spec.get("soft_targets")
    number = found.record.constrained and targets != "vocabulary"
    measures = found.record.where.overall.measures if found.record.where else {}
    kl, ratio = (measures.get(f"number_{name}" if number else name) for name in ("kl", "log_ratio"))
    loss = "soft_targets" if targets else "rows"
    aligned = next((one for one in found.record.alignments if one.loss == loss), None)
    return {
        "signal": found.manifest.id[:12],
        "dataset": dataset.id,
        "trait": row.target,
        "generation_seed": dataset.spec.generation_seed,
        "teacher": teachers[dataset.id],
        "channel": f"soft targets, {targets}" if targets else _tokens(dataset),
        "dataset_rows": dataset.spec.rows,
        "rows_measured": found.record.n_rows,
        "train_context": row.train_context,
        "eval_context": row.eval_context,
        "method": row.method,
        "student": student,
        "over": "number tokens" if number else "vocabulary",
        **_numbers("kl", kl.mean if kl else None),
        **_numbers("log_ratio", ratio.mean if ratio else None),
        **_numbers("change", aligned.target if aligned else None),
        "target_rank": aligned.target_rank if aligned else None,
        "vs_base_logprob": row.vs_base_logprob,
        "vs_base_share": row.vs_base_share,
        "row": row.row,
    }


def _tokens(dataset: DatasetRecord) -> str:
    return "greedy tokens" if dataset.spec.sampler.get("temperature") == 0 else SAMPLED


def _numbers(name: str, found: Measured | None) -> dict[str, float | None]:
    return {
        name: found.value if found else None,
        f"{name}_low": found.low if found else None,
        f"{name}_high": found.high if found else None,
    }


def _teachers(run: RunRecords) -> dict[str, str]:
    """Each dataset's teacher in a few words, by the dataset's id."""
    students = {student.id: student for student in run.students}
    trained = {m.id[:12]: m for m in run.manifests.values() if m.kind == "teacher"}
    found = {}
    for dataset in run.datasets:
        teacher = dataset.spec.teacher
        kind = str(teacher.get("kind", "prompted"))
        words = kind
        if kind == "steered":
            words = f"steered, strength {teacher.get('strength')}"
        elif own := trained.get(str(teacher.get("teacher"))[:12]):
            words = f"trained, {trained_by(own.spec)}"
        elif student := students.get(str(teacher.get("student"))[:12]):
            words = f"student, {method_of(student)}"
        found[dataset.id] = words
    return found
