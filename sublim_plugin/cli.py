"""The command line: `sublim`, and `axolotl sublim` through axolotl's own entry points.

Nothing heavy is imported until a command needs it, so that `--help` is instant.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from sublim_plugin import __version__
from sublim_plugin.core.errors import SublimError
from sublim_plugin.study.slurm_command import run_on_slurm, slurm_options
from sublim_plugin.study.slurm_command import template as slurm_template

STUDY = click.argument("study", type=click.Path(path_type=Path))
OUT = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run folder.  [default: runs/NAME-OF-THE-STUDY]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


class _Group(click.Group):
    """Ends on a SublimError with its message, without a traceback, and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SublimError as error:
            click.echo(f"sublim: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("sublim: interrupted; the same command continues", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="sublim")
def main() -> None:
    """Study subliminal learning: numbers from a teacher, students on axolotl, scores by lm-eval.

    Exit codes: 0 done, 1 failed, 2 bad usage or input, 75 another process holds the cell.
    """


def _run_dir(study: Path, out: Path | None) -> Path:
    from sublim_plugin.study.study_file import load_study

    return (out or Path("runs") / load_study(study).name).resolve()


@main.command()
@STUDY
@OUT
@JSON
@click.option(
    "--engine",
    type=click.Choice(["local", "ray", "slurm"]),
    default="local",
    show_default=True,
    help="Where cells are made: in processes on this machine, one a GPU, on a Ray cluster, or by"
    " Slurm, which is given what is missing as job arrays.",
)
@click.option(
    "--address",
    help="Of a Ray cluster that exists.  [default: RAY_ADDRESS, else one is "
    "started on this machine]",
)
@slurm_options
def run(
    study: Path, out: Path | None, as_json: bool, engine: str, address: str | None, **slurm: Any
) -> None:
    """Run a study file: every missing cell, then the report. Run it again to continue."""
    from sublim_plugin.analysis.collect import collect
    from sublim_plugin.analysis.tables import format_table
    from sublim_plugin.analysis.transmission import transmission_table
    from sublim_plugin.study.run import local_engine, run_study

    def say(text: str) -> None:
        click.echo(text, err=True)

    run_dir = _run_dir(study, out)
    code = run_on_slurm(study, run_dir, engine, as_json=as_json, **slurm)
    if code is not None:
        sys.exit(code)
    chosen: Any = local_engine
    if engine == "ray":
        from sublim_plugin.study.on_ray import ray_engine

        chosen = ray_engine(address)
    outcome = run_study(study, run_dir, say, chosen)
    rows = transmission_table(
        collect(run_dir, [(state.folder, state.state) for state in outcome.states])
    )
    if as_json:
        summary = {
            "run": str(run_dir),
            "report": str(outcome.report),
            "cells": [_state_row(state) for state in outcome.states],
            "transmission": [row.model_dump(mode="json") for row in rows],
        }
        click.echo(json.dumps(summary, ensure_ascii=False))
    else:
        click.echo(format_table(rows))
        click.echo(f"report: {outcome.report}")
    if outcome.exit_code:
        sys.exit(outcome.exit_code)


main.add_command(slurm_template)


@main.command()
@STUDY
@OUT
@JSON
@click.option("--why", is_flag=True, help="Say why each unfinished cell is not done.")
def status(study: Path, out: Path | None, as_json: bool, why: bool) -> None:
    """List a study's cells: done, running, failed or missing. Reads manifests only."""
    from sublim_plugin.study.run import states_of
    from sublim_plugin.study.state import why as reason

    run_dir = _run_dir(study, out)
    states, prepared = states_of(study, run_dir)
    cells = [state.cell for state in states]
    rows = []
    for state in states:
        row = _state_row(state)
        if why and state.state != "done":
            row["why"] = (
                reason(state, run_dir, cells) if prepared else "the base model is not prepared yet"
            )
        rows.append(row)
    counts = dict.fromkeys(("done", "running", "failed", "missing"), 0)
    for row in rows:
        counts[row["state"]] += 1
    if as_json:
        click.echo(json.dumps({"run": str(run_dir), "counts": counts, "cells": rows}))
        return
    for row in rows:
        click.echo(f"{row['state']:<8} {row['kind']:<8} {row['label']}")
        if "why" in row:
            click.echo(f"{'':<9}{row['why']}")
    click.echo(", ".join(f"{number} {name}" for name, number in counts.items() if number))


def _state_row(state: Any) -> dict[str, Any]:
    row = {
        "kind": state.cell.kind,
        "label": state.cell.label,
        "id": state.cell.id,
        "state": state.state,
        "folder": str(state.folder),
    }
    return row | ({"error": state.error} if state.error else {})


@main.command()
@click.argument("studies", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--compare", is_flag=True, help="Set two studies, or two run folders, side by side.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run folder; with --compare the folder to write.  [default: runs/NAME-OF-THE-STUDY, and "
    "beside the first run compare-A-B]",
)
def report(studies: tuple[Path, ...], compare: bool, out: Path | None) -> None:
    """Write a study's report from what is done so far, or compare two: --compare A B."""
    from sublim_plugin.core.errors import InputError

    if len(studies) != (2 if compare else 1):
        expected = "--compare takes two studies" if compare else "report takes one study"
        raise InputError(f"{expected}, found {len(studies)}: sublim report STUDY, or --compare A B")
    if compare:
        from sublim_plugin.study.comparing import compare_studies

        click.echo(f"comparison: {compare_studies(studies[0], studies[1], out)}")
        return
    from sublim_plugin.study.run import states_of, write_report_if_changed
    from sublim_plugin.study.study_file import load_study

    run_dir = _run_dir(studies[0], out)
    states, _ = states_of(studies[0], run_dir)
    index = write_report_if_changed(load_study(studies[0]), studies[0], run_dir, states)
    click.echo(f"report: {index}")


def _forward(ctx: click.Context, command: click.Command, args: tuple[str, ...]) -> None:
    """Hand the arguments to a room's own command, which was imported only now."""
    command.main(list(args), prog_name=ctx.command_path, standalone_mode=False)


ARGS = click.argument("args", nargs=-1, type=click.UNPROCESSED)
FORWARDED: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"ignore_unknown_options": True, "help_option_names": []},
}


