"""Rows that axolotl has tokenized, shared by the trainings that tokenize the same rows alike.

axolotl writes them in place, where a kill leaves half of them to the next run, and does not look
whether the rows or the template have changed (`dataset_prepared_path`). So each training has a
folder of its own; what a finished one leaves is moved, in one step, to where the next take a copy.
The plugin holds every row to its own rendering, copied or not.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from pathlib import Path

HOST_CACHE = "datasets"
"""Folder in a training's own one where the `datasets` library keeps its cache."""
_BOOKKEEPING = ("datasets_prep.lock", "datasets_ready.flag", "process_counter.txt")


def take(shared: Path, own: Path) -> bool:
    """Copy the rows in `shared` into the folder `own`; whether there are any."""
    try:
        shutil.copytree(shared, own, dirs_exist_ok=True)
    except OSError:  # none, or they are being removed
        shutil.rmtree(own, ignore_errors=True)
        return False
    return True


def give(own: Path, shared: Path) -> None:
    """Move the rows in `own` to `shared`, where none are yet."""
    made = [path for path in own.glob("*/") if path.name != HOST_CACHE]
    if shared.exists() or not made:
        return
    passing = shared.with_name(f".{shared.name}.{secrets.token_hex(4)}")
    passing.mkdir(parents=True)
    for path in made:
        path.rename(passing / path.name)
    for name in _BOOKKEEPING:
        for left in passing.rglob(name):
            left.unlink()
    with contextlib.suppress(OSError):  # another training was first
        passing.rename(shared)
    shutil.rmtree(passing, ignore_errors=True)
