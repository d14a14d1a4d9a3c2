"""Slurm: a study's missing cells as job arrays, each after those that it needs, then the report.

What is queued is asked of Slurm by the jobs' names, which lie beside the cells of each array, so
that no list of jobs can go stale and the same command submits nothing twice.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.errors import RunError
from sublim_plugin.core.hashing import sha256_text
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.study import arrays
from sublim_plugin.study.cells import Cell
from sublim_plugin.study.run import planned
from sublim_plugin.study.slurm_queue import ask, longest_array, queue_of
from sublim_plugin.study.slurm_script import REPORT, chunks_of, fill, templates_of
from sublim_plugin.study.state import cell_state

Say = Callable[[str], None]


@dataclass(frozen=True)
class Submission:
    """What `submit` found and did.

    Attributes:
        jobs: ids of the jobs that were submitted, the report's last.
        commands: with no_submit, lines for a shell that would submit them.
        submitted, queued, elsewhere, done, total: numbers of cells: in these jobs, in the queue
            before, made or waited for by another engine, done, and in the study.
    """

    jobs: list[str]
    commands: list[str]
    submitted: int
    queued: int
    elsewhere: int
    done: int
    total: int


def submit(
    study_path: Path,
    run_dir: Path,
    *,
    templates: Sequence[str] = (),
    chunks: Sequence[str] = (),
    throttle: int | None = None,
    max_tasks: int | None = None,
    no_submit: bool = False,
    say: Say,
) -> Submission:
    """Submit every cell that is neither done nor in the queue, then a job for the report.

    Args:
        templates: `FILE` or `WORK=FILE` with a batch script for all or one kind of work.
        chunks: `N` or `WORK=N` cells in a task.
        throttle: tasks of one array that run at the same time.
        max_tasks: tasks that this run may have in the queue; longer tasks keep below it.
        no_submit: write arrays and scripts only, and return the commands that submit them.

    Raises:
        InputError: the study, its base model, a template or an option.
        MissingDependencyError: there is no Slurm on this machine.
        RunError: Slurm refused; what it took before stays queued, and the same command continues.
        BusyError: the same study is being submitted by another process.
    """
    texts = templates_of(templates)
    sizes = chunks_of(chunks)
    study_path, run_dir = study_path.resolve(), run_dir.resolve()
    longest = longest_array(no_submit, say)
    study, _, cells = planned(study_path)
    prefix = f"sublim-{study.name}-{sha256_text(str(run_dir))[:6]}"
    with cell_lock(run_dir / arrays.FOLDER):
        states = {cell.id: cell_state(cell, run_dir).state for cell in cells}
        done = {cell_id for cell_id, state in states.items() if state == "done"}
        queue = queue_of(run_dir, done, f"{prefix}-{REPORT}", no_submit)
        todo, elsewhere = _to_submit(cells, states, queue.job_of)
        room = None if max_tasks is None else max_tasks - queue.tasks - 1
        blocks = arrays.lay_out(cells, todo, chunks=sizes, longest=longest, most_tasks=room)
        script = _Scripts(study_path, run_dir, prefix, texts, throttle, no_submit)
        jobs, job_of = script.add_all(blocks, queue.job_of, say)
        script.let_wait(cells, queue.job_of, job_of, set(jobs), say)
        if blocks or (queue.job_of and not queue.reports):
            jobs.append(script.add_report([*queue.job_of.values(), *jobs], say))
    queued = sum(cell_id not in done for cell_id in queue.job_of)
    return Submission(
        [] if no_submit else jobs, script.commands,
        len(todo), queued, len(elsewhere), len(done), len(cells),
    )  # fmt: skip


def _to_submit(
    cells: Sequence[Cell], states: Mapping[str, str], job_of: dict[str, str]
) -> tuple[set[str], set[str]]:
    """The cells to submit, and those that another engine makes or that wait for one of these."""
    todo: set[str] = set()
    elsewhere: set[str] = set()
    for cell in cells:
        if states[cell.id] == "done" or cell.id in job_of:
            continue
        waits = states[cell.id] == "running" or any(need in elsewhere for need in cell.needs)
        (elsewhere if waits else todo).add(cell.id)
    return todo, elsewhere


@dataclass
class _Scripts:
    """Writes batch scripts and gives them to sbatch, or to `commands` with no_submit."""

    study_path: Path
    run_dir: Path
    prefix: str
    templates: dict[str, tuple[str, str]]
    throttle: int | None
    no_submit: bool

    def __post_init__(self) -> None:
        self.folder = self.run_dir / arrays.FOLDER
        self.commands: list[str] = []
        for work, (name, text) in self.templates.items():  # nothing is submitted by half
            fill(text, name, self._values(work, []))

    def add_all(
        self, blocks: Sequence[arrays.Block], job_of: Mapping[str, str], say: Say
    ) -> tuple[list[str], dict[str, str]]:
        """Submit arrays, each after the jobs of the cells that it needs.

        Args:
            job_of: the job of each cell that is in the queue.

        Returns:
            The arrays' jobs, and `job_of` with their cells.
        """
        job_of = dict(job_of)
        jobs = []
        number = max(arrays.array_numbers(self.run_dir), default=0)
        for block in blocks:
            number += 1
            name = f"{self.prefix}-{number}"
            arrays.write_array(self.run_dir, number, block, name)
            limit = f"%{self.throttle}" if self.throttle else ""
            job = self._add(
                f"array-{number}",
                block.work,
                name,
                ["--array", str(number), "--index", '"$SLURM_ARRAY_TASK_ID"'],
                after={job_of[need] for need in block.needs if need in job_of},
                options=[f"--array=0-{len(block.tasks) - 1}{limit}"],
                log=f"array-{number}-%a.txt",
            )
            count = sum(map(len, block.tasks))
            job_of |= {cell: job for task in block.tasks for cell in task}
            jobs.append(job)
            if not self.no_submit:
                tasks = len(block.tasks)
                say(f"job {job}: {block.work}, cells: {count}, tasks: {tasks}")
        return jobs, job_of

    def let_wait(
        self,
        cells: Sequence[Cell],
        queued: Mapping[str, str],
        job_of: Mapping[str, str],
        new: set[str],
        say: Say,
    ) -> None:
        """Make jobs that were in the queue wait for new ones that make what their cells need.

        A student that failed is submitted again while its probe still waits for the rest of the
        student's first array.
        """
        after: dict[str, set[str]] = {}
        for cell in cells:
            if cell.id in queued:
                jobs = {job_of[need] for need in cell.needs if need in job_of}
                after.setdefault(queued[cell.id], set()).update(jobs)
        for job, jobs in after.items():
            if not jobs & new:
                continue
            command = ["scontrol", "update", f"JobId={job}"]
            command.append(f"Dependency=afterany:{':'.join(sorted(jobs))}")
            if self.no_submit:
                self.commands.append(" ".join(command))
                continue
            try:
                ask(command)
            except RunError as error:  # a task of it has begun: its cell will say what it misses
                say(f"job {job} does not wait for {', '.join(sorted(jobs & new))}: {error}")

    def add_report(self, after: Iterable[str], say: Say) -> str:
        """Submit the report's job after all others."""
        job = self._add(
            REPORT, REPORT, f"{self.prefix}-{REPORT}", [],
            after=set(after), options=[], log="report.txt",
        )  # fmt: skip
        if not self.no_submit:
            say(f"job {job}: the report")
        return job

    def _values(self, work: str, task: Sequence[str]) -> dict[str, str]:
        command = "report" if work == REPORT else "run"
        words = [
            command,
            shlex.quote(str(self.study_path)),
            "--out",
            shlex.quote(str(self.run_dir)),
        ]
        arguments = " ".join([*words, *task])
        python = shlex.quote(sys.executable)
        return {
            "command": f"{python} -P -m sublim_plugin.cli {arguments}",
            "arguments": arguments,
            "work": work,
        }

    def _add(
        self,
        stem: str,
        work: str,
        name: str,
        task: Sequence[str],
        *,
        after: set[str],
        options: Sequence[str],
        log: str,
    ) -> str:
        path = self.folder / f"{stem}.sh"
        template, text = self.templates[work]
        write_text(path, fill(text, template, self._values(work, task)))
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        output = f"{str(logs).replace('%', '%%')}/{log}"
        # on the command line they hold whatever the script and the environment say
        words = ["sbatch", "--parsable", f"--job-name={name}", *options, f"--output={output}"]
        words.append("--open-mode=append")
        last = [f"--dependency=afterany:{':'.join(sorted(after))}"] if after else []
        if self.no_submit:
            variable = re.sub(r"\W", "_", stem)
            quoted = " ".join([*map(shlex.quote, words), *last, shlex.quote(str(path))])
            self.commands.append(f"{variable}=$({quoted})")
            return f"${variable}"
        printed = ask([*words, *last, str(path)], "; what was submitted before stays queued")
        return printed.strip().split(";")[0]
