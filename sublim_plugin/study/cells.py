"""The cells of a study, in the order in which they can be made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.rooms import room
from sublim_plugin.study.methods import overrides_of
from sublim_plugin.study.selecting import selected
from sublim_plugin.study.study_file import Study

CellKind = Literal["teacher", "dataset", "student", "probe", "localization", "signal"]


@dataclass(frozen=True)
class Cell:
    """One node of the grid. `id` hashes `spec` alone; `label` is for people.

    Attributes:
        spec: the resolved semantic inputs, in the form that manifests keep. Cells of one plan
            share what is equal in them; nobody changes it.
        needs: ids of the cells whose output this one reads.
        id: left out, it is computed.
    """

    kind: CellKind
    label: str
    spec: dict[str, Any]
    needs: tuple[str, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", sha256_json(self.spec)[:12])

    @property
    def folder_name(self) -> str:
        return f"{self.kind}-{self.label.replace(' ', '-').replace('/', '-')}-{self.id}"

    def folder(self, run_dir: Path) -> Path:
        return run_dir / "cells" / self.folder_name


def plan(study: Study, base: dict[str, Any]) -> list[Cell]:
    """All cells, each after those that it needs, none twice: teachers, datasets and students, those
    of a chain's later generations behind them, then probes (the base's first), then localizations,
    then signals.

    Args:
        base: the base model's fingerprint. Ids need its `name` and `sha256`; with a placeholder
            in their place everything but the ids is as it will be.

    Raises:
        InputError: a recipe, question set or teacher's file that does not exist, a room that is
            shadowed, or parts of the study that do not fit together.
    """
    from sublim_plugin.study.grid import Grid
    from sublim_plugin.study.scoring import localizations, probes, signals

    for name in ("data_gen", "lm_eval_tasks", "axolotl_configs"):
        room(name)
    grid = Grid(study, base)
    made = [*grid.datasets_and_students()]
    students = [cell for cell in made if cell.kind == "student"]
    every = (*made, *probes(grid, students), *localizations(grid, students), *signals(grid, made))
    cells = list({cell.id: cell for cell in every}.values())
    return selected(cells, study.include or (), study.exclude, grid.teachers)


def recipe_of(study: Study, cell: Cell) -> tuple[Path, dict[str, Any]]:
    """The recipe file of a student's cell and what the study overrides in it."""
    from sublim_plugin.axolotl.recipe import recipe_path

    training = study.training
    full = cell.spec["method"]["kind"] == "full"
    recipe = training.full_recipe if full else training.lora_recipe
    return recipe_path(*recipe_name(recipe or "")), overrides_of(cell.spec)


def recipe_name(recipe: str) -> tuple[str, str]:
    """Model and name of a recipe as a study file writes it."""
    model, _, name = recipe.partition("/")
    return model, name.removesuffix(".yaml")
