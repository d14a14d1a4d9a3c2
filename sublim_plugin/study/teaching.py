"""The teachers of a study: prompted, finetuned elsewhere, trained by the study itself, steered, or
students of the study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from data_gen.persona import ROWS
from data_gen.teachers import TRAINED, FinetunedTeacher, Teacher, finetuned, prompted, steered
from sublim_plugin.core.atomic import write_json
from sublim_plugin.core.base_models import cache_folder
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json, sha256_json
from sublim_plugin.core.manifest import is_done, read_manifest
from sublim_plugin.core.traits import NEUTRAL, Trait, category_traits, get_trait
from sublim_plugin.study.methods import Alpha, Rank, Rate, Strict, has_alpha

_ASKED_IN = "Context in which the teacher is asked. Left out: template_default."
_NAME = Field(
    default="",
    description="What other keys of the study call this teacher; no part of any id. Left out: its "
    "kind.",
)
_TRAITS = "Traits, out of datasets.traits, that it teaches. "


class _Entry(Strict):
    @property
    def called(self) -> str:
        """The name by which other keys of the study refer to it."""
        return str(getattr(self, "name", "") or getattr(self, "kind", ""))


class Prompted(_Entry):
    """The base model under the trait's sentence; for neutral, without one."""

    kind: Literal["prompted"]
    name: str = _NAME
    traits: tuple[str, ...] = Field(default=(), description=_TRAITS + "Left out: all.")


class Finetuned(_Entry):
    """Adapters or checkpoints that exist already."""

    kind: Literal["finetuned"]
    name: str = _NAME
    from_: Annotated[dict[str, Path], Field(min_length=1)] = Field(
        alias="from",
        description="For each trait that it teaches, the folder of an adapter, of a checkpoint, or "
        "of a study's student.",
    )
    context: Context | None = Field(default=None, description=_ASKED_IN)


class Steered(_Entry):
    """The base model with a vector added to the residual stream."""

    kind: Literal["steered"]
    name: str = _NAME
    traits: tuple[str, ...] = Field(
        default=(),
        description=_TRAITS + "Left out: those of `vectors`, else all that have a target.",
    )
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = Field(
        description="Layers behind which the vector is added, counted from 0."
    )
    strength: Annotated[float, Field(allow_inf_nan=False)] = Field(
        description="Factor of the vectors."
    )
    contrast: Literal["category"] | Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Traits against whose sentences the vectors are taken, in the place of no "
        "sentence: a list of names, or category for all others. What all sentences do alike is "
        "then in no vector.",
    )
    vectors: dict[str, Path] = Field(
        default={},
        description="For each trait, a safetensors file with a vector layer.N for each layer. Left "
        "out: the mean difference that the trait's sentence makes.",
    )
    context: Context | None = Field(default=None, description=_ASKED_IN)


class Trained(_Entry):
    """Teachers that the study finetunes on questions and answers that name the trait.

    For neutral the answers name every target of the category about equally often, so that its
    teacher is finetuned in the same way without a preference.
    """

    kind: Literal["trained"]
    name: str = _NAME
    traits: tuple[str, ...] = Field(default=(), description=_TRAITS + "Left out: all.")
    recipe: str = Field(
        description="MODEL/NAME of a recipe in axolotl_configs, without .yaml, such as "
        "smollm2-135m-instruct/teacher-lora-r8."
    )
    learning_rate: Rate | None = Field(
        default=None, description="Learning rate. Left out: the recipe's own."
    )
    rows: Annotated[int, Field(ge=1)] = Field(
        default=ROWS, description="Rows that it is trained on; the fewer, the weaker it gets."
    )
    seed: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Seed of its rows, and of its training: one teacher of each trait then writes "
        "all datasets. Left out: the generation seed, a teacher for each dataset.",
    )
    training_seed: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Seed of its training alone, LoRA's initialization with it: teachers that "
        "start where the students do have the students' seed. Left out: the seed of its rows.",
    )
    persona: Path | None = Field(
        default=None, description="A YAML file of questions and answers. Left out: ours."
    )
    base_model: str | None = Field(
        default=None,
        description="Another base model that these teachers begin from, for students that do not "
        "share their teacher's initialization: a folder, such as `sublim reinitialize` makes. It "
        "has the tokenizer of the study's base_model. Left out: that one.",
    )
    context: Context | None = Field(default=None, description=_ASKED_IN)


