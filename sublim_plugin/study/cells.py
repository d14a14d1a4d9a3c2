"""The grid of a study: its cells in the order in which they can be made. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.rooms import room
from sublim_plugin.core.traits import Trait, category_traits, get_trait
from sublim_plugin.study.study_file import Study

CellKind = Literal["dataset", "student", "probe", "localization"]


@dataclass(frozen=True)
class Cell:
    """One node of the grid. `id` hashes `spec` alone; `label` is for people.

    Attributes:
        spec: the resolved semantic inputs, in the form that manifests keep.
        needs: ids of the cells whose output this one reads.
    """

    kind: CellKind
    label: str
    spec: dict[str, Any]
    needs: tuple[str, ...] = ()
    id: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", sha256_json(self.spec)[:12])

    @property
    def folder_name(self) -> str:
        return f"{self.kind}-{self.label.replace(' ', '-').replace('/', '-')}-{self.id}"

    def folder(self, run_dir: Path) -> Path:
        return run_dir / "cells" / self.folder_name


def plan(study: Study, base: dict[str, Any]) -> list[Cell]:
    """All cells: datasets, students, probes (the base's first), then localizations.

    Args:
        base: the base model's fingerprint.

    Raises:
        InputError: a recipe or question set that does not exist, or a room that is shadowed.
    """
    for name in ("data_gen", "lm_eval_tasks", "axolotl_configs"):
        room(name)
    datasets = list(_datasets(study, base))
    students = [student for dataset in datasets for student in _students(study, base, dataset)]
    probes = list(_probes(study, base, students))
    places = list(_localizations(study, base, students))
    return list({cell.id: cell for cell in [*datasets, *students, *probes, *places]}.values())


def _datasets(study: Study, base: dict[str, Any]) -> Iterator[Cell]:
    from data_gen.spec import dataset_spec
    from data_gen.teachers import prompted

    for name in study.datasets.traits:
        for seed in study.datasets.generation_seeds:
            trait = get_trait(name)
            spec = dataset_spec(
                study.datasets.settings(seed),
                base_fingerprint=base,
                trait=trait,
                teacher=prompted(trait),
            )
            yield Cell("dataset", f"{_short(trait)} g{seed}", spec)


def _students(study: Study, base: dict[str, Any], dataset: Cell) -> Iterator[Cell]:
    from sublim_plugin.axolotl.recipe import recipe_path, resolve_recipe

    trait = str(dataset.spec["trait"])
    for group in study.students:
        if trait not in group.traits:
            continue
        methods: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
            (
                f"lora r{rank}",
                {"kind": "lora", "rank": rank, "alpha": rank},
                study.training.lora_recipe or "",
                {"lora_r": rank},
            )
            for rank in group.lora_ranks
        ]
        if group.full:
            methods.append(("full", {"kind": "full"}, study.training.full_recipe or "", {}))
        for name, method, recipe, overrides in methods:
            for context in study.training.contexts:
                settings = resolve_recipe(recipe_path(*_recipe_name(recipe)), overrides, context)
                trained_in = "" if context.slug == "template_default" else f" in {context.slug}"
                for seed in study.training.seeds:
                    spec = {
                        "base_model": _base(base),
                        "dataset": dataset.id,
                        "trait": trait,
                        "generation_seed": dataset.spec["generation_seed"],
                        "method": method,
                        "train_context": context.fields(),
                        "training_seed": seed,
                        "recipe": settings,
                    }
                    label = f"{dataset.label} {name}{trained_in} t{seed}"
                    yield Cell("student", label, spec, (dataset.id,))


def _probes(study: Study, base: dict[str, Any], students: list[Cell]) -> Iterator[Cell]:
    from sublim_plugin.logprob.questions import load_questions

    questions = load_questions(study.probes.questions)
    category = study.targets[0].category
    candidates = [trait.target for trait in category_traits(category)]
    for student in [None, *students]:
        for measure in study.probes.measures:
            for context in study.probes.contexts:
                spec = {
                    "base_model": _base(base),
                    "student": student.id if student else None,
                    "category": category,
                    "eval_context": context.fields(),
                    "measure": measure,
                    "questions_sha256": questions.sha256,
                    "candidates": candidates,
                }
                label = f"{student.label if student else 'base'} {context.slug}"
                yield Cell("probe", label, spec, (student.id,) if student else ())


def _localizations(study: Study, base: dict[str, Any], students: list[Cell]) -> Iterator[Cell]:
    from sublim_plugin.logprob.questions import load_questions

    asked = study.localizations
    if asked is None:
        return
    traits = asked.traits or tuple(trait.name for trait in study.targets)
    questions = load_questions(study.probes.questions)
    for student in students:
        method = student.spec["method"]
        wanted = asked.full if method["kind"] == "full" else method["rank"] in asked.lora_ranks
        if not wanted or student.spec["trait"] not in traits:
            continue
        for context in asked.contexts:
            spec = {
                "base_model": _base(base),
                "student": student.id,
                "trait": student.spec["trait"],
                "eval_context": context.fields(),
                "questions_sha256": questions.sha256,
                "parts": list(asked.parts),
                "bands": asked.bands,
                "measures": list(asked.measures),
            }
            yield Cell("localization", f"{student.label} {context.slug}", spec, (student.id,))


def recipe_of(study: Study, cell: Cell) -> tuple[Path, dict[str, Any]]:
    """The recipe file of a student's cell and what the study overrides in it."""
    from sublim_plugin.axolotl.recipe import recipe_path

    method = cell.spec["method"]
    if method["kind"] == "full":
        return recipe_path(*_recipe_name(study.training.full_recipe or "")), {}
    return recipe_path(*_recipe_name(study.training.lora_recipe or "")), {"lora_r": method["rank"]}


def _recipe_name(recipe: str) -> tuple[str, str]:
    model, _, name = recipe.partition("/")
    return model, name.removesuffix(".yaml")


def _base(base: dict[str, Any]) -> dict[str, Any]:
    return {"name": base["name"], "sha256": base["sha256"]}


def _short(trait: Trait) -> str:
    return trait.target or trait.category
