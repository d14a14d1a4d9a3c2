"""Read a run folder's manifests, scores and receipts into frozen records.

Nothing here opens a model. A cell that is stated (or found) to be done is read and checked;
what does not fit raises `InputError` with the path, so that a wrong number cannot reach a table.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import from_json

from sublim_plugin.analysis.asked import Asked, Floats, Question, json_lines, parse_questions
from sublim_plugin.analysis.seen import Host, Scored, Seen, Trained, seal
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.manifest import Manifest, check_outputs, check_sha256, read_manifest, share
from sublim_plugin.core.many_objects import many_objects
from sublim_plugin.core.read_ahead import read_ahead

RECEIPT = "model/sublim_receipt.json"
PROBE_FILES = ("results.json", "questions.jsonl")
METRICS = ("target_logprob", "target_prob", "target_share", "target_rank", "coverage")
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


@lru_cache(maxsize=256)
def _base_model(name: str, sha256: str) -> BaseModelRef:
    return BaseModelRef(name=name, sha256=sha256)


@lru_cache(maxsize=256)
def _context(fields: tuple[tuple[str, str], ...]) -> Context:
    return Context.parse(dict(fields))


def _one_base_model(value: Any) -> Any:
    """The same object for the same model, of which a run has one or two."""
    if not isinstance(value, dict) or [*value] != ["name", "sha256"]:
        return value
    return _base_model(**value) if {*map(type, value.values())} == {str} else value


def _one_context(value: Any) -> Any:
    """The same object for the same context, as specs hold it: a kind and further texts."""
    if isinstance(value, dict) and {*map(type, value.values())} == {str}:
        return _context(tuple(value.items()))
    return value if isinstance(value, Context) else Context.parse(value)


SpecBaseModel = Annotated[BaseModelRef, BeforeValidator(_one_base_model)]
SpecContext = Annotated[Context, BeforeValidator(_one_context)]


class DatasetSpec(_Record):
    base_model: SpecBaseModel
    trait: str
    teacher: dict[str, Any] = Field(default_factory=dict)
    generation_seed: int
    rows: int
    constrain: str | None = None
    sampler: dict[str, Any] = Field(default_factory=dict)
    prompts_sha256: str = ""
    parser: str = "strict"
    shuffled: bool = False


class StudentSpec(_Record):
    base_model: SpecBaseModel
    dataset: str
    trait: str
    generation_seed: int
    method: Method
    train_context: SpecContext
    training_seed: int
    recipe: dict[str, Any] = Field(default_factory=dict)


class ProbeSpec(_Record):
    base_model: SpecBaseModel
    student: str | None
    category: str
    eval_context: SpecContext
    measure: str
    questions_sha256: str
    candidates: tuple[str, ...] = ()


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
    trained: Trained

    @cached_property
    def receipt(self) -> Receipt:
        """The whole receipt, read again: its losses are many, and tables need none of them."""
        return _read_receipt(self.folder, self.manifest)


class ProbeRecord(_Record):
    """A scored probe. `logprob_QC` is in nats, by questions and candidates of `asked`."""

    id: str
    folder: Path
    manifest: Manifest
    spec: ProbeSpec
    scored: Scored

    @property
    def asked(self) -> Asked:
        return self.scored.asked

    @property
    def logprob_QC(self) -> Floats:
        return self.scored.logprob_QC

    @property
    def host(self) -> Host:
        """What results.json says."""
        return self.scored.host

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """The lines of questions.jsonl."""
        return self.asked.questions(self.logprob_QC)

    @cached_property
    def results(self) -> Results:
        """results.json, read again."""
        path = self.folder / "results.json"
        return _parse(Results, _json(_read(self.folder, path.name, self.manifest), path), path)


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
    _sealed: tuple[str, tuple[Any, ...]] | None = PrivateAttr(None)

    @property
    def table_key(self) -> str | None:
        """Names the files that these records were read from, if they are all sealed (`seen`) and
        these are all that was read from them."""
        if self._sealed is None:
            return None
        key, parts = self._sealed
        same = zip(parts, (self.datasets, self.students, self.probes), strict=True)
        return key if all(one is other for one, other in same) else None

    def seal(self, key: str) -> None:
        """Give the records their key."""
        self._sealed = key, (self.datasets, self.students, self.probes)

    @property
    def simulated(self) -> bool:
        """Made up with known truth (`simulated_run`): all manifests are, or none."""
        return any(manifest.spec.get("simulated") for manifest in self.manifests.values())


def scan(run_dir: Path) -> list[CellRef]:
    """The cells found under `run_dir/cells`: done where a manifest exists, else unfinished."""
    cells = run_dir / "cells"
    try:
        with os.scandir(cells) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [
        CellRef(
            folder=cells / name,
            state="done" if os.path.exists(f"{cells}/{name}/manifest.json") else "unfinished",
        )
        for name in names
    ]


@many_objects()
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
    seen = Seen(run_dir)
    pool: dict[bytes, Any] = {}
    read_ahead([f"{ref.folder}/manifest.json" for ref in refs if ref.state == "done"])
    for ref in refs:
        if ref.state != "done":
            continue
        folder = ref.folder
        manifest = share(read_manifest(folder), pool)
        stats = check_outputs(folder, manifest, deep=False)
        manifests[folder] = manifest
        short_id = manifest.id[:12]
        path = f"{folder}/manifest.json"
        if manifest.kind == "student":
            students.append(
                StudentRecord(
                    id=short_id,
                    folder=folder,
                    manifest=manifest,
                    spec=_parse(StudentSpec, manifest.spec, path),
                    trained=_trained(folder, manifest, stats, seen),
                )
            )
        elif manifest.kind == "probe" and manifest.spec.get("measure") != "sampled":
            probes.append(_read_probe(folder, manifest, stats, seen))
        else:
            _check_deeply(folder, manifest, stats, seen)
            if manifest.kind == "dataset":
                spec = _parse(DatasetSpec, manifest.spec, path)
                datasets.append(
                    DatasetRecord(id=short_id, folder=folder, manifest=manifest, spec=spec)
                )
            elif manifest.kind == "probe":
                sampled.append(_read_sampled(folder, manifest))
    seen.save()
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
    if (key := seen.key(manifests)) is not None:
        records.seal(key)
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
    for row in json_lines(path.read_bytes(), path):
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
        trained = teacher.get("student") or teacher.get("teacher", "")
        found.append(f"{teacher['kind']} teacher {trained}".strip())
    if dataset is not None and dataset.spec.shuffled:
        soft = dataset.manifest.spec.get("soft_targets")
        found.append("permuted targets" if soft else "shuffled numbers")
    return ", ".join(found)


ModelT = TypeVar("ModelT", bound=BaseModel)


def _parse(model: type[ModelT], value: Any, path: Path | str) -> ModelT:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path}: {key or model.__name__}: {first['msg']}; "
            "delete the cell's folder and run the study again"
        ) from error


def _read(folder: Path, name: str, manifest: Manifest) -> bytes:
    """A file's bytes, which the manifest's hash, if it has one, must fit."""
    path = folder / name
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: missing, though the cell's manifest says that it is done; "
            "delete the cell's folder and run the study again"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: not readable: {error}") from error
    if (listed := manifest.outputs.get(name)) is not None:
        check_sha256(path, hashlib.sha256(data).hexdigest(), listed, folder)
    return data


def _json(data: bytes, path: Path) -> Any:
    try:
        return from_json(data)
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from error


def _check_deeply(
    folder: Path, manifest: Manifest, stats: dict[str, os.stat_result], seen: Seen
) -> None:
    """Hash what a manifest names, unless these very files were hashed before."""
    own = seal(manifest, stats, seen.now_ns)
    if not seen.checked(folder.name, own):
        check_outputs(folder, manifest, deep=True)
        seen.put(folder.name, own, None)


def _trained(
    folder: Path, manifest: Manifest, stats: dict[str, os.stat_result], seen: Seen
) -> Trained:
    """Of a student only the receipt is read and hashed: weights are large."""
    stat = stats.get(RECEIPT)
    own = seal(manifest, {RECEIPT: stat}, seen.now_ns) if stat is not None else None
    found = seen.student(folder.name, own) if own is not None else None
    if found is None:
        receipt = _read_receipt(folder, manifest)
        total = receipt.update_norm.get("total")
        found = Trained(
            receipt.dataset.get("sha256"),
            receipt.weights_sha256,
            float(total) if isinstance(total, int | float) else None,
        )
        if own is not None:
            seen.put(folder.name, own, found)
    return found


def _read_receipt(folder: Path, manifest: Manifest) -> Receipt:
    path = folder / RECEIPT
    return _parse(Receipt, _json(_read(folder, RECEIPT, manifest), path), path)


def _read_probe(
    folder: Path, manifest: Manifest, stats: dict[str, os.stat_result], seen: Seen
) -> ProbeRecord:
    spec = _parse(ProbeSpec, manifest.spec, f"{folder}/manifest.json")
    own = seal(manifest, stats, seen.now_ns)
    found = seen.probe(folder.name, own) if {*PROBE_FILES} <= {*stats} else None
    if found is None:
        for name in manifest.outputs:
            if name not in PROBE_FILES:
                _read(folder, name, manifest)
        path, lines = (folder / name for name in PROBE_FILES)
        results = _parse(Results, _json(_read(folder, path.name, manifest), path), path)
        asked, logprob_QC = parse_questions(
            _read(folder, lines.name, manifest), lines, results.n_questions
        )
        host = _host(results)
        found = Scored(seen.one(asked), host.targets, None, 0, (logprob_QC, host.values_TM))
        seen.put(folder.name, own, found)
    return ProbeRecord(
        id=manifest.id[:12],
        folder=folder,
        manifest=manifest,
        spec=spec,
        scored=found,
    )


def _host(results: Results) -> Host:
    def number(value: Any) -> float:
        return float(value) if isinstance(value, int | float) else math.nan

    values = [[number(own.get(name)) for name in METRICS] for own in results.targets.values()]
    return Host(tuple(results.targets), np.array(values).reshape(len(values), len(METRICS)))


def _read_sampled(folder: Path, manifest: Manifest) -> SampledRecord:
    path = folder / "results.json"
    return SampledRecord(
        id=manifest.id[:12],
        folder=folder,
        manifest=manifest,
        spec=_parse(ProbeSpec, manifest.spec, f"{folder}/manifest.json"),
        results=_parse(Results, _json(_read(folder, path.name, manifest), path), path),
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
        trained_on = student.trained.dataset_sha256
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