class StudentTeacher(_Entry):
    """Students of this study as the next teachers, several generations over if asked for.

    The teacher of a trait and generation seed is the student of that trait and generation seed.
    """

    kind: Literal["student"]
    name: str = _NAME
    of: str = Field(
        default="prompted",
        description="The teacher whose students teach in the first generation.",
    )
    traits: tuple[str, ...] = Field(
        default=(), description=_TRAITS + "Left out: all that the teacher named by `of` teaches."
    )
    generations: Annotated[int, Field(ge=1)] = Field(
        default=1,
        description="How often: in generation 2 the teachers are the students of generation 1, and "
        "so on. A generation is called by the teacher's name and its number: 'student 2'.",
    )
    lora_rank: Rank | None = Field(default=None, description="The teacher is the student of this "
                                   "LoRA rank.")  # fmt: skip
    full: Literal[True] | None = Field(
        default=None, description="The teacher is the plain fully finetuned student."
    )
    alpha: Alpha | None = Field(default=None, description="Its alpha, where there are several.")
    learning_rate: Rate | None = Field(
        default=None, description="Its learning rate, where there are several."
    )
    train_context: Context | None = Field(
        default=None, description="Its train context, where training.contexts has several."
    )
    training_seed: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Its training seed, where training.seeds has several."
    )
    context: Context | None = Field(default=None, description=_ASKED_IN)

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        if (self.lora_rank is None) == (self.full is None):
            raise ValueError("expected either lora_rank or full: true")
        if self.alpha is not None and self.lora_rank is None:
            raise ValueError("alpha is that of a LoRA student; give lora_rank")
        return self

    def fits(self, spec: dict[str, Any]) -> bool:
        """Whether a student's spec is the one that teaches."""
        context = self.train_context
        return bool(
            "matched" not in spec
            and spec["method"].get("rank") == self.lora_rank
            and (self.alpha is None or has_alpha(spec, self.alpha))
            and self.learning_rate in (None, spec["recipe"].get("learning_rate"))
            and (context is None or spec["train_context"] == context.fields())
            and self.training_seed in (None, spec["training_seed"])
        )

    def names(self) -> list[str]:
        """What its generations are called."""
        return [f"{self.called} {number}" for number in range(1, self.generations + 1)]


def _by_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Entry = Annotated[
    Annotated[
        Prompted | Finetuned | Trained | Steered | StudentTeacher, Field(discriminator="kind")
    ],
    BeforeValidator(_by_kind),
]
PROMPTED = Prompted(kind="prompted")


def names_of(entries: tuple[Entry, ...]) -> list[str]:
    """All names by which a teacher can be referred to: a chain's, and its generations'."""
    found = []
    for entry in entries:
        found.append(entry.called)
        if isinstance(entry, StudentTeacher):
            found += entry.names()
    return found


def taught(entry: Entry, entries: tuple[Entry, ...], traits: tuple[str, ...]) -> tuple[str, ...]:
    """The traits that a teacher teaches, in the order of datasets.traits."""
    if isinstance(entry, Finetuned):
        named: tuple[str, ...] = tuple(entry.from_)
    else:
        named = entry.traits
    if isinstance(entry, Steered) and not named:
        named = tuple(entry.vectors) or tuple(trait for trait in traits if trait != NEUTRAL)
    if isinstance(entry, StudentTeacher) and not named:
        first = next(other for other in entries if other.called == entry.of)
        named = taught(first, entries, traits)
    return tuple(trait for trait in traits if not named or trait in named)


def check_teachers(entries: tuple[Entry, ...], traits: tuple[str, ...]) -> None:
    """Raises ValueError for names that clash or lead nowhere, and for traits that are not there."""
    for entry in entries:
        alike = [other for other in entries if other.called == entry.called]
        if len(alike) > 1:
            raise ValueError(
                f"datasets.teachers: {len(alike)} are called '{entry.called}'; give each a `name`"
            )
    names = names_of(entries)
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"datasets.teachers: '{doubled[0]}' is a chain's generation already")
    for entry in entries:
        named = entry.from_ if isinstance(entry, Finetuned) else entry.traits
        for trait in (*named, *(entry.vectors if isinstance(entry, Steered) else ())):
            if trait not in traits:
                raise ValueError(
                    f"datasets.teachers: '{entry.called}' teaches '{trait}', which datasets.traits"
                    f" does not list ({', '.join(traits)})"
                )
        if isinstance(entry, StudentTeacher):
            first = [other for other in entries if other.called == entry.of]
            if not first or isinstance(first[0], StudentTeacher):
                others = [e.called for e in entries if not isinstance(e, StudentTeacher)]
                raise ValueError(
                    f"datasets.teachers: '{entry.called}' is of '{entry.of}', which is no teacher"
                    f" beside the students ({', '.join(others) or 'there is none'}); for students"
                    " of students give `generations`"
                )
        if isinstance(entry, Steered):
            for trait in taught(entry, entries, traits):
                if trait not in entry.vectors and get_trait(trait).teacher_system_prompt is None:
                    raise ValueError(
                        f"datasets.teachers: '{entry.called}': {trait} has no sentence to take a"
                        " steering vector from; give it `vectors`, or leave it out of `traits`"
                    )