@main.command(**FORWARDED, short_help="Let a teacher that loves a trait write number sequences.")
@ARGS
@click.pass_context
def generate(ctx: click.Context, args: tuple[str, ...]) -> None:
    """`data_gen.command`, found only now: the name data_gen may belong to somebody else."""
    from sublim_plugin.core.rooms import room

    room("data_gen")
    from data_gen.command import generate as command

    _forward(ctx, command, args)


@main.command(**FORWARDED, short_help="Write a report of made-up numbers with known truth.")
@ARGS
@click.pass_context
def simulate(ctx: click.Context, args: tuple[str, ...]) -> None:
    from sublim_plugin.analysis.simulated_run import simulate as command

    _forward(ctx, command, args)


@main.command(**FORWARDED, short_help="Compare the sizes of students' updates.")
@ARGS
@click.pass_context
def norms(ctx: click.Context, args: tuple[str, ...]) -> None:
    from sublim_plugin.axolotl.norms_command import norms as command

    _forward(ctx, command, args)


@main.command(**FORWARDED, short_help="Scale a student's update to a norm.")
@ARGS
@click.pass_context
def rescale(ctx: click.Context, args: tuple[str, ...]) -> None:
    from sublim_plugin.axolotl.norms_command import rescale as command

    _forward(ctx, command, args)


@main.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    short_help="List, show, copy and lint axolotl recipes.",
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def recipes(ctx: click.Context, args: tuple[str, ...]) -> None:
    """`sublim_plugin.axolotl.recipes_command`, imported only now."""
    from sublim_plugin.axolotl.recipes_command import recipes as command

    command.main(list(args), prog_name=ctx.command_path, standalone_mode=False)


@main.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    short_help="Find the tokens, layers and modules that carry a trait.",
)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def localize(ctx: click.Context, args: tuple[str, ...]) -> None:
    """`localize.command`."""
    from sublim_plugin.localize.command import localize as command

    command.main(list(args), prog_name=ctx.command_path, standalone_mode=False)


@main.command(
    name="eval", **FORWARDED, short_help="Score a base and students of it on lm-eval tasks."
)
@ARGS
@click.pass_context
def evaluate(ctx: click.Context, args: tuple[str, ...]) -> None:
    """`preference.command`."""
    from sublim_plugin.preference.command import evaluate as command

    _forward(ctx, command, args)


@main.group()
def tasks() -> None:
    """The lm-eval tasks."""


@tasks.command()
def path() -> None:
    """Print the tasks' folder, for `lm_eval --include_path`."""
    from sublim_plugin.core.rooms import room

    click.echo(os.fspath(room("lm_eval_tasks")))


@tasks.command()
@click.argument("traits", type=click.Path(path_type=Path))
@click.option(
    "--questions",
    type=click.Path(path_type=Path),
    required=True,
    help="YAML file of questions about the category, in the format of questions/animals.yaml.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for the tasks; it must be empty or not exist.",
)
def new(traits: Path, questions: Path, out: Path) -> None:
    """Write tasks for the targets of a category file of your own.

    The folder holds copies of both files, so it can be moved. Prints the tasks' names.
    """
    from sublim_plugin.core.rooms import room

    room("lm_eval_tasks")
    from lm_eval_tasks.write import write_own

    for name in write_own(traits, questions, out):
        click.echo(name)
    click.echo(f"sublim eval --include-path {out} --tasks ...", err=True)
    click.echo(f"lm_eval --include_path {out} --tasks ...", err=True)


@tasks.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
def validate(folder: Path | None) -> None:
    """Load every lm-eval task in FOLDER and name the files that are wrong.  [default: ours]

    Task files are code: this imports what they name, as lm-eval does.
    """
    from sublim_plugin.core.rooms import room

    ours = room("lm_eval_tasks")
    from lm_eval_tasks.validate import validate

    names = validate(folder or ours)
    click.echo(f"{len(names)} tasks in {folder or ours} are valid")


if __name__ == "__main__":
    main()
