"""One task of an array: what `sublim run STUDY --array K --index N` does on a compute node."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from sublim_plugin.core.base_models import fingerprint, resolve
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.manifest import is_done
from sublim_plugin.study.arrays import array_path, read_array
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.run import Terminated, local_engine, make_all
from sublim_plugin.study.schedule import Schedule
from sublim_plugin.study.study_file import load_study

RESTARTS = 50
"""Times that one task goes back to Slurm's queue; a cell that a time limit always cuts off, and
that keeps nothing of what it did, would go round for ever."""
Say = Callable[[str], None]


def run_index(study_path: Path, run_dir: Path, number: int, index: int, say: Say) -> int:
    """Make the cells of task `index` of array `number` that are not done, by the local engine.

    A cell whose input is missing is told and left; the others are made. SIGTERM stops the work
    and, inside a Slurm job that is running, not cancelled, sends the task back to the queue.

    Returns:
        0, the highest exit code of a cell that failed, 1 where an input is missing, 143 after
        SIGTERM.

    Raises:
        InputError: no such array or task.
    """
    study_path, run_dir = study_path.resolve(), run_dir.resolve()
    file = read_array(run_dir, number)
    if not 0 <= index < len(file.tasks):
        raise InputError(
            f"--index {index}: {array_path(run_dir, number)} has tasks 0 to {len(file.tasks) - 1}"
        )
    study = load_study(study_path)
    cells = {cell.id: cell for cell in plan(study, fingerprint(resolve(study.base_model)))}
    ready, code = _ready(file.tasks[index], cells, run_dir, say)
    if not ready:
        return code
    say(f"{study.name}: {', '.join(cell.label for cell in ready)}")
    done = {need for cell in ready for need in cell.needs}
    try:
        codes = make_all(Schedule(ready, done), local_engine(study_path, run_dir), run_dir, say)
    except Terminated as stopped:
        _back_to_the_queue(say)
        return int(stopped.code or 1)
    return max([code, *codes])


def _ready(
    ids: Sequence[str], cells: dict[str, Cell], run_dir: Path, say: Say
) -> tuple[list[Cell], int]:
    """The cells that can be made now, and 1 as exit code where an input is missing."""
    ready, code = [], 0
    for cell_id in ids:
        cell = cells.get(cell_id)
        if cell is None:
            say(f"cell {cell_id}: the study file was changed and names it no more; left out")
        elif not _done(cell, run_dir):
            missing = [need for need in cell.needs if not _done(cells[need], run_dir)]
            for need in missing:
                say(
                    f"{cell.kind} {cell.label}: not made, its {cells[need].kind}"
                    f" {cells[need].label} is not done; see {cells[need].folder(run_dir)}"
                )
            if missing:
                code = 1
            else:
                ready.append(cell)
    return ready, code


def _done(cell: Cell, run_dir: Path) -> bool:
    return is_done(cell.folder(run_dir))


def _back_to_the_queue(say: Say) -> None:
    """Requeue this Slurm task, which a time limit or a preemption ends, unless it is cancelled."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= RESTARTS:
        say(f"stopped, and not queued again after {RESTARTS} times: raise the time limit")
        return
    asked = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}", "--format=%T"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if asked.stdout.strip() != "RUNNING":
        return  # cancelled, or on its way back already
    say("the task goes back to the queue")
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"scontrol requeue {job} refused: {done.stderr.strip()}")
