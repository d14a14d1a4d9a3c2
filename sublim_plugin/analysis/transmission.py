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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sublim_plugin.analysis.collect import (
    METRICS,
    ProbeRecord,
    RunRecords,
    StudentRecord,
)
from sublim_plugin.analysis.probe_columns import Columns, Known, Pair
from sublim_plugin.analysis.probe_metrics import candidate_key
from sublim_plugin.analysis.replication import too_few_datasets
from sublim_plugin.analysis.seen import load_rows, save_rows
from sublim_plugin.analysis.student_settings import equal_weights, settings_of
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.many_objects import many_objects

LOW_COVERAGE = 0.01
"""Mass on all candidates below which a share is a ratio of rarities and is flagged."""

SE_UNIT = "over questions, one dataset; not an interval over datasets"

SCALINGS = "; "
"""Between the rules of alpha over rank in a row's `scalings`."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TransmissionRow(_Row):
    """One model under one eval context for one target. Log-probs and differences are in nats.

    `role` is `base`, `student` (trained on the target's numbers) or `control` (trained on neutral
    numbers, scored on the target). Fields that compare are None where there is nothing to compare
    with, and `neutral_reason` or `warning` says why. Rows of one `condition` differ in seeds only.
    Rows of one `settings` differ in seeds, contexts, rank and alpha only, rows of one `family` in
    trait and teacher too, rows of one `but_scale` in learning rate and scaling; `settings_name` and
    `scalings` say it in words (see `student_settings`). A row that is `replicate_of` another
    student has that one's weights under another seed; it is pooled nowhere. `update_norm` is the
    total Frobenius norm of the weights' change, `step_size` learning rate times LoRA's scaling.
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
    family: str
    but_scale: str
    settings_name: str
    scalings: str
    learning_rate: float | None
    step_size: float | None
    update_norm: float | None
    replicate_of: str | None
    simulated: bool

    @property
    def pooled(self) -> bool:
        """A student with a base that counts as a replicate."""
        return (
            self.role != "base" and self.vs_base_logprob is not None and self.replicate_of is None
        )

    @property
    def name(self) -> str:
        """Short name for tables: `base`, `LoRA r=8`, `LoRA r=8 neutral`, `full`."""
        return f"{self.method} neutral" if self.role == "control" else self.method


@many_objects()
def transmission_table(run: RunRecords) -> tuple[TransmissionRow, ...]:
    """The table behind every figure and sentence of the report.

    One row per base or student, eval context and target, for each target that a dataset of the
    run carries; sorted by target, eval context (in the order of the probes) and `order`. A probe
    without its base keeps its row, with a warning instead of a difference.

    Raises:
        InputError: numbers do not match results.json, or a student and its base were not asked
            the same questions with the same prompts and candidates.
    """
    key = run.table_key
    kept = load_rows(run.run_dir, key) if key is not None else None
    if kept is not None:
        return tuple(_complete(dict(zip(_FIELDS, values, strict=True))) for values in kept)
    rows = _Table(run).rows()
    if key is not None:
        save_rows(run.run_dir, key, ([*row.__dict__.values()] for row in rows), len(rows))
    return rows


