"""What `sublim run` takes for Slurm, and for one task of an array."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sublim_plugin.core.errors import InputError

_OPTIONS = (
    click.option(
        "--slurm-template",
        "templates",
        multiple=True,
        metavar="[WORK=]FILE",
        help="Slurm: batch script for all work, or for teacher, dataset, student, student-full,"
        " probe, localization, signal or report; may be repeated.  [default: `sublim template"
        " slurm`]",
    ),
    click.option(
        "--chunk",
        "chunks",
        multiple=True,
        metavar="[WORK=]N",
        help="Slurm: cells in one task; may be repeated.  [default: 8 probes, 4 signals, 1 of all"
        " else]",
    ),
    click.option(
        "--throttle",
        type=click.IntRange(min=1),
        help="Slurm: tasks of one array that run at the same time.",
    ),
    click.option(
        "--max-tasks",
        type=click.IntRange(min=1),
        help="Slurm: tasks of this study in the queue; tasks take more cells to keep below it.",
    ),
    click.option(
        "--no-submit",
        is_flag=True,
        help="Slurm: write the batch scripts, and print the commands that would submit them.",
    ),
    click.option(
        "--array", type=click.IntRange(min=1), help="With --index: make one task's cells."
    ),
    click.option("--index", type=click.IntRange(min=0), help="The task of --array to make."),
)


def slurm_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add Slurm's options to a click command, which hands them to `run_on_slurm`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run_on_slurm(
    study: Path,
    run_dir: Path,
    engine: str,
    *,
    as_json: bool,
    array: int | None,
    index: int | None,
    **options: Any,
) -> int | None:
    """Submit a study, or make one task's cells.

    Args:
        engine: what --engine says.
        options: templates, chunks, throttle, max_tasks, no_submit.

    Returns:
        The exit code; None where neither was asked for and the study is to be run here.

    Raises:
        InputError: options that do not go together; otherwise as `submit` and `run_index`.
    """

    def say(text: str) -> None:
        click.echo(text, err=True)

    if (array is None) != (index is None):
        raise InputError(
            "--array and --index go together: --array K --index N makes the cells of task N of"
            " slurm/array-K.json in the run folder, which --engine slurm writes"
        )
    given = [name for name, value in options.items() if value]
    if array is not None and index is not None:
        if given or engine == "slurm":
            raise InputError(
                "--array and --index make cells here; leave out what is for submitting"
            )
        from sublim_plugin.study.array_task import run_index

        return run_index(study, run_dir, array, index, say)
    if engine != "slurm":
        if given:
            flag = {"templates": "slurm-template", "chunks": "chunk"}.get(given[0], given[0])
            raise InputError(f"--{flag.replace('_', '-')} is for --engine slurm")
        return None
    from sublim_plugin.study.slurm import submit

    done = submit(study, run_dir, say=say, **options)
    if as_json:
        print(json.dumps({"run": str(run_dir), **vars(done)}))
        return 0
    for line in done.commands:
        print(line)
    word = "written, not submitted" if options["no_submit"] else "submitted"
    parts = [f"{done.total} cells", f"{done.done} done", f"{done.queued} in the queue before"]
    if done.elsewhere:
        parts.append(f"{done.elsewhere} made, or waited for, by another engine")
    say(", ".join([*parts, f"{done.submitted} {word}"]))
    if done.submitted == 0 and not done.queued:
        say(f"nothing to submit: sublim report {study} --out {run_dir}")
    return 0


@click.command()
@click.argument("engine", type=click.Choice(["slurm"]))
def template(engine: str) -> None:
    """Print the batch script of `sublim run --engine slurm`, to edit a copy of it."""
    from sublim_plugin.study.slurm_script import SHIPPED

    sys.stdout.write(SHIPPED.read_text(encoding="utf-8"))
