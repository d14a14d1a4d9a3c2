"""What Slurm says: of this run's jobs in its queue, and of its limits."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sublim_plugin.core.errors import InputError, MissingDependencyError, RunError
from sublim_plugin.study import arrays

DEFAULT_ARRAY_SIZE = 1001
"""Slurm's own default of MaxArraySize, the number of tasks that an array can have."""
_TIMEOUT_S = 120.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Queue:
    """What Slurm has of this run: each cell's job, the number of tasks, the reports' jobs."""

    job_of: dict[str, str]
    tasks: int
    reports: list[str]


def queue_of(run_dir: Path, done: set[str], report: str, no_submit: bool) -> Queue:
    """What of this run is in the queue, by the names of its jobs."""
    files = {}
    for number in arrays.array_numbers(run_dir):
        file = arrays.read_array(run_dir, number)
        if any(cell not in done for task in file.tasks for cell in task):
            files[file.job_name] = file
    job_of: dict[str, str] = {}
    tasks, reports = 0, []
    if no_submit and shutil.which("squeue") is None:
        return Queue({}, 0, [])
    listed = ask(
        [
            "squeue",
            "--noheader",
            "--array",
            "--format=%F|%K|%j",
            f"--name={','.join([*files, report])}",
        ]
    )
    for line in listed.splitlines():
        job, index, name = line.strip().split("|")
        if name == report:
            reports.append(job)
        else:
            tasks += 1
            job_of |= dict.fromkeys(files[name].tasks[int(index)], job)
    return Queue(job_of, tasks, reports)


def longest_array(no_submit: bool, say: Say) -> int:
    if shutil.which("sbatch") is None:
        if no_submit:
            say(f"no Slurm on this machine: arrays of up to {DEFAULT_ARRAY_SIZE} tasks")
            return DEFAULT_ARRAY_SIZE
        raise MissingDependencyError(
            "sbatch: not found, so this machine is no login node of a Slurm cluster. Run the"
            " command on one, write the scripts only (--no-submit), or use --engine local"
        )
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"]), re.M)
    if found is None or int(found[1]) < 1:
        raise InputError("this Slurm allows no job arrays (MaxArraySize in `scontrol show config`)")
    return int(found[1])


def ask(command: Sequence[str], more: str = "") -> str:
    """Run one of Slurm's commands and return what it prints."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode("utf-8", "replace").strip()
        raise RunError(
            f"{command[0]} did not end within {_TIMEOUT_S:.0f} s ({said or 'it said nothing'})"
            f"{more}. The same command continues"
        ) from error
    if done.returncode:
        raise RunError(
            f"{command[0]} refused: {done.stderr.strip() or 'without a message'}{more}."
            " The same command continues"
        )
    return done.stdout