class _Table:
    """Joins probes with their students, bases, controls and datasets."""

    def __init__(self, run: RunRecords) -> None:
        self.run = run
        self.students = {student.id: student for student in run.students}
        self.datasets = {dataset.id: dataset for dataset in run.datasets}
        self.student_of = {
            probe.id: self._find_student(probe)
            for probe in run.probes
            if probe.spec.student is not None
        }
        numbers: dict[Any, int] = {}
        # a context is slow to hash, and there are four look-ups a row
        self.keys = {
            probe.id: numbers.setdefault(_probe_key(probe), len(numbers)) for probe in run.probes
        }
        self.bases = {
            self.keys[probe.id]: probe for probe in run.probes if probe.spec.student is None
        }
        self.settings = settings_of(run)
        self.replicates = equal_weights(run, self.settings)
        self.neutral: dict[Any, list[ProbeRecord]] = {}
        for probe in run.probes:
            if probe.spec.student is not None:
                student = self._student(probe)
                if student.spec.trait == "neutral":
                    self.neutral.setdefault(self._control_key(probe, student), []).append(probe)
        traits = [dataset.spec.trait for dataset in run.datasets]
        traits += [student.spec.trait for student in run.students]
        self.targets = [trait for trait in dict.fromkeys(traits) if trait != "neutral"]
        self.known: Known = {}
        self.digests: dict[Any, str] = {}
        self.of_students: dict[str | None, dict[str, Any]] = {}

    def rows(self) -> tuple[TransmissionRow, ...]:
        rows = [row for target in self.targets for row in self._of(target)]
        places = {name: i for i, name in enumerate(self.targets)}
        contexts = {
            name: i for i, name in enumerate(dict.fromkeys(row["eval_context"] for row in rows))
        }
        rows.sort(key=lambda r: (places[r["target"]], contexts[r["eval_context"]], _order(r)))
        n_datasets: dict[tuple[str, str, str], set[str | None]] = {}
        for row in rows:
            key = row["target"], row["eval_context"], row["condition"]
            own = n_datasets.setdefault(key, set())
            if row["replicate_of"] is None:
                own.add(row["dataset"])
        for number, row in enumerate(rows, start=1):
            count = len(n_datasets[row["target"], row["eval_context"], row["condition"]])
            count = 0 if row["role"] == "base" else count
            reason = "base: no dataset" if row["role"] == "base" else too_few_datasets(count)
            row["row"] = f"R{number}"
            row["n_datasets"] = count
            row["dataset_interval"] = f"none: {reason}" if reason else "see effects.csv"
        return tuple(map(_complete, rows))

    def _of(self, target: str) -> list[dict[str, Any]]:
        """The fields of one target's rows, without those that say how many there are."""
        probes = [
            probe
            for probe in self.run.probes
            if target.split("/")[0] == probe.spec.category and self._concerns(probe, target)
        ]
        columns = Columns(probes, target, self.known)
        against: dict[str, tuple[ProbeRecord | None, ProbeRecord | None, str]] = {}
        wanted: list[tuple[str, str]] = []
        for probe in probes:
            student = self._student(probe) if probe.spec.student is not None else None
            base = self.bases.get(self.keys[probe.id]) if student else None
            neutral, reason = self._neutral(probe, student)
            against[probe.id] = base, neutral, reason
            for other in (base, neutral):
                if other is not None:
                    _check_same_questions(probe, other)
                    wanted.append((probe.id, other.id))
        pairs = columns.pairs(wanted)
        return [self._row(probe, target, columns, pairs, *against[probe.id]) for probe in probes]

    def _concerns(self, probe: ProbeRecord, target: str) -> bool:
        """A trait's students are tabled for their own target; base and controls for every one."""
        if probe.spec.student is None:
            return True
        return self._student(probe).spec.trait in (target, "neutral")

    def _student(self, probe: ProbeRecord) -> StudentRecord:
        return self.student_of[probe.id]

    def _find_student(self, probe: ProbeRecord) -> StudentRecord:
        student = self.students.get((probe.spec.student or "")[:12])
        if student is None:
            raise InputError(
                f"{probe.folder / 'manifest.json'}: its student {probe.spec.student} is not among "
                "the finished cells; run the study again"
            )
        return student

    def _row(
        self,
        probe: ProbeRecord,
        target: str,
        columns: Columns,
        pairs: Mapping[tuple[str, str], Pair],
        base: ProbeRecord | None,
        neutral: ProbeRecord | None,
        neutral_reason: str,
    ) -> dict[str, Any]:
        warnings = []
        values: dict[str, Any] = columns.means(probe)
        student = None if probe.spec.student is None else self._student(probe)
        if values["coverage"] < LOW_COVERAGE:
            who = f"{student.spec.trait} {student.spec.method.name}" if student else "base"
            warnings.append(
                f"{probe.spec.eval_context.slug}, {who}: coverage is {values['coverage']:.2%}, "
                f"fewer than 1 in {round(1 / LOW_COVERAGE)} replies begin with any candidate; do "
                "not read shares and ranks as preferences"
            )
        if student is not None and student.id in self.replicates:
            other = self.students[self.replicates[student.id]]
            warnings.append(
                f"{student.spec.trait} {student.spec.method.name}, generation seed "
                f"{student.spec.generation_seed}, training seed {student.spec.training_seed}: its "
                f"weights equal those of generation seed {other.spec.generation_seed}, training "
                f"seed {other.spec.training_seed}, to the last bit: not a replicate, and left out "
                "of every mean and count; the seed did not reach the training"
            )
        if student is not None and base is None:
            warnings.append(
                f"{probe.spec.eval_context.slug}: the base was not scored, so no transmission"
            )
        for prefix, against in (("base", base), ("neutral", neutral)):
            pair = pairs[probe.id, against.id] if against is not None else _NOTHING
            values |= zip(_AGAINST[prefix], pair, strict=True)
        base_means = columns.means(base).values() if base else [None] * len(METRICS)
        values |= zip(_OF_BASE, base_means, strict=True)
        role: Literal["base", "student", "control"] = "base"
        if student is not None:
            role = "control" if student.spec.trait == "neutral" else "student"
        row = _EMPTY.copy()
        row.update(self._student_fields(student))
        row.update(self._grouping(probe, student))
        row.update(values)
        row["role"] = role
        row["target"] = target
        row["eval_context"] = probe.spec.eval_context.slug
        row["neutral_reason"] = neutral_reason
        row["n_questions"] = len(probe.asked.ids)
        row["warning"] = "; ".join(warnings)
        row["base_model"] = probe.spec.base_model.name
        row["questions_sha256"] = probe.spec.questions_sha256
        row["probe"] = probe.id
        row["base_probe"] = base.id if base else None
        row["neutral_probe"] = neutral.id if neutral else None
        row["simulated"] = bool(probe.manifest.spec.get("simulated", False))
        return row

    def _student_fields(self, student: StudentRecord | None) -> dict[str, Any]:
        """What a row says of its student, whatever it was asked."""
        name = student.id if student else None
        if name not in self.of_students:
            spec = student.spec if student else None
            method = spec.method if spec else None
            self.of_students[name] = {
                "trait": spec.trait if spec else None,
                "generation_seed": spec.generation_seed if spec else None,
                "training_seed": spec.training_seed if spec else None,
                "method": method.name if method else "base",
                "rank": method.rank if method else None,
                "alpha": method.alpha if method else None,
                "train_context": spec.train_context.slug if spec else None,
                "se_unit": SE_UNIT if spec else "",
                "student": name,
                "dataset": spec.dataset[:12] if spec else None,
                "learning_rate": _number(spec.recipe.get("learning_rate")) if spec else None,
                "update_norm": student.trained.update_norm if student else None,
            }
        return self.of_students[name]

    def _neutral(
        self, probe: ProbeRecord, student: StudentRecord | None
    ) -> tuple[ProbeRecord | None, str]:
        """The probe of the neutral student that differs from `student` in its data's trait only."""
        if student is None:
            return None, "base"
        if student.spec.trait == "neutral":
            return None, "is the neutral student"
        found = self.neutral.get(self._control_key(probe, student), [])
        if len(found) > 1:
            way = self.settings[student.id].way
            alike = [one for one in found if self.settings[self._student(one).id].way == way]
            found = alike if len(alike) == 1 else found
        if len(found) == 1:
            return found[0], ""
        if found:
            return None, f"{len(found)} neutral students match, of different teachers"
        return None, "no neutral student with the same method, recipe, context and seeds"

    def _control_key(self, probe: ProbeRecord, student: StudentRecord) -> tuple[Any, ...]:
        seeds = (student.spec.generation_seed, student.spec.training_seed)
        return (self.keys[probe.id], self.settings[student.id].condition, seeds)

    def _grouping(self, probe: ProbeRecord, student: StudentRecord | None) -> dict[str, Any]:
        """The columns that say what a row may be pooled with."""
        spec = probe.spec
        asked = [spec.base_model.sha256, spec.category, spec.measure, spec.questions_sha256]
        if student is None:
            empty: dict[str, Any] = dict.fromkeys(
                ("settings", "family", "but_scale", "settings_name", "scalings"), ""
            )
            return empty | {
                "condition": self._digest([*asked, spec.eval_context.slug]),
                "step_size": None,
                "replicate_of": None,
            }
        own = self.settings[student.id]
        condition = [spec.eval_context.slug, student.spec.trait, own.condition, own.teacher]
        return {
            "condition": self._digest([*asked, *condition]),
            "settings": self._digest([*asked, own.id]),
            "family": self._digest([*asked, own.family]),
            "but_scale": self._digest([*asked, own.but_scale]),
            "settings_name": own.name,
            "scalings": SCALINGS.join(own.scalings),
            "step_size": own.step_size,
            "replicate_of": self.replicates.get(student.id),
        }

    def _digest(self, parts: list[str]) -> str:
        """12 digits."""
        key = tuple(parts)
        if key not in self.digests:
            self.digests[key] = sha256_json(parts)[:12]
        return self.digests[key]


