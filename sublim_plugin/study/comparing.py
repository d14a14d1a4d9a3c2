"""Two studies, named by their files or run folders, set side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.manifest import is_done, read_manifest
from sublim_plugin.study.run import REPORT
from sublim_plugin.study.study_file import load_study


def compare_studies(a: Path, b: Path, out: Path | None) -> Path:
    """Write the comparison of two studies and return its page.

    Args:
        a, b: study files (their runs lie in runs/NAME) or run folders.
        out: the folder to write; beside the first run if not given.

    Raises:
        InputError: one of the two does not exist or was not run, or `out` holds something else.
    """
    from sublim_plugin.analysis.compare import side
    from sublim_plugin.analysis.compare_page import write_comparison

    found = [_located(path) for path in (a, b)]
    names = [name for name, _, _ in found]
    if names[0] == names[1]:
        names = [f"{name} ({path})" for name, path in zip(names, (a, b), strict=True)]
    sides = [
        side(name, run_dir, margin) for name, (_, run_dir, margin) in zip(names, found, strict=True)
    ]
    folder = out or found[0][1].parent / f"compare-{found[0][0]}-{found[1][0]}"
    return write_comparison(sides[0], sides[1], folder.resolve())


def _located(path: Path) -> tuple[str, Path, float | None]:
    """Name, run folder and equivalence margin of a study file or a run folder."""
    if path.is_dir():
        run_dir = path.resolve()
        return run_dir.name, run_dir, _stated_margin(run_dir)
    if not path.exists():
        raise InputError(f"{path}: neither a study file nor a run folder")
    study = load_study(path)
    return study.name, (Path("runs") / study.name).resolve(), study.equivalence_margin


def _stated_margin(run_dir: Path) -> float | None:
    """The margin of the study file that the run's last report was made from, if there is one."""
    if not is_done(run_dir / REPORT):
        return None
    study: Any = yaml.safe_load(read_manifest(run_dir / REPORT).spec.get("study", ""))
    margin = study.get("equivalence_margin") if isinstance(study, dict) else None
    return float(margin) if isinstance(margin, int | float) else None
