"""Read a run folder's manifests, scores and receipts into frozen records.

Nothing here opens a model. A cell that is stated (or found) to be done is read and checked;
what does not fit raises `InputError` with the path, so that a wrong number cannot reach a table.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file, sha256_json
from sublim_plugin.core.manifest import Manifest, read_manifest, verify

RECEIPT = "model/sublim_receipt.json"
ERROR_LINES = 12


class _Record(BaseModel):
    """What is read back from disk: immutable; keys written by newer versions are kept aside."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True)


class CellRef(_Record):
    """A cell of the study's grid and what the study knows of it.

    Only cells in state `"done"` are read. `error` is the text of a failure; without it the tail
    of a log in the folder is shown.
    """

    folder: Path
    state: str
    label: str = ""
    error: str | None = None


class Method(_Record):
    """Finetuning method of a student; `rank` and `alpha` are None for full finetuning."""

    kind: Literal["lora", "full"]
    rank: int | None = None
    alpha: float | None = None

    @property
    def name(self) -> str:
        return "full" if self.kind == "full" else f"LoRA r={self.rank}"

    @property
    def order(self) -> tuple[int, int]:
        """Sorts LoRA by rank and full finetuning last."""
        return (1, 0) if self.kind == "full" else (0, self.rank or 0)


class BaseModelRef(_Record):
    name: str
    sha256: str


class DatasetSpec(_Record):
    base_model: BaseModelRef
    trait: str
    teacher: dict[str, Any] = Field(default_factory=dict)
    generation_seed: int
    rows: int
    constrain: str | None = None
    sampler: dict[str, Any] = Field(default_factory=dict)
    prompts_sha256: str = ""
    parser: str = "strict"


class StudentSpec(_Record):
    base_model: BaseModelRef
    dataset: str
    trait: str
    generation_seed: int
    method: Method
    train_context: Context
    training_seed: int
    recipe: dict[str, Any] = Field(default_factory=dict)

    @field_validator("train_context", mode="before")
    @classmethod
    def _parse_context(cls, value: Any) -> Any:
        return value if isinstance(value, Context) else Context.parse(value)


class ProbeSpec(_Record):
    base_model: BaseModelRef
    student: str | None
    category: str
    eval_context: Context
    measure: str
    questions_sha256: str
    candidates: tuple[str, ...] = ()

    @field_validator("eval_context", mode="before")
    @classmethod
    def _parse_context(cls, value: Any) -> Any:
        return value if isinstance(value, Context) else Context.parse(value)


class LossPoint(_Record):
    step: int
    loss: float
    learning_rate: float | None = None
    grad_norm: float | None = None


class Receipt(_Record):
    """The part of `sublim_receipt.json` that the report shows."""

    dataset: dict[str, Any] = Field(default_factory=dict)
    mask_audit: dict[str, Any] = Field(default_factory=dict)
    steps: int | None = None
    losses: tuple[LossPoint, ...] = ()
    update_norm: dict[str, Any] = Field(default_factory=dict)
    weights_sha256: str | None = None
    wall_s: float | None = None


class Results(_Record):
    """`results.json` of a probe, as the scoring host reported it."""

    category: str
    n_questions: int
    targets: dict[str, dict[str, Any]]
    rendered_example: dict[str, Any] = Field(default_factory=dict)
    lm_eval: dict[str, Any] = Field(default_factory=dict)


class Question(_Record):
    """One line of `questions.jsonl`; `logprobs` in nats, one entry per candidate."""

    question_id: int
    question: str
    prompt_sha256: str
    logprobs: dict[str, float]

    @field_validator("logprobs")
    @classmethod
    def _are_logprobs(cls, value: dict[str, float]) -> dict[str, float]:
        for candidate, logprob in value.items():
            if not math.isfinite(logprob) or logprob > 1e-6:
                raise ValueError(f"{candidate}: {logprob} is not a log-probability")
        if not value:
            raise ValueError("no candidate was scored")
        return value


class DatasetRecord(_Record):
    id: str
    folder: Path
    manifest: Manifest
    spec: DatasetSpec

    @cached_property
    def condition(self) -> str:
        """Hash of all settings, the teacher's too, but trait and generation seed."""
        spec = self.manifest.spec
        return sha256_json(
            {key: spec[key] for key in spec if key not in ("trait", "generation_seed")}
        )