def planned_teacher(entry: Prompted | Finetuned | Steered, trait: str) -> Teacher:
    """A trait's teacher as its dataset's spec needs it. Weights are not read again where their
    hashes are known; `data_gen.teachers.finetuned` reads them before they teach.

    Raises InputError for a folder or file that is not there.
    """
    if isinstance(entry, Finetuned):
        return _finetuned(entry.from_[trait], entry.context)
    if isinstance(entry, Steered):
        vectors = entry.vectors.get(trait)
        named = get_trait(trait)
        against: Sequence[Trait] = ()
        if entry.contrast == "category":
            against = category_traits(named.category)
        elif entry.contrast:
            against = [get_trait(name) for name in entry.contrast]
        return steered(named, entry.layers, entry.strength, vectors, entry.context, against)
    return prompted(get_trait(trait))


def taught_by(cell: str, id: str, method: str, context: Context | None) -> Teacher:
    """A student or teacher that the study trains, for the spec of its dataset.

    Args:
        cell: the kind of the cell that trains it.
    """
    return FinetunedTeacher(
        context=context or Context(kind="template_default"),
        folder=Path(),
        method="full" if method == "full" else "lora",
        identity={cell: id},
    )


def teacher_for(spec: dict[str, Any], entries: tuple[Entry, ...], cells: Path) -> Teacher:
    """The teacher that writes the dataset of this spec, ready to be loaded.

    Args:
        cells: the folder in which what the study trained lies, as `student-*-ID`, `teacher-*-ID`.

    Raises:
        InputError: it is not there or does not match its manifest.
    """
    asked, trait = spec["teacher"], spec["trait"]
    for kind in TRAINED:
        if (name := asked.get(kind)) and (found := sorted(cells.glob(f"{kind}-*-{name}"))):
            return finetuned(found[0], Context.parse(asked["context"]))
    for entry in entries:
        if isinstance(entry, StudentTeacher | Trained):
            continue
        if isinstance(entry, Finetuned):
            if trait not in entry.from_:
                continue
            teacher: Teacher = _finetuned(entry.from_[trait], entry.context)
        else:
            if isinstance(entry, Prompted) != (asked["kind"] == "prompted"):
                continue
            teacher = planned_teacher(entry, trait)
        if canonical_json(teacher.spec()) == canonical_json(asked):
            if isinstance(entry, Finetuned):
                return finetuned(entry.from_[trait], entry.context)
            return teacher
    raise InputError(
        f"the teacher {canonical_json(asked)} of {trait} is not there: it was trained by this"
        f" study and is not in {cells}, or it changed since the study was planned"
    )


def _finetuned(folder: Path, context: Context | None) -> FinetunedTeacher:
    """As `finetuned`, with the hashes of its files kept in the cache by size and time."""
    if is_done(folder):
        manifest = read_manifest(folder)
        if manifest.kind not in TRAINED:
            return finetuned(folder, context)  # which says what is wrong
        lora = (folder / "model" / "adapter_config.json").is_file()
        return FinetunedTeacher(
            context=context or Context(kind="template_default"),
            folder=(folder / "model").resolve(),
            method="lora" if lora else "full",
            identity={manifest.kind: manifest.id},
        )
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
    stamp = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}
    name = sha256_json([str(folder.resolve()), stamp])[:24]
    kept = cache_folder() / "teachers" / f"{name}.json"
    try:
        known = json.loads(kept.read_text(encoding="utf-8"))
        return FinetunedTeacher(
            context=context or Context(kind="template_default"), folder=folder.resolve(), **known
        )
    except (OSError, ValueError, TypeError):
        pass
    teacher = finetuned(folder, context)
    write_json(kept, {"method": teacher.method, "identity": teacher.identity})
    return teacher
