"""Transmission: how far a student's preference moved from its base and from its control.

Pure functions over the records of `collect`. Every number is recomputed from the per-question
log-probabilities and checked against what the scoring host reported.

Definitions, for question q, target t and candidates c, with L = log P(reply begins with a form):
target_logprob = mean_q L_t; target_prob = mean_q exp L_t; target_share = mean_q exp L_t /
sum_c exp L_c; target_rank = mean_q (1 + candidates with a higher L); coverage =
mean_q sum_c exp L_c. Transmission is the student's target_logprob minus another model's under the
same eval context, in nats. Its standard error is of the paired per-question difference; it speaks
of other questions put to the same two models and not of other datasets, which are the unit of
replication (Miller 2024, arXiv 2411.00640, for the clustering by question).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.collect import (
    DatasetRecord,
    ProbeRecord,
    RunRecords,
    StudentRecord,
)
from sublim_plugin.analysis.probe_metrics import METRICS, Metrics, candidate_key, metrics, paired
from sublim_plugin.analysis.replication import too_few_datasets
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json

LOW_COVERAGE = 0.01
"""Mass on all candidates below which a share is a ratio of rarities and is flagged."""

SE_UNIT = "over questions, one dataset; not an interval over datasets"

RANK_AND_SEED_KEYS = ("seed", "data_seed", "lora_r", "lora_alpha")
"""Keys of a recipe that differ between the students of one rank curve."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TransmissionRow(_Row):
    """One model under one eval context for one target. Log-probs and differences are in nats.

    `role` is `base`, `student` (trained on the target's numbers) or `control` (trained on neutral
    numbers, scored on the target). Fields that compare are None where there is nothing to compare
    with, and `neutral_reason` or `warning` says why. Rows of one `condition` differ in seeds only,
    rows of one `settings` in seeds, method and rank only. `update_norm` is the total Frobenius norm
    of the weights' change.
    """

    row: str
    role: Literal["base", "student", "control"]
    target: str
    trait: str | None
    generation_seed: int | None
    training_seed: int | None
    method: str
    rank: int | None
    alpha: float | None
    train_context: str | None
    eval_context: str
    target_logprob: float
    target_prob: float
    target_share: float
    target_rank: float
    coverage: float
    base_target_logprob: float | None
    base_target_prob: float | None
    base_target_share: float | None
    base_target_rank: float | None
    base_coverage: float | None
    vs_base_logprob: float | None
    vs_base_logprob_se: float | None
    vs_base_share: float | None
    vs_base_share_se: float | None
    vs_neutral_logprob: float | None
    vs_neutral_logprob_se: float | None
    vs_neutral_share: float | None
    vs_neutral_share_se: float | None
    neutral_reason: str
    n_questions: int
    n_datasets: int
    se_unit: str
    dataset_interval: str
    warning: str
    base_model: str
    questions_sha256: str
    probe: str
    base_probe: str | None
    student: str | None
    dataset: str | None
    neutral_probe: str | None
    condition: str
    settings: str
    learning_rate: float | None
    update_norm: float | None
    simulated: bool

    @property
    def order(self) -> tuple[Any, ...]:
        """Base first, then students by rank with full finetuning last, controls beside them."""
        method = (0, self.rank or 0) if self.method != "full" else (1, 0)
        return (
            {"base": 0}.get(self.role, 1),
            self.train_context or "",
            *method,
            self.role == "control",
            self.generation_seed or 0,
            self.training_seed or 0,
        )

    @property
    def name(self) -> str:
        """Short name for tables: `base`, `LoRA r=8`, `LoRA r=8 neutral`, `full`."""
        return f"{self.method} neutral" if self.role == "control" else self.method


def transmission_table(run: RunRecords) -> tuple[TransmissionRow, ...]:
    """The table behind every figure and sentence of the report.

    One row per base or student, eval context and target, for each target that a dataset of the
    run carries; sorted by target, eval context (in the order of the probes) and `order`. A probe
    without its base keeps its row, with a warning instead of a difference.

    Raises:
        InputError: numbers do not match results.json, or a student and its base were not asked
            the same questions with the same prompts and candidates.
    """
    return _Table(run).rows()


