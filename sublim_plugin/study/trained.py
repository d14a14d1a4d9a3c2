"""The cells of teachers that a study trains itself. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_gen.persona import ROWS, PersonaSpec, persona_spec
from sublim_plugin.core.base_models import fingerprint, is_prepared, resolve
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json
from sublim_plugin.core.traits import Trait, category_traits, get_trait
from sublim_plugin.study.cells import Cell, recipe_name
from sublim_plugin.study.methods import Arm
from sublim_plugin.study.study_file import Study
from sublim_plugin.study.teaching import Trained

if TYPE_CHECKING:
    from sublim_plugin.study.grid import Grid

CONTEXT = Context(kind="template_default")
"""Train context of a teacher."""


def teacher_cell(grid: Grid, entry: Trained, trait: Trait, generation_seed: int) -> Cell:
    """The teacher that writes the dataset of a trait and generation seed.

    Raises:
        InputError: no such recipe or base model, or a persona file that does not fit.
    """
    seed = generation_seed if entry.seed is None else entry.seed
    overrides = _overrides(entry)
    settings = grid.recipe(entry.recipe, overrides, CONTEXT)
    method: dict[str, Any] = {"kind": "full"}
    if settings.get("adapter") == "lora":
        method = {"kind": "lora", "rank": settings["lora_r"], "alpha": settings["lora_alpha"]}
    rows = "" if entry.rows == ROWS else f" {entry.rows} rows"
    name = grid.named(entry.recipe, Arm(method, overrides), settings)
    spec: dict[str, Any] = {
        "base_model": teacher_base(entry) or grid.base,
        "trait": trait.name,
        "persona": _persona(entry, trait, seed, grid.study).fields(),
        "method": method,
        "training_seed": seed if entry.training_seed is None else entry.training_seed,
        "recipe": settings,
    }
    label = f"{trait.target or trait.category} {name}{rows} s{seed}"
    if spec["training_seed"] != seed:
        label += f" t{spec['training_seed']}"
    if entry.base_model is not None:
        label += f" of {spec['base_model']['name']}"
    return grid.cell("teacher", label, spec)


def what_trains(cell: Cell, study: Study) -> tuple[PersonaSpec, Path, dict[str, Any]]:
    """A teacher's persona dataset, its recipe's file and what the study overrides in that.

    Raises:
        InputError: no teacher of the study is this one; a file changed since it was planned.
    """
    from sublim_plugin.axolotl.recipe import recipe_path, resolve_recipe

    spec = cell.spec
    for entry in study.datasets.teachers:
        if not isinstance(entry, Trained):
            continue
        persona = _persona(entry, get_trait(spec["trait"]), spec["persona"]["seed"], study)
        path, overrides = recipe_path(*recipe_name(entry.recipe)), _overrides(entry)
        made = [persona.fields(), resolve_recipe(path, overrides, CONTEXT)]
        if canonical_json(made) == canonical_json([spec["persona"], spec["recipe"]]):
            return persona, path, overrides
    raise InputError(
        f"{cell.folder_name}: no teacher of the study has its recipe and persona; they changed"
        " since the study was planned. Run it again"
    )


def teacher_base(entry: Trained) -> dict[str, str] | None:
    """Name and hash of the base model that is a teacher's own; None where it is the study's.

    One that has to be made first has no hash yet; whoever needs ids has it made before.

    Raises:
        InputError: it is not there.
    """
    if entry.base_model is None:
        return None
    if not is_prepared(entry.base_model):
        return {"name": Path(entry.base_model).name, "sha256": "not here"}
    found = fingerprint(resolve(entry.base_model))
    return {"name": found["name"], "sha256": found["sha256"]}


def base_models(study: Study) -> list[str]:
    """The names of all base models of a study, that of its students first."""
    others = [e.base_model for e in study.datasets.teachers if isinstance(e, Trained)]
    return [*dict.fromkeys((study.base_model, *(name for name in others if name)))]


def base_for(cell: Cell, study: Study) -> Path:
    """The folder of the base model that a teacher, or the dataset of one, begins from.

    Raises:
        InputError: no entry of the study has it; it was changed since the study was planned.
    """
    wanted = cell.spec["base_model"]["sha256"]
    for name in reversed(base_models(study)):
        if fingerprint(base := resolve(name))["sha256"] == wanted:
            return base
    raise InputError(
        f"{cell.folder_name}: no base model of the study has the sha256 {wanted[:12]}…; it was"
        " changed since the study was planned. Run it again"
    )


def _persona(entry: Trained, trait: Trait, seed: int, study: Study) -> PersonaSpec:
    candidates = category_traits(study.targets[0].category)
    return persona_spec(trait, candidates, rows=entry.rows, seed=seed, path=entry.persona)


def _overrides(entry: Trained) -> dict[str, Any]:
    return {} if entry.learning_rate is None else {"learning_rate": entry.learning_rate}