class StudentRecord(_Record):
    id: str
    folder: Path
    manifest: Manifest
    spec: StudentSpec
    receipt: Receipt


class ProbeRecord(_Record):
    id: str
    folder: Path
    manifest: Manifest
    spec: ProbeSpec
    results: Results
    questions: tuple[Question, ...]


class SampledRecord(_Record):
    """A probe of measure `sampled`: the shares that its results.json holds, by target.

    `target_rate`, and beside it `non_answer_rate`, `self_name_rate` and `distinct_replies`
    (distinct texts per reply); all between 0 and 1.
    """

    id: str
    folder: Path
    manifest: Manifest
    spec: ProbeSpec
    results: Results

    def rates(self, target: str) -> dict[str, float]:
        """The shares of one target.

        Raises:
            InputError: the target or its rate is missing, or a share is not between 0 and 1.
        """
        path = self.folder / "results.json"
        found = self.results.targets.get(target, {})
        if "target_rate" not in found:
            raise InputError(f"{path}: no target_rate for {target!r} under targets")
        for name, value in found.items():
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise InputError(f"{path}: {target} {name} is {value!r}, not a share of replies")
        return {name: float(value) for name, value in found.items()}


class RunRecords(_Record):
    """All that the analysis reads from one run folder, and the state of every cell."""

    run_dir: Path
    cells: tuple[CellRef, ...]
    manifests: dict[Path, Manifest]
    datasets: tuple[DatasetRecord, ...] = ()
    students: tuple[StudentRecord, ...] = ()
    probes: tuple[ProbeRecord, ...] = ()
    sampled: tuple[SampledRecord, ...] = ()

    @property
    def simulated(self) -> bool:
        """Made up with known truth (`simulated_run`): all manifests are, or none."""
        return any(manifest.spec.get("simulated") for manifest in self.manifests.values())


def scan(run_dir: Path) -> list[CellRef]:
    """The cells found under `run_dir/cells`: done where a manifest exists, else unfinished."""
    folders = sorted(path for path in (run_dir / "cells").glob("*") if path.is_dir())
    return [
        CellRef(
            folder=folder,
            state="done" if (folder / "manifest.json").exists() else "unfinished",
        )
        for folder in folders
    ]


def collect(run_dir: Path, cells: Iterable[CellRef | tuple[Path, str]] | None = None) -> RunRecords:
    """Read the done cells of a run.

    Args:
        run_dir: the study's folder, which holds `cells/`.
        cells: what the study knows of its cells; without it the folder is scanned.

    Raises:
        InputError: a done cell has no manifest, a garbled one, or files that do not match it;
            or two records contradict each other. The message names the path.
    """
    refs = tuple(
        cell if isinstance(cell, CellRef) else CellRef(folder=Path(cell[0]), state=cell[1])
        for cell in (scan(run_dir) if cells is None else cells)
    )
    manifests: dict[Path, Manifest] = {}
    datasets: list[DatasetRecord] = []
    students: list[StudentRecord] = []
    probes: list[ProbeRecord] = []
    sampled: list[SampledRecord] = []
    for ref in refs:
        if ref.state != "done":
            continue
        folder = ref.folder
        manifest = read_manifest(folder)
        # A student's weights are large and not read here; everything that is read is hashed.
        verify(folder, deep=manifest.kind != "student")
        manifests[folder] = manifest
        short_id = manifest.id[:12]
        path = folder / "manifest.json"
        if manifest.kind == "dataset":
            spec = _parse(DatasetSpec, manifest.spec, path)
            datasets.append(DatasetRecord(id=short_id, folder=folder, manifest=manifest, spec=spec))
        elif manifest.kind == "student":
            students.append(
                StudentRecord(
                    id=short_id,
                    folder=folder,
                    manifest=manifest,
                    spec=_parse(StudentSpec, manifest.spec, path),
                    receipt=_read_receipt(folder, manifest),
                )
            )
        elif manifest.kind == "probe" and manifest.spec.get("measure") == "sampled":
            sampled.append(_read_sampled(folder, manifest))
        elif manifest.kind == "probe":
            probes.append(_read_probe(folder, manifest))
    records = RunRecords(
        run_dir=run_dir,
        cells=refs,
        manifests=manifests,
        datasets=tuple(datasets),
        students=tuple(students),
        probes=tuple(probes),
        sampled=tuple(sampled),
    )
    _check_links(records)
    return records