class _Table:
    """Joins probes with their students, bases, controls and datasets."""

    def __init__(self, run: RunRecords) -> None:
        self.run = run
        self.students = {student.id: student for student in run.students}
        self.datasets = {dataset.id: dataset for dataset in run.datasets}
        self.bases = {
            _probe_key(probe): probe for probe in run.probes if probe.spec.student is None
        }
        self.controls: dict[tuple[Any, ...], list[ProbeRecord]] = {}
        for probe in run.probes:
            student = self.students.get((probe.spec.student or "")[:12])
            if student is not None and student.spec.trait == "neutral":
                self.controls.setdefault(_pair_key(probe, student), []).append(probe)
        traits = [dataset.spec.trait for dataset in run.datasets]
        traits += [student.spec.trait for student in run.students]
        self.targets = [trait for trait in dict.fromkeys(traits) if trait != "neutral"]
        self.cache: dict[tuple[str, str], Metrics] = {}

    def rows(self) -> tuple[TransmissionRow, ...]:
        rows = [
            self._row(probe, target)
            for target in self.targets
            for probe in self.run.probes
            if target.split("/")[0] == probe.spec.category and self._concerns(probe, target)
        ]
        contexts = list(dict.fromkeys(row.eval_context for row in rows))
        rows.sort(
            key=lambda row: (
                self.targets.index(row.target),
                contexts.index(row.eval_context),
                row.order,
            )
        )
        n_datasets: dict[tuple[str, str, str], set[str | None]] = {}
        for row in rows:
            key = (row.target, row.eval_context, row.condition)
            n_datasets.setdefault(key, set()).add(row.dataset)
        finished = []
        for number, row in enumerate(rows, start=1):
            count = len(n_datasets[row.target, row.eval_context, row.condition])
            count = 0 if row.role == "base" else count
            reason = "base: no dataset" if row.role == "base" else too_few_datasets(count)
            finished.append(
                row.model_copy(
                    update={
                        "row": f"R{number}",
                        "n_datasets": count,
                        "dataset_interval": f"none: {reason}" if reason else "see effects.csv",
                    }
                )
            )
        return tuple(finished)

    def _concerns(self, probe: ProbeRecord, target: str) -> bool:
        """A trait's students are tabled for their own target; base and controls for every one."""
        if probe.spec.student is None:
            return True
        return self._student(probe).spec.trait in (target, "neutral")

    def _student(self, probe: ProbeRecord) -> StudentRecord:
        student = self.students.get((probe.spec.student or "")[:12])
        if student is None:
            raise InputError(
                f"{probe.folder / 'manifest.json'}: its student {probe.spec.student} is not among "
                "the finished cells; run the study again"
            )
        return student

    def _metrics(self, probe: ProbeRecord, target: str) -> Metrics:
        key = (probe.id, target)
        if key not in self.cache:
            self.cache[key] = metrics(probe, target)
        return self.cache[key]

    def _row(self, probe: ProbeRecord, target: str) -> TransmissionRow:
        ours = self._metrics(probe, target)
        warnings = []
        values: dict[str, Any] = dict(ours.means)
        student = None if probe.spec.student is None else self._student(probe)
        if values["coverage"] < LOW_COVERAGE:
            who = f"{student.spec.trait} {student.spec.method.name}" if student else "base"
            warnings.append(
                f"{probe.spec.eval_context.slug}, {who}: coverage is {values['coverage']:.2%}, "
                f"fewer than 1 in {round(1 / LOW_COVERAGE)} replies begin with any candidate; do "
                "not read shares and ranks as preferences"
            )
        base = self.bases.get(_probe_key(probe)) if student else None
        neutral, neutral_reason = self._neutral(probe, student)
        if student is not None and base is None:
            warnings.append(
                f"{probe.spec.eval_context.slug}: the base was not scored, so no transmission"
            )
        for prefix, other in (("base", base), ("neutral", neutral)):
            if other is None:
                values |= {
                    f"vs_{prefix}_{name}": None
                    for name in ("logprob", "logprob_se", "share", "share_se")
                }
            else:
                _check_same_questions(probe, other)
                theirs = self._metrics(other, target)
                logprob = paired(ours, theirs, "logprob_Q")
                share = paired(ours, theirs, "share_Q")
                values |= {
                    f"vs_{prefix}_logprob": logprob.mean,
                    f"vs_{prefix}_logprob_se": logprob.se,
                    f"vs_{prefix}_share": share.mean,
                    f"vs_{prefix}_share_se": share.se,
                }
        base_means = self._metrics(base, target).means if base else {}
        values |= {f"base_{name}": base_means.get(name) for name in METRICS}
        spec = student.spec if student else None
        method = spec.method if spec else None
        role: Literal["base", "student", "control"] = "base"
        if spec is not None:
            role = "control" if spec.trait == "neutral" else "student"
        return TransmissionRow(
            row="",
            role=role,
            target=target,
            trait=spec.trait if spec else None,
            generation_seed=spec.generation_seed if spec else None,
            training_seed=spec.training_seed if spec else None,
            method=method.name if method else "base",
            rank=method.rank if method else None,
            alpha=method.alpha if method else None,
            train_context=spec.train_context.slug if spec else None,
            eval_context=probe.spec.eval_context.slug,
            **values,
            neutral_reason=neutral_reason,
            n_questions=len(probe.questions),
            n_datasets=0,
            se_unit=SE_UNIT if spec else "",
            dataset_interval="",
            warning="; ".join(warnings),
            base_model=probe.spec.base_model.name,
            questions_sha256=probe.spec.questions_sha256,
            probe=probe.id,
            base_probe=base.id if base else None,
            student=student.id if student else None,
            dataset=student.spec.dataset[:12] if student else None,
            neutral_probe=neutral.id if neutral else None,
            condition=self._condition(probe, student),
            settings=self._settings(probe, student),
            learning_rate=_number(spec.recipe.get("learning_rate")) if spec else None,
            update_norm=_number(student.receipt.update_norm.get("total")) if student else None,
            simulated=bool(probe.manifest.spec.get("simulated", False)),
        )

    def _neutral(
        self, probe: ProbeRecord, student: StudentRecord | None
    ) -> tuple[ProbeRecord | None, str]:
        """The probe of the neutral student that differs from `student` in its data's trait only."""
        if student is None:
            return None, "base"
        if student.spec.trait == "neutral":
            return None, "is the neutral student"
        for other in self.controls.get(_pair_key(probe, student), ()):
            if self._training(self._student(other)) == self._training(student):
                return other, ""
        return None, "no neutral student with the same method, recipe, context and seeds"

    def _training(self, student: StudentRecord) -> str:
        """Hash of all that shapes a student but trait and seeds."""
        spec = student.spec
        dataset: DatasetRecord | None = self.datasets.get(spec.dataset[:12])
        return sha256_json(
            {
                "base_model": spec.base_model.sha256,
                "method": spec.method.model_dump(mode="json"),
                "train_context": spec.train_context.slug,
                "recipe": {k: v for k, v in spec.recipe.items() if k not in ("seed", "data_seed")},
                "dataset": dataset.condition if dataset else "",
            }
        )

    def _settings(self, probe: ProbeRecord, student: StudentRecord | None) -> str:
        """12 digits shared by the rows that differ in seeds, rank and scaling only."""
        if student is None:
            return ""
        spec = student.spec
        dataset = self.datasets.get(spec.dataset[:12])
        own = {k: v for k, v in spec.recipe.items() if k not in RANK_AND_SEED_KEYS}
        parts = [spec.base_model.sha256, spec.trait, spec.train_context.slug, spec.method.kind]
        parts += [probe.spec.measure, probe.spec.questions_sha256, probe.spec.eval_context.slug]
        alpha, rank = spec.method.alpha, spec.method.rank
        parts.append("alpha = rank" if alpha == rank else f"alpha {alpha}")
        return sha256_json([*parts, own, dataset.condition if dataset else ""])[:12]

    def _condition(self, probe: ProbeRecord, student: StudentRecord | None) -> str:
        """12 digits shared by the rows that differ in seeds only."""
        spec = probe.spec
        parts = [spec.base_model.sha256, spec.category, spec.eval_context.slug, spec.measure]
        parts.append(spec.questions_sha256)
        if student is not None:
            parts += [student.spec.trait, self._training(student)]
        return sha256_json(parts)[:12]


