"""What is done, missing or failed, read from the cells' folders alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json
from sublim_plugin.core.lock import held
from sublim_plugin.core.manifest import MANIFEST_NAME, Manifest, read_manifest, verify
from sublim_plugin.study.cells import Cell

State = Literal["done", "running", "failed", "missing"]
ERROR_NAME = "error.txt"


@dataclass(frozen=True)
class CellState:
    """A cell as it stands on disk; `error` is the text of its last failure."""

    cell: Cell
    folder: Path
    state: State
    error: str | None = None
    manifest: Manifest | None = None


def cell_state(cell: Cell, run_dir: Path) -> CellState:
    """The state of one cell.

    A manifest means done. It must be that of this cell, and its files must have the sizes that it
    names; their hashes are compared where they are read.

    Raises:
        InputError: the folder holds something else than its manifest or its name says.
    """
    folder = cell.folder(run_dir)
    if (folder / MANIFEST_NAME).is_file():
        manifest = verify(folder, deep=False)
        if canonical_json(manifest.spec) != canonical_json(cell.spec):
            raise InputError(
                f"{folder / MANIFEST_NAME}: its inputs are not those of this cell;"
                f" it was changed or moved. Delete {folder} and run again"
            )
        return CellState(cell, folder, "done", manifest=manifest)
    if held(folder):
        return CellState(cell, folder, "running")
    error = read_error(folder)
    return CellState(cell, folder, "failed" if error else "missing", error)


def read_error(folder: Path) -> str | None:
    """The message of a cell's last failure."""
    try:
        return (folder / ERROR_NAME).read_text(encoding="utf-8").strip() or "failed"
    except OSError:
        return None


def why(state: CellState, run_dir: Path, cells: Sequence[Cell]) -> str:
    """Why a cell is not done: what failed, what it waits for, or which input changed.

    A changed input is found by comparing the cell with the finished cells of its kind that the
    study no longer names, and taking the one with the fewest differences.
    """
    if state.state == "failed":
        return f"failed: {(state.error or '').splitlines()[0]}"
    if state.state != "missing":
        return state.state
    waits = [c.folder_name for c in cells if c.id in state.cell.needs and not _done(c, run_dir)]
    nearest: tuple[int, list[str], str] | None = None
    planned = {cell.folder_name for cell in cells}
    for folder in sorted((run_dir / "cells").glob(f"{state.cell.kind}-*")):
        if folder.name in planned:
            continue
        try:
            manifest = read_manifest(folder)
        except InputError:
            continue
        changes = list(differences(manifest.spec, state.cell.spec))
        if nearest is None or len(changes) < nearest[0]:
            nearest = (len(changes), changes, folder.name)
    if nearest is not None:
        _, changes, name = nearest
        return f"changed since {name}: {'; '.join(changes[:6])}"
    return f"waits for {', '.join(waits)}" if waits else "not made yet"


def _done(cell: Cell, run_dir: Path) -> bool:
    return (cell.folder(run_dir) / MANIFEST_NAME).is_file()


def differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """`key: old → new` for every value in which two specs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif canonical_json([old]) != canonical_json([new]):
        yield f"{key}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = "(absent)" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