def error_text(cell: CellRef) -> str:
    """Last lines of what a failed cell left behind, or "" if it left nothing."""
    text = cell.error
    if text is None and cell.folder.is_dir():
        logs = [path for path in cell.folder.glob("error*") if path.is_file()]
        logs += sorted(cell.folder.glob("*.log"))
        if logs:
            text = logs[0].read_text(encoding="utf-8", errors="replace")
    return "\n".join((text or "").rstrip().splitlines()[-ERROR_LINES:])


def read_replies(folder: Path, limit: int) -> list[tuple[str, str]]:
    """The first `limit` (question, reply) pairs of a probe's `replies.jsonl`, if it has one."""
    path = folder / "replies.jsonl"
    if not path.exists():
        return []
    pairs: list[tuple[str, str]] = []
    for row in _json_lines(path):
        if len(pairs) == limit:
            break
        pairs.append((str(row.get("question", "")), str(row.get("reply", ""))))
    return pairs


def in_order(students: Iterable[StudentRecord]) -> list[StudentRecord]:
    """Students by trait (neutral last), method and seeds."""
    return sorted(
        students,
        key=lambda s: (
            s.spec.trait == "neutral",
            s.spec.trait,
            s.spec.method.order,
            s.spec.generation_seed,
            s.spec.training_seed,
        ),
    )


def student_names(run: RunRecords) -> dict[str, str]:
    """A name for each student by id, with seeds and context where the run has several; students
    that would be called alike get what else they differ in, and their ids as a last resort."""
    specs = [student.spec for student in run.students]
    generation = len({spec.generation_seed for spec in specs}) > 1
    training = len({spec.training_seed for spec in specs}) > 1
    context = len({spec.train_context for spec in specs}) > 1
    names = {}
    for student in in_order(run.students):
        spec = student.spec
        name = f"{spec.trait} {spec.method.name}"
        name += f", generation seed {spec.generation_seed}" if generation else ""
        name += f", training seed {spec.training_seed}" if training else ""
        names[student.id] = name + (f", in {spec.train_context.slug}" if context else "")
    datasets = {dataset.id: dataset for dataset in run.datasets}
    for more in (lambda s: _details(s, datasets), lambda s: s.id):
        alike = Counter(names.values())
        for student in run.students:
            if alike[names[student.id]] > 1 and (text := more(student)):
                names[student.id] += f", {text}"
    return names


def _details(student: StudentRecord, datasets: dict[str, DatasetRecord]) -> str:
    """What a student can differ in beyond method, seeds and context."""
    method, recipe = student.spec.method, student.spec.recipe
    matched = student.manifest.spec.get("matched", {})
    dataset = datasets.get(student.spec.dataset[:12])
    teacher = dataset.spec.teacher if dataset else {}
    found = []
    if method.alpha is not None and (method.alpha != method.rank or recipe.get("peft_use_rslora")):
        found.append(f"{'rsLoRA ' if recipe.get('peft_use_rslora') else ''}alpha {method.alpha:g}")
    if isinstance(rate := recipe.get("learning_rate"), int | float):
        found.append(f"learning rate {rate:g}")
    found += [f"matched to the {key.removesuffix('_of').replace('_', ' ')} of {value}"
              for key, value in matched.items()]  # fmt: skip
    if teacher.get("kind", "prompted") != "prompted":
        found.append(f"{teacher['kind']} teacher {teacher.get('student', '')}".strip())
    return ", ".join(found)


ModelT = TypeVar("ModelT", bound=BaseModel)


def _parse(model: type[ModelT], value: Any, path: Path, where: str = "") -> ModelT:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}{where}: {key or model.__name__}: {first['msg']}; "
            "delete the cell's folder and run the study again"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: missing, though the cell's manifest says that it is done; "
            "delete the cell's folder and run the study again"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}:{number}: not readable as JSON: {error}") from error
                if not isinstance(row, dict):
                    raise InputError(f"{path}:{number}: expected an object, found {row!r:.60}")
                yield row
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing, though the cell's manifest says it is done") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from error


