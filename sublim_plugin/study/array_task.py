"""One task of an array: what `sublim run STUDY --array K --index N` does on a compute node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sublim_plugin.core.base_models import fingerprint, resolve
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.manifest import MANIFEST_NAME
from sublim_plugin.core.processes import die_with_parent
from sublim_plugin.study.arrays import array_path, read_array
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.study_file import load_study

RESTARTS = 50
"""Times that one task goes back to Slurm's queue; a cell that a time limit always cuts off, and
that keeps nothing of what it did, would go round for ever."""
Say = Callable[[str], None]


def run_index(study_path: Path, run_dir: Path, number: int, index: int, say: Say) -> int:
    """Make the cells of task `index` of array `number` that are not done, in one worker process.

    A cell whose input is missing is told and left; the others are made. SIGTERM ends the worker,
    and inside a Slurm job that is running, not cancelled, sends the task back to the queue.

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
    command = [sys.executable, "-P", "-m", "sublim_plugin.study.worker"]
    command += [str(study_path), str(run_dir), *(cell.id for cell in ready)]
    made, stopped = _until_stopped(command)
    for cell in ready:
        say(f"{'done' if _done(cell, run_dir) else 'not done'}: {cell.kind} {cell.label}")
    if stopped:
        _back_to_the_queue(say)
        return 128 + signal.SIGTERM
    return max(code, made if made >= 0 else 1)


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
    return (cell.folder(run_dir) / MANIFEST_NAME).is_file()


def _until_stopped(command: Sequence[str]) -> tuple[int, bool]:
    """Run a worker, handing SIGTERM on; returns its code and whether there was a SIGTERM."""
    stopped = False
    child: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: Any) -> None:
        nonlocal stopped
        stopped = True
        if child is not None:
            child.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=environment, preexec_fn=die_with_parent()
        )
        if stopped:  # between the handler and the child
            child.terminate()
        return child.wait(), stopped
    finally:
        signal.signal(signal.SIGTERM, before)


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
        say("stopped")
        return
    say("stopped before its end; back to the queue")
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"scontrol requeue {job} refused: {done.stderr.strip()}")