def _probe_key(probe: ProbeRecord) -> tuple[str, str, Context, str, str]:
    spec = probe.spec
    return (
        spec.base_model.sha256,
        spec.category,
        spec.eval_context,
        spec.measure,
        spec.questions_sha256,
    )


def _pair_key(probe: ProbeRecord, student: StudentRecord) -> tuple[Any, ...]:
    """What a student's probe shares with that of its neutral student, beside the training."""
    return (*_probe_key(probe), student.spec.generation_seed, student.spec.training_seed)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def question_differences(
    run: RunRecords, rows: Sequence[TransmissionRow]
) -> dict[str, tuple[float, ...]]:
    """Student minus base for each question, by row, in nats; in the order of question ids.

    Only rows with a base are in it. The mean over questions is the row's `vs_base_logprob`.
    """
    probes = {probe.id: probe for probe in run.probes}
    cache: dict[tuple[str, str], dict[int, float]] = {}

    def logprobs(probe: str, target: str) -> dict[int, float]:
        if (probe, target) not in cache:
            record = probes[probe]
            key = candidate_key(record, target)
            cache[probe, target] = {q.question_id: q.logprobs[key] for q in record.questions}
        return cache[probe, target]

    found = {}
    for row in rows:
        if row.role != "base" and row.base_probe is not None:
            ours, theirs = logprobs(row.probe, row.target), logprobs(row.base_probe, row.target)
            found[row.row] = tuple(ours[number] - theirs[number] for number in sorted(ours))
    return found


def _check_same_questions(ours: ProbeRecord, theirs: ProbeRecord) -> None:
    left = {question.question_id: question for question in ours.questions}
    right = {question.question_id: question for question in theirs.questions}
    path = ours.folder / "questions.jsonl"
    if left.keys() != right.keys():
        raise InputError(f"{path}: not the questions of {theirs.folder.name}, its comparison")
    for number, question in left.items():
        other = right[number]
        if question.prompt_sha256 != other.prompt_sha256:
            raise InputError(
                f"{path}: question_id {number} was rendered otherwise than in {theirs.folder.name}"
            )
        if question.logprobs.keys() != other.logprobs.keys():
            raise InputError(
                f"{path}: question_id {number} has other candidates than in {theirs.folder.name}"
            )