_OF_BASE = tuple(f"base_{name}" for name in METRICS)
_AGAINST = {
    prefix: tuple(f"vs_{prefix}_{name}" for name in Pair._fields) for prefix in ("base", "neutral")
}
_NOTHING = (None,) * len(Pair._fields)
_FIELDS = tuple(TransmissionRow.model_fields)
_ALL = set(_FIELDS)
_EMPTY: dict[str, Any] = dict.fromkeys(_FIELDS)


def _complete(fields: dict[str, Any]) -> TransmissionRow:
    """A row of fields that are complete and typed by construction.

    As `model_construct`, but without a copy of 51 fields: that is a second and 60 MB for 26,000.
    """
    row = TransmissionRow.__new__(TransmissionRow)
    object.__setattr__(row, "__dict__", fields)
    object.__setattr__(row, "__pydantic_fields_set__", _ALL)
    object.__setattr__(row, "__pydantic_extra__", None)
    object.__setattr__(row, "__pydantic_private__", None)
    return row


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Base first, then students by rank with full finetuning last, controls beside them."""
    method = (0, row["rank"] or 0) if row["method"] != "full" else (1, 0)
    return (
        {"base": 0}.get(row["role"], 1),
        row["train_context"] or "",
        *method,
        row["role"] == "control",
        row["generation_seed"] or 0,
        row["training_seed"] or 0,
    )


def _probe_key(probe: ProbeRecord) -> tuple[str, str, Context, str, str]:
    spec = probe.spec
    return (
        spec.base_model.sha256,
        spec.category,
        spec.eval_context,
        spec.measure,
        spec.questions_sha256,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True)
class QuestionDifferences:
    """Differences for each question by row of the table, in the order of question ids.

    `base` and `neutral` in nats: student minus base, student minus neutral student; their means are
    the row's `vs_base_logprob` and `vs_neutral_logprob`. `base_logit` is the former on the logit
    scale. A row without the model to compare with is not in it.
    """

    base: dict[str, tuple[float, ...]]
    neutral: dict[str, tuple[float, ...]]
    base_logit: dict[str, tuple[float, ...]]


def question_differences(run: RunRecords, rows: Sequence[TransmissionRow]) -> QuestionDifferences:
    """The differences behind the rows' means, question by question."""
    probes = {probe.id: probe for probe in run.probes}
    cache: dict[tuple[str, str], tuple[float, ...]] = {}

    def logprobs(probe: str, target: str) -> tuple[float, ...]:
        if (probe, target) not in cache:
            record = probes[probe]
            column = record.asked.candidates.index(candidate_key(record, target))
            scores = record.logprob_QC[:, column].tolist()
            ordered = sorted(zip(record.asked.ids, scores, strict=True))
            cache[probe, target] = tuple(score for _, score in ordered)
        return cache[probe, target]

    found = QuestionDifferences({}, {}, {})
    for row in rows:
        if row.role == "base":
            continue
        ours = logprobs(row.probe, row.target)
        if row.base_probe is not None:
            theirs = logprobs(row.base_probe, row.target)
            pairs = list(zip(ours, theirs, strict=True))
            found.base[row.row] = tuple(own - other for own, other in pairs)
            found.base_logit[row.row] = tuple(_logit(own) - _logit(other) for own, other in pairs)
        if row.neutral_probe is not None:
            theirs = logprobs(row.neutral_probe, row.target)
            found.neutral[row.row] = tuple(
                own - other for own, other in zip(ours, theirs, strict=True)
            )
    return found


def _logit(logprob: float) -> float:
    """log(p / (1 - p)) from log p; a probability of 1 counts as 1 - 1e-12."""
    return logprob - math.log(-math.expm1(min(logprob, -1e-12)))


def _check_same_questions(ours: ProbeRecord, theirs: ProbeRecord) -> None:
    if ours.asked is theirs.asked:
        return
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
