"""Runs a study: every missing cell, one stage after the other, then the report.

The coordinator imports neither torch nor a host. Datasets and probes are made in one worker
process each, which loads the base model once; each student is trained by axolotl in its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sublim_plugin.core.base_models import fingerprint, is_prepared, resolve
from sublim_plugin.core.errors import BusyError
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.manifest import MANIFEST_NAME, read_manifest, write_manifest
from sublim_plugin.core.processes import die_with_parent
from sublim_plugin.core.versions import installed
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.stages import require_chat_template, train_student
from sublim_plugin.study.state import CellState, cell_state, read_error
from sublim_plugin.study.study_file import Study, load_study

REPORT = "report"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a run left: the exit code, and the states of all cells."""

    exit_code: int
    states: list[CellState]
    report: Path


@dataclass
class _Clock:
    """Wall time per kind of cell in this run, for the time left."""

    cells: Sequence[Cell]
    say: Say
    spent: dict[str, list[float]] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)

    def done(self, cell: Cell, seconds: float, word: str) -> None:
        self.finished.add(cell.id)
        self.spent.setdefault(cell.kind, []).append(seconds)
        left = 0.0
        known = True
        for other in self.cells:
            if other.id not in self.finished:
                times = self.spent.get(other.kind)
                known = known and bool(times)
                left += sum(times) / len(times) if times else 0.0
        remaining = f", about {_minutes(left)} left" if known and left else ""
        count = f"[{len(self.finished)}/{len(self.cells)}]"
        self.say(f"{count} {cell.kind} {cell.label}: {word} in {_minutes(seconds)}{remaining}")


def planned(study_path: Path) -> tuple[Study, Path, list[Cell]]:
    """Load a study file, prepare its base model and lay out its cells.

    Raises:
        InputError: the file, the base model or its chat template.
    """
    study = load_study(study_path)
    base = resolve(study.base_model)
    require_chat_template(base)
    return study, base, plan(study, fingerprint(base))


def states_of(study_path: Path, run_dir: Path) -> tuple[list[CellState], bool]:
    """The states of all cells, without making anything.

    Returns:
        The states, and whether the base model is prepared; until it is, ids are not known and
        every cell counts as missing.
    """
    study = load_study(study_path)
    if not is_prepared(study.base_model):
        unknown = plan(study, {"name": study.base_model, "sha256": "not prepared"})
        return [CellState(cell, cell.folder(run_dir), "missing") for cell in unknown], False
    cells = plan(study, fingerprint(resolve(study.base_model)))
    return [cell_state(cell, run_dir) for cell in cells], True


def run_study(study_path: Path, run_dir: Path, say: Say) -> Outcome:
    """Make every cell that is missing, then the report. Finished cells are not made again.

    Raises:
        InputError: the study, its base model or a finished cell does not fit; nothing was started.
        BusyError: another process runs this study into the same folder.
    """
    if not is_prepared(load_study(study_path).base_model):
        say("preparing the base model (once)")
    study, base, cells = planned(study_path)
    with cell_lock(run_dir):
        states = [cell_state(cell, run_dir) for cell in cells]
        busy = [state.cell.label for state in states if state.state == "running"]
        if busy:
            raise BusyError(f"{run_dir}: another process is working on {', '.join(busy)}")
        missing = [state.cell for state in states if state.state != "done"]
        say(f"{study.name}: {len(cells)} cells, {len(cells) - len(missing)} done, in {run_dir}")
        codes = []
        clock = _Clock(missing, say)
        for kind in ("dataset", "student", "probe", "localization"):
            todo = [cell for cell in missing if cell.kind == kind and _ready(cell, cells, run_dir)]
            if kind == "student":
                for cell in todo:
                    codes.append(_train(cell, cells, study, base, run_dir, clock))
            elif todo:
                codes.append(_in_worker(todo, study_path, run_dir, clock))
        states = [cell_state(cell, run_dir) for cell in cells]
        index = write_report_if_changed(study, study_path, run_dir, states)
    failed = [state for state in states if state.state != "done"]
    for state in failed:
        first = (state.error or "not started: an input is missing").splitlines()[0]
        say(f"failed: {state.cell.kind} {state.cell.label}: {first}")
    return Outcome(max(codes, default=0) or (1 if failed else 0), states, index)