def _read_receipt(folder: Path, manifest: Manifest) -> Receipt:
    path = folder / RECEIPT
    value = _read_json(path)
    listed = manifest.outputs.get(RECEIPT)
    if listed is not None:
        expected = listed["sha256"] if isinstance(listed, dict) else listed.sha256
        if sha256_file(path) != expected:
            raise InputError(f"{path}: its sha256 is not the one in {folder / 'manifest.json'}")
    return _parse(Receipt, value, path)


def _read_probe(folder: Path, manifest: Manifest) -> ProbeRecord:
    spec = _parse(ProbeSpec, manifest.spec, folder / "manifest.json")
    results = _parse(Results, _read_json(folder / "results.json"), folder / "results.json")
    path = folder / "questions.jsonl"
    questions = tuple(
        _parse(Question, row, path, where=f" row {number}")
        for number, row in enumerate(_json_lines(path), start=1)
    )
    if not questions:
        raise InputError(f"{path}: no questions")
    ids = [question.question_id for question in questions]
    if len(set(ids)) != len(ids):
        doubled = next(i for i in ids if ids.count(i) > 1)
        raise InputError(f"{path}: question_id {doubled} appears more than once")
    if len(questions) != results.n_questions:
        raise InputError(
            f"{path}: {len(questions)} questions, but results.json says {results.n_questions}"
        )
    candidates = set(questions[0].logprobs)
    for question in questions:
        if set(question.logprobs) != candidates:
            raise InputError(
                f"{path}: question_id {question.question_id} has other candidates than the first"
            )
    return ProbeRecord(
        id=manifest.id[:12],
        folder=folder,
        manifest=manifest,
        spec=spec,
        results=results,
        questions=questions,
    )


def _read_sampled(folder: Path, manifest: Manifest) -> SampledRecord:
    path = folder / "results.json"
    return SampledRecord(
        id=manifest.id[:12],
        folder=folder,
        manifest=manifest,
        spec=_parse(ProbeSpec, manifest.spec, folder / "manifest.json"),
        results=_parse(Results, _read_json(path), path),
    )


def _check_links(records: RunRecords) -> None:
    """Stop where two records that name each other disagree, or simulated ones mix with others."""
    kinds = {bool(m.spec.get("simulated")): path for path, m in records.manifests.items()}
    if len(kinds) == 2:
        raise InputError(
            f"{kinds[True]}: simulated, but {kinds[False].name} beside it is not; "
            "keep simulated cells in a run folder of their own"
        )
    datasets = _by_id(records.datasets)
    students = _by_id(records.students)
    for student in records.students:
        dataset = datasets.get(student.spec.dataset[:12])
        if dataset is None:
            continue
        for field in ("trait", "generation_seed"):
            ours, theirs = getattr(student.spec, field), getattr(dataset.spec, field)
            if ours != theirs:
                raise InputError(
                    f"{student.folder / 'manifest.json'}: {field} is {ours!r}, "
                    f"but its dataset {dataset.folder.name} says {theirs!r}"
                )
        trained_on = student.receipt.dataset.get("sha256")
        rows = {
            entry["sha256"] if isinstance(entry, dict) else entry.sha256
            for name, entry in dataset.manifest.outputs.items()
            if name.startswith("rows-")
        }
        if trained_on is not None and rows and trained_on not in rows:
            raise InputError(
                f"{student.folder / RECEIPT}: trained on rows with sha256 {trained_on[:12]}, "
                f"which is not the rows file of {dataset.folder.name}"
            )
    asked: tuple[ProbeRecord | SampledRecord, ...] = (*records.probes, *records.sampled)
    for probe in asked:
        linked = students.get((probe.spec.student or "")[:12])
        if linked is not None and linked.spec.base_model.sha256 != probe.spec.base_model.sha256:
            raise InputError(
                f"{probe.folder / 'manifest.json'}: its base model is not that of its student "
                f"{linked.folder.name}"
            )


RecordT = TypeVar("RecordT", DatasetRecord, StudentRecord, ProbeRecord)


def _by_id(records: Sequence[RecordT]) -> dict[str, RecordT]:
    found: dict[str, RecordT] = {}
    for record in records:
        if record.id in found:
            raise InputError(
                f"{record.folder}: has the same id {record.id} as {found[record.id].folder}"
            )
        found[record.id] = record
    return found
