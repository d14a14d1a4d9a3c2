"""What students differ in beyond trait and seeds, and in which words: what may be pooled.

Students of one setting differ in trait, seeds, contexts, rank and alpha only. Everything else that
a manifest's spec holds keeps them apart, also keys that this code has never heard of.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from sublim_plugin.analysis.collect import DatasetRecord, RunRecords, StudentRecord
from sublim_plugin.analysis.teacher_words import STUDENT, TRAINED, in_words, method_of, trained_by
from sublim_plugin.core.hashing import sha256_json

APART = {
    "dataset",
    "trait",
    "generation_seed",
    "training_seed",
    "train_context",
    "method.rank",
    "method.alpha",
    "recipe.lora_r",
    "recipe.lora_alpha",
    "recipe.seed",
    "recipe.data_seed",
    "recipe.sublim.data_seed",
    "recipe.sublim.context",
    "recipe.sublim.trait",
}
"""Keys that are columns of their own in the table: what students of one setting may differ in."""

OF_A_CONDITION = {
    "train_context",
    "method.rank",
    "method.alpha",
    "recipe.lora_r",
    "recipe.lora_alpha",
    "recipe.sublim.context",
}
"""Of these, what students of one condition share."""

SCALE = {"recipe.learning_rate", "recipe.peft_use_rslora"}
"""Keys that, with rank and alpha, set the size of a step."""

_WORDS = {
    "recipe.learning_rate": "learning rate",
    "recipe.sublim.stop_at_update_norm": "stopped at update norm",
    "recipe.sublim.match_update_norm": "update norm matched to",
    "recipe.sublim.stop_at_loss": "stopped at training loss",
    "matched.update_norm_of": "update norm matched to",
    "matched.loss_of": "training loss matched to",
}
TEACHER_SETTINGS = "dataset.teacher.settings"
"""Hash of what a teacher is that the run trained; it has no words."""

TEACHER_BASE = "dataset.base_model.sha256"
ANOTHER = "another base model"

_OF_A_TRAIT = {"sentence", "against", "vectors_sha256", "weights_sha256", "student"}
"""What differs between the teachers of two traits that are teachers in the same way."""

_MATCHED = ("matched.update_norm_of", "matched.loss_of")
_SEEDS = ("dataset", "trait", "generation_seed", "training_seed")
_ID = re.compile(r"[0-9a-f]{12,64}")


@dataclass(frozen=True)
class Settings:
    """Of one student. Ids have 12 digits and leave out what `APART` names.

    `id` is shared by students of one trait that may stand in one rank curve; `family` also by those
    of other traits (the teacher's own words and files left out); `but_scale` by those that differ
    in learning rate and scaling too. `scalings` names the rules of alpha over rank that the student
    belongs to, "" for full finetuning. `condition` hashes all but seeds, trait and teacher: a
    neutral student that shares it, and the seeds, is the control; where teachers of several ways
    wrote for neutral, the one whose `way` is shared too. `teacher` hashes the teacher, one that the
    study trained by what it is and not by its id. `name` says in words what sets it
    apart from the others of its trait, `teacher_name` the teacher, where they have several kinds;
    `step_size` is learning rate times scaling, None if unknown
    or in full finetuning.
    """

    id: str
    family: str
    but_scale: str
    scalings: tuple[str, ...]
    condition: str
    teacher: str
    way: str
    name: str
    teacher_name: str
    step_size: float | None


def settings_of(run: RunRecords) -> dict[str, Settings]:
    """The settings of every student, by its id."""
    drafts = _drafts(run)
    points: dict[str, set[tuple[int, float]]] = {}
    for student in run.students:
        method = student.spec.method
        if method.rank is not None and method.alpha is not None:
            own = points.setdefault(drafts[student.id].family, set())
            own.add((method.rank, method.alpha))
    lines = {family: scaling_rules(own) for family, own in points.items()}
    varying = _varying(run.students, drafts)
    found = {}
    for student in run.students:
        method, draft = student.spec.method, drafts[student.id]
        stabilized = draft.fields.get("recipe.peft_use_rslora") is True
        scalings: tuple[str, ...] = ("",)
        if method.rank is not None:
            rules: tuple[str, ...] = ("alpha unknown",)
            if method.alpha is not None:
                rules = lines[draft.family][method.rank, method.alpha]
            scalings = tuple(f"rsLoRA, {rule}" if stabilized else rule for rule in rules)
        found[student.id] = Settings(
            id=draft.id,
            family=draft.family,
            but_scale=draft.but_scale,
            scalings=scalings,
            condition=draft.condition,
            teacher=draft.teacher,
            way=draft.way,
            name=_name(student, draft.fields, varying[student.spec.trait, method.kind]),
            teacher_name=_teacher_name(draft.fields, varying[student.spec.trait, method.kind]),
            step_size=_step_size(student, stabilized),
        )
    return found


@dataclass(frozen=True, eq=False)
class _Draft:
    """A student's fields without those of `APART`, and the ids that hang on nothing else."""

    fields: dict[str, Any]
    id: str
    family: str
    but_scale: str
    condition: str
    teacher: str
    way: str


def _drafts(run: RunRecords) -> dict[str, _Draft]:
    """By student: one object for all whose specs differ in seeds and dataset ids only."""
    datasets = {dataset.id: dataset for dataset in run.datasets}
    known = {student.id: student for student in run.students}
    teachers = _teachers(run.students, datasets, known, _trained(run))
    likeness = {
        dataset.id: to_json(_without(dataset.manifest.spec, "trait", "generation_seed"))
        for dataset in run.datasets
    }
    made: dict[Any, _Draft] = {}
    found = {}
    for student in run.students:
        name = student.spec.dataset[:12]
        spec = to_json(_without(student.manifest.spec, *_SEEDS))
        refers = any(digits[:12] in known for digits in _ID.findall(spec.decode()))
        taught = teachers.get(student.id, {})
        key = student.id if refers or taught else (spec, likeness.get(name))
        if key not in made:
            made[key] = _draft(student, datasets.get(name), known, taught)
        found[student.id] = made[key]
    return found


def _without(spec: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in keys}


def _draft(
    student: StudentRecord,
    dataset: DatasetRecord | None,
    known: Mapping[str, StudentRecord],
    taught: dict[str, Any],
) -> _Draft:
    own = _fields(student, dataset, known, APART) | taught
    condition = _fields(student, dataset, known, APART - OF_A_CONDITION) | taught
    return _Draft(
        fields=own,
        id=_hash(own),
        family=_hash(own, without_teacher=True),
        but_scale=_hash({key: value for key, value in own.items() if key not in SCALE}),
        condition=_hash(condition, without_teacher=True),
        teacher=_hash({k: v for k, v in own.items() if k.startswith("dataset.teacher.")}),
        way=_hash(_way(own)),
    )


def _way(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher is but for what names its trait."""
    above = "dataset.teacher."
    own = {k.removeprefix(above): v for k, v in fields.items() if k.startswith(above)}
    if own.get("kind") == "prompted":
        return {"kind": "prompted"}
    taught = STUDENT in fields and "dataset.generation" in fields
    return {k: v for k, v in own.items() if taught or k not in _OF_A_TRAIT}


def equal_weights(run: RunRecords, settings: Mapping[str, Settings]) -> dict[str, str]:
    """Students whose weights are those of another one that differs in seeds only, by id.

    Such a seed never reached the training, so the later one (by seeds) is no replicate.
    """
    first: dict[tuple[str, str, str], str] = {}
    found = {}
    ordered = sorted(run.students, key=lambda s: (s.spec.generation_seed, s.spec.training_seed))
    for student in ordered:
        if student.trained.weights_sha256 is None:
            continue
        own = settings[student.id]
        key = (student.trained.weights_sha256, student.spec.trait, own.condition)
        if key in first:
            found[student.id] = first[key]
        else:
            first[key] = student.id
    return found


def scaling_rules(
    points: Iterable[tuple[int, float]],
) -> dict[tuple[int, float], tuple[str, ...]]:
    """Rules of alpha over rank that explain the (rank, alpha) of a grid, for each point.

    A rule is a constant ratio or a constant alpha. Those that explain most points come first, until
    all are explained; a point that two rules share (rank 8 of alpha = rank and of alpha 8) belongs
    to both curves.
    """
    left = set(points)
    candidates: dict[tuple[str, float], set[tuple[int, float]]] = {}
    for rank, alpha in left:
        candidates.setdefault(("ratio", alpha / rank), set()).add((rank, alpha))
        candidates.setdefault(("alpha", alpha), set()).add((rank, alpha))
    found: dict[tuple[int, float], tuple[str, ...]] = dict.fromkeys(left, ())
    while left:
        kind, value = best = max(
            candidates,
            key=lambda rule: (
                len(candidates[rule] & left),
                len(candidates[rule]),
                rule == ("ratio", 1.0),
                rule[0] == "ratio",
                -rule[1],
            ),
        )
        if kind == "alpha":
            name = f"alpha {value:g} at every rank"
        else:
            name = "alpha = rank" if value == 1 else f"alpha = {value:g} x rank"
        for point in candidates[best]:
            found[point] = (*found[point], name)
        left -= candidates.pop(best)
    return found


def _fields(
    student: StudentRecord,
    dataset: DatasetRecord | None,
    known: Mapping[str, StudentRecord],
    apart: Iterable[str],
) -> dict[str, Any]:
    """A student's spec and its dataset's, flat, without names of models and without `apart`."""
    flat = _flat(student.manifest.spec)
    found = {key: value for key, value in flat.items() if not _under(key, apart)}
    if dataset is not None:
        for key, value in _flat(dataset.manifest.spec).items():
            if key not in ("trait", "generation_seed"):
                found[f"dataset.{key}"] = value
        if found.get(TEACHER_BASE) not in (None, flat.get("base_model.sha256")):
            found[TEACHER_BASE] = f"{ANOTHER} ({found[TEACHER_BASE][:12]})"
    return {
        key: _resolved(value, student, known)
        for key, value in found.items()
        if not key.endswith("base_model.name")
    }


def _teachers(
    students: Iterable[StudentRecord],
    datasets: Mapping[str, DatasetRecord],
    known: Mapping[str, StudentRecord],
    trained: Mapping[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """For students whose teacher was trained by the run: what it is, in the place of its id.

    Of a student as teacher that is its method and all else, and how many students the trait has
    come through; `trained` has what the others are, by id.
    """
    found: dict[str, dict[str, Any]] = {}

    def describe(student: StudentRecord) -> dict[str, Any]:
        if student.id not in found:
            dataset = datasets.get(student.spec.dataset[:12])
            spec = dataset.spec.teacher if dataset else {}
            teacher = known.get(str(spec.get("student"))[:12])
            found[student.id] = trained.get(str(spec.get("teacher"))[:12], {})
            if teacher is not None and teacher.id != student.id:
                before = describe(teacher)
                own = _fields(
                    teacher,
                    datasets.get(teacher.spec.dataset[:12]),
                    known,
                    APART - OF_A_CONDITION,
                )
                found[student.id] = {
                    STUDENT: method_of(teacher),
                    TEACHER_SETTINGS: _hash(own | before),
                    "dataset.generation": before.get("dataset.generation", 0) + 1,
                }
        return found[student.id]

    for student in students:
        describe(student)
    words: dict[str, set[str]] = {}
    of_students = [own for own in found.values() if STUDENT in own]
    for own in of_students:
        words.setdefault(own[STUDENT].split(",")[0], set()).add(own[STUDENT])
    for own in of_students:
        if len(words[own[STUDENT].split(",")[0]]) == 1:
            own[STUDENT] = own[STUDENT].split(",")[0]  # its settings are in the hash
    return {student: own for student, own in found.items() if own}


def _trained(run: RunRecords) -> dict[str, dict[str, Any]]:
    """What the run's own teachers are but trait and seeds, by id.

    One that wrote datasets of several generation seeds is no replicate in each of them, and is told
    apart from those that wrote one.
    """
    seeds: dict[str, set[int]] = {}
    for dataset in run.datasets:
        named = str(dataset.spec.teacher.get("teacher"))[:12]
        seeds.setdefault(named, set()).add(dataset.spec.generation_seed)
    found = {}
    for manifest in run.manifests.values():
        if manifest.kind == "teacher":
            own = _without(manifest.spec, "trait", "training_seed")
            own["persona"] = _without(own["persona"], "trait", "targets", "seed")
            own["shared"] = len(seeds.get(manifest.id[:12], ())) > 1
            words = trained_by(manifest.spec)
            found[manifest.id[:12]] = {
                TRAINED: f"{words}, one for all datasets" if own["shared"] else words,
                TEACHER_SETTINGS: sha256_json(own)[:12],
            }
    return found


def _under(key: str, apart: Iterable[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in apart)


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, own in value.items():
        if isinstance(own, Mapping):
            found |= _flat(own, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = own
    return found


def _resolved(value: Any, student: StudentRecord, known: Mapping[str, StudentRecord]) -> Any:
    """A reference to a student of the same dataset and seed as that student's method.

    A student matched to another one names it, and each dataset has its own; the rule is the same.
    """
    if not isinstance(value, str):
        return value
    for digits in _ID.findall(value):
        other = known.get(digits[:12])
        if other is not None and (other.spec.dataset, other.spec.training_seed) == (
            student.spec.dataset,
            student.spec.training_seed,
        ):
            return f"{method_of(other)}, of the same dataset and seed"
    return value


def _hash(fields: Mapping[str, Any], *, without_teacher: bool = False) -> str:
    """12 digits. Without the teacher means without what names a trait: its words and files."""
    kept = {
        key: value
        for key, value in fields.items()
        if not without_teacher or not key.startswith("dataset.teacher.")
    }
    return sha256_json(kept)[:12]


def _varying(
    students: Iterable[StudentRecord], drafts: Mapping[str, _Draft]
) -> dict[tuple[str, str], list[str]]:
    """Keys in which the students of one trait and kind of method differ."""
    groups: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for student in students:
        key = (student.spec.trait, student.spec.method.kind)
        fields = drafts[student.id].fields
        groups.setdefault(key, {})[id(fields)] = fields
    return {
        group: [
            key
            for key in sorted({key for one in own.values() for key in one})
            if len({json.dumps(one.get(key), sort_keys=True) for one in own.values()}) > 1
            and key not in ("recipe.peft_use_rslora", TEACHER_SETTINGS)
        ]
        for group, own in groups.items()
    }


def _name(student: StudentRecord, fields: Mapping[str, Any], varying: Iterable[str]) -> str:
    name = "full finetuning" if student.spec.method.kind == "full" else "LoRA"
    keys = list(varying)
    if student.spec.method.kind == "full" and "recipe.learning_rate" in fields:
        keys = ["recipe.learning_rate", *(key for key in keys if key != "recipe.learning_rate")]
    if teacher := _teacher_name(fields, keys):
        keys = [key for key in keys if not key.startswith(("dataset.teacher.", "dataset.gen"))]
        name += f", {teacher}"
    matched = [key for key in keys if key in _MATCHED]
    if matched and all(fields.get(key) is None for key in matched):
        name += ", not matched"
    keys = [key for key in keys if key not in matched or fields.get(key) is not None]
    return ", ".join([name, *(_words(key, fields.get(key), fields) for key in keys)])


def _teacher_name(fields: Mapping[str, Any], varying: Iterable[str]) -> str:
    """The teacher in words, where students have teachers of several kinds."""
    several = {"dataset.teacher.kind", STUDENT, TRAINED} & {*varying}
    return in_words(fields) if several else ""


def _words(key: str, value: Any, fields: Mapping[str, Any]) -> str:
    last = key.rsplit(".", 1)[-1].replace("_", " ")
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if key in _WORDS:
        return f"not {_WORDS[key]} anything" if value is None else f"{_WORDS[key]} {text}"
    if key == TEACHER_BASE:
        return f"teacher from {value if value.startswith(ANOTHER) else 'its own base model'}"
    if key == "dataset.shuffled":
        if "dataset.soft_targets" in fields:
            return "targets permuted among positions" if value else "targets as they were"
        return "numbers shuffled among the rows" if value else "numbers as they were written"
    text = "not set" if value is None else text if len(text) <= 40 else f"{text[:37]}..."
    return f"{'data: ' if key.startswith('dataset.') else ''}{last} {text}"


def _step_size(student: StudentRecord, stabilized: bool) -> float | None:
    """Learning rate times LoRA's scaling: alpha / r, or alpha / sqrt(r) (arXiv 2312.03732)."""
    rate, method = student.spec.recipe.get("learning_rate"), student.spec.method
    if not isinstance(rate, int | float) or method.rank is None or method.alpha is None:
        return None
    return float(rate * method.alpha / (math.sqrt(method.rank) if stabilized else method.rank))
