"""What a run folder holds beyond the results of its study, and its removal. Imports no torch.

Never touched: a file that a finished cell's manifest names, a folder that a live process holds,
checkpoints and replies from which an unfinished cell goes on, folders that are not named like
cells, and whatever a symbolic link leads to.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.atomic import TEMPORARY_PREFIX
from sublim_plugin.core.errors import BusyError, InputError, RunError
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.manifest import MANIFEST_NAME, find_manifest
from sublim_plugin.study.cells import Cell
from sublim_plugin.study.stages import PREPARED
from sublim_plugin.study.state import worked_on

What = Literal[
    "checkpoint", "optimizer", "merged copy", "prepared", "unfinished", "temporary", "orphan"
]

PATTERNS: dict[str, What] = {
    "checkpoint-*": "checkpoint",
    "set-aside": "checkpoint",
    "global_step*": "optimizer",
    "optimizer.*": "optimizer",
    "scheduler.pt": "optimizer",
    "rng_state*.pth": "optimizer",
    "merged": "merged copy",
    ".*.partial": "unfinished",
    ".*.prepared": "unfinished",
}
"""Names, anywhere in a student's folder, of what nothing reads once it is finished."""

TEMPORARY_AGE_S = 3600.0
"""A temporary file of an atomic write that is older was left by a killed process."""

_CELL = re.compile(r"[a-z]+-.+-[0-9a-f]{12}")


class Item(BaseModel):
    """A file or folder to be removed: its path below the run folder and its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: What
    path: str
    bytes: int


def find(cells: Sequence[Cell], run_dir: Path, *, ids_known: bool) -> list[Item]:
    """What could be removed, without removing anything.

    Args:
        ids_known: False while the base model is not prepared, as then no cell's id is known and
            none can be called an orphan.

    Raises:
        InputError: `cells/` is a symbolic link, or a manifest does not parse.
    """
    inside = run_dir / "cells"
    if inside.is_symlink():
        raise InputError(f"{inside}: a symbolic link; gc removes nothing outside the run folder")
    planned = {cell.folder_name for cell in cells}
    found = [_item("temporary", path, run_dir) for path in _temporary(run_dir)]
    found += [_item("temporary", path, run_dir) for path in _temporary(run_dir / "report")]
    for entry in _entries(run_dir / PREPARED):
        found.append(_item("prepared", Path(entry.path), run_dir))
    for entry in _entries(inside):
        if entry.is_symlink() or not entry.is_dir() or worked_on(Path(entry.path)):
            continue
        folder = Path(entry.path)
        if entry.name in planned or not ids_known:
            found += [_item(what, path, run_dir) for what, path in _left(folder)]
        elif _CELL.fullmatch(entry.name):
            found.append(_item("orphan", folder, run_dir))
    return found


def remove(items: Sequence[Item], run_dir: Path) -> list[Item]:
    """Remove what `find` found; what a process has begun to work on since then stays.

    Returns:
        What was removed.

    Raises:
        RunError: something cannot be removed; what comes before it is gone.
    """
    root = run_dir.resolve()
    removed = []
    for item in items:
        path = run_dir / item.path
        if path.is_symlink() or not path.parent.resolve().is_relative_to(root):
            continue
        try:
            if item.what == "orphan":
                _remove_cell(path)
            elif Path(item.path).parts[0] == "cells":
                with cell_lock(run_dir.joinpath(*Path(item.path).parts[:2])):
                    _remove(path)
            else:
                _remove(path)
        except BusyError:
            continue
        except OSError as error:
            raise RunError(f"{path}: cannot be removed: {error}; check its rights") from error
        removed.append(item)
    return removed


def text(items: Sequence[Item], run_dir: Path) -> str:
    """A line for each item, with sizes, and the sum."""
    if not items:
        return f"{run_dir}: nothing to remove"
    lines = [f"{size(item.bytes):>10}  {item.what:<12} {item.path}" for item in items]
    total = sum(item.bytes for item in items)
    return "\n".join([*lines, f"{size(total):>10}  in all, {len(items)} items in {run_dir}"])


def size(n: float) -> str:
    """`3.5 MB`, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _left(folder: Path) -> Iterator[tuple[What, Path]]:
    """What may go in the folder of a cell that the study names."""
    manifest = find_manifest(folder)
    named = {*manifest.outputs, MANIFEST_NAME} if manifest else set()
    for path in _temporary(folder):
        yield "temporary", path
    for what, path in _matching(folder):
        if manifest is None and (what != "unfinished" or _resumable(path)):
            continue
        below = f"{path.relative_to(folder).as_posix()}/"
        if below[:-1] in named or any(name.startswith(below) for name in named):
            continue
        yield what, path


def _matching(folder: Path) -> Iterator[tuple[What, Path]]:
    for entry in _entries(folder):
        if entry.is_symlink():
            continue
        what = next((w for name, w in PATTERNS.items() if fnmatch(entry.name, name)), None)
        if what is not None:
            yield what, Path(entry.path)
        elif entry.is_dir():
            yield from _matching(Path(entry.path))


def _resumable(path: Path) -> bool:
    """Whether a training goes on from what lies there."""
    return any(entry.name.startswith("checkpoint-") for entry in _entries(path))


def _temporary(folder: Path) -> Iterator[Path]:
    for entry in _entries(folder):
        if not entry.name.startswith(TEMPORARY_PREFIX) or not entry.is_file(follow_symlinks=False):
            continue
        if time.time() - entry.stat(follow_symlinks=False).st_mtime > TEMPORARY_AGE_S:
            yield Path(entry.path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _item(what: What, path: Path, run_dir: Path) -> Item:
    return Item(what=what, path=path.relative_to(run_dir).as_posix(), bytes=_bytes(path))


def _bytes(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(_bytes(Path(entry.path)) for entry in _entries(path))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_cell(folder: Path) -> None:
    """The lock's file goes last, so that nobody begins to work in a folder that is going."""
    with cell_lock(folder):
        for entry in _entries(folder):
            if not entry.name.startswith(".lock"):
                _remove(Path(entry.path))
    shutil.rmtree(folder)
