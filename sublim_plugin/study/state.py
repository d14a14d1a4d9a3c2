"""What is done, missing or failed, read from the cells' folders alone. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_json

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json
from sublim_plugin.core.lock import held
from sublim_plugin.core.manifest import MANIFEST_NAME, Manifest, check_outputs, find_manifest
from sublim_plugin.core.read_ahead import read_ahead
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.study_file import Study

State = Literal["done", "running", "failed", "missing"]
STATES: tuple[State, ...] = ("done", "running", "failed", "missing")
ERROR_NAME = "error.txt"
LOGS = ("train.log", "cell.log", ERROR_NAME)
"""Where a cell's failure can be read up, the fullest first."""


@dataclass(frozen=True)
class CellState:
    """A cell as it stands on disk; `error` is the text of its last failure."""

    cell: Cell
    folder: Path
    state: State
    error: str | None = None
    manifest: Manifest | None = None

    @property
    def log(self) -> Path | None:
        """The file that tells most of a failure, if the cell left one."""
        return next((path for name in LOGS if (path := self.folder / name).is_file()), None)


def cell_state(cell: Cell, run_dir: Path) -> CellState:
    """The state of one cell.

    A manifest means done. It must be that of this cell, and its files must have the sizes that it
    names; their hashes are compared where they are read.

    Raises:
        InputError: the folder holds something else than its manifest or its name says.
    """
    folder = cell.folder(run_dir)
    manifest = find_manifest(folder)
    if manifest is not None:
        check_outputs(folder, manifest, deep=False)
        if not _same(manifest.spec, cell.spec):
            raise InputError(
                f"{folder / MANIFEST_NAME}: its inputs are not those of this cell;"
                f" it was changed or moved. Delete {folder} and run again"
            )
        return CellState(cell, folder, "done", manifest=manifest)
    if worked_on(folder):
        return CellState(cell, folder, "running")
    error = read_error(folder)
    return CellState(cell, folder, "failed" if error else "missing", error)


def worked_on(folder: Path) -> bool:
    """Whether a process works on a cell; a dataset is locked where its replies are gathered."""
    return held(folder) or held(folder / "work")


def read_manifests_ahead(run_dir: Path) -> None:
    """Have the manifests of a run folder in memory before they are read one by one."""
    try:
        names = os.listdir(run_dir / "cells")
    except OSError:
        return
    read_ahead([f"{run_dir}/cells/{name}/{MANIFEST_NAME}" for name in names])


def states_without_base(study: Study, run_dir: Path) -> list[CellState]:
    """All cells as missing, where the base model is elsewhere and no id can be known."""
    cells = plan(study, {"name": Path(study.base_model).name, "sha256": "not here"})
    return [CellState(cell, cell.folder(run_dir), "missing") for cell in cells]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal texts need no canonical form, which takes ten times as long to make."""
    return to_json(one) == to_json(other) or canonical_json(one) == canonical_json(other)


def read_error(folder: Path) -> str | None:
    """The message of a cell's last failure."""
    try:
        return (folder / ERROR_NAME).read_text(encoding="utf-8").strip() or "failed"
    except OSError:
        return None


def first_line(state: CellState) -> str:
    """The first line of a failure."""
    return (state.error or "failed").splitlines()[0]
