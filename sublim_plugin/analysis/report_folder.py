"""The report's folder: built beside the old one and swapped in whole.

A reader, and the next run, find the old report or the new one, never files of both. What is not the
report's own in the folder (a reader's notes) is kept.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sublim_plugin.analysis.figure_files import FORMATS
from sublim_plugin.core.atomic import sync_folder, write_failure
from sublim_plugin.core.manifest import MANIFEST_NAME

NAME = "report"
BUILDING = ".tmp-report-"
ABANDONED_S = 3600.0
"""Age from which a folder under construction is one that a kill left behind."""

COMPARISON = "differences.csv"
"""The file by which a comparison's folder is known."""
FIGURES = ("transmission", "contexts", "specificity", "scale", "losses", "norms", "dose")
FILES = {
    "index.html",
    "references.bib",
    "results.parquet",
    *(
        f"{name}.csv"
        for name in (
            "results",
            "effects",
            "evidence",
            "methods",
            "counts",
            "cells",
            "students",
            "datasets",
            "sampled",
            "localization",
            "signal",
            "answers",
            "differences",
            "settings",
        )
    ),
    *(f"{name}.{kind}" for name in FIGURES for kind in (*FORMATS, "csv")),
}


def own_files(folder: Path) -> list[Path]:
    """The report's own files in its folder, its manifest excepted, in order."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _is_own(path.relative_to(folder)) and path.name != MANIFEST_NAME
    ]


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes `folder` when the block ends without error.

    Raises:
        RunError: a folder cannot be written.
    """
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f"{BUILDING}*"):
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        new = parent / f"{BUILDING}{os.getpid()}"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
    except OSError as error:
        raise write_failure(folder, error) from error
    try:
        yield new
        _swap(folder, new)
    except OSError as error:
        raise write_failure(folder, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _swap(folder: Path, new: Path) -> None:
    old = new.with_name(f"{new.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        for path in sorted(folder.iterdir()):
            if not _is_own(path.relative_to(folder)):
                os.replace(path, new / path.name)
        os.replace(folder, old)
    os.replace(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_own(name: Path) -> bool:
    return name.parts[0] == "localization" or name.as_posix() in {*FILES, MANIFEST_NAME}