def _ready(cell: Cell, cells: Sequence[Cell], run_dir: Path) -> bool:
    needed = [other for other in cells if other.id in cell.needs]
    return all((other.folder(run_dir) / MANIFEST_NAME).is_file() for other in needed)


def _train(
    cell: Cell, cells: Sequence[Cell], study: Study, base: Path, run_dir: Path, clock: _Clock
) -> int:
    from tqdm import tqdm

    from sublim_plugin.study.worker import attempt

    dataset = next(other for other in cells if other.id in cell.needs)
    started = time.monotonic()
    with tqdm(desc=cell.label, unit="step", disable=None, leave=False) as bar:

        def show(step: int, steps: int) -> None:
            bar.total = steps
            bar.update(step - bar.n)

        folder = cell.folder(run_dir)
        work = partial(
            train_student,
            cell,
            folder,
            base=base,
            study=study,
            dataset=dataset.folder(run_dir),
            progress=show,
        )
        code = attempt(folder, work)
    clock.done(cell, time.monotonic() - started, "failed" if code else "done")
    return code


def _in_worker(cells: Sequence[Cell], study_path: Path, run_dir: Path, clock: _Clock) -> int:
    """Run a worker over the cells, telling of each one as its manifest or its error appears."""
    command = [sys.executable, "-P", "-m", "sublim_plugin.study.worker"]
    command += [str(study_path), str(run_dir), *(cell.id for cell in cells)]
    for cell in cells:
        (cell.folder(run_dir) / "error.txt").unlink(missing_ok=True)
    started = time.monotonic()
    # Threads that wait without spinning: beside another busy process, spinning costs many times
    # the work.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env=environment, preexec_fn=die_with_parent()
    )
    open_cells = list(cells)
    try:
        while True:
            ended = child.poll() is not None
            for cell in list(open_cells):
                folder = cell.folder(run_dir)
                done = (folder / MANIFEST_NAME).is_file()
                if done or read_error(folder):
                    open_cells.remove(cell)
                    clock.done(cell, time.monotonic() - started, "done" if done else "failed")
                    started = time.monotonic()
            if ended:
                return child.returncode if child.returncode >= 0 else 1
            time.sleep(0.1)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()


def write_report_if_changed(
    study: Study, study_path: Path, run_dir: Path, states: Sequence[CellState]
) -> Path:
    """Write the report unless the one that is there was made from these states and files."""
    from sublim_plugin.analysis.collect import CellRef
    from sublim_plugin.analysis.report import write_report
    from sublim_plugin.analysis.report_folder import own_files

    folder = run_dir / REPORT
    index = folder / "index.html"
    text = study_path.read_text(encoding="utf-8")
    spec: dict[str, Any] = {
        "study": text,
        "sublim": installed(["sublim"]),
        "cells": {
            state.cell.folder_name: [
                state.state,
                state.error,
                sha256_json(state.manifest.model_dump(mode="json")) if state.manifest else None,
            ]
            for state in states
        },
    }
    if index.is_file() and (folder / MANIFEST_NAME).is_file():
        if read_manifest(folder).id == sha256_json(spec)[:12]:
            return index
        (folder / MANIFEST_NAME).unlink()
    started = time.time()
    refs = [
        CellRef(folder=s.folder, state=s.state, label=s.cell.label, error=s.error) for s in states
    ]
    write_report(
        run_dir,
        study_name=study.name,
        cells=refs,
        study_text=text,
        equivalence_margin=study.equivalence_margin,
    )
    write_manifest(
        folder,
        kind="report",
        id=sha256_json(spec)[:12],
        label=study.name,
        spec=spec,
        outputs=[str(path.relative_to(folder)) for path in own_files(folder)],
        started=started,
    )
    return index


def _minutes(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"
