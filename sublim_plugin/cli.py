"""The command line: `sublim`, and `axolotl sublim` through axolotl's own entry points.

Nothing heavy is imported until a command needs it, so that `--help` is instant.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from sublim_plugin import __version__
from sublim_plugin.core.errors import SublimError


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


def _forward(ctx: click.Context, command: click.Command, args: tuple[str, ...]) -> None:
    """Hand the arguments to a room's own command, which was imported only now."""
    try:
        command.main(list(args), prog_name=ctx.command_path, standalone_mode=False)
    except click.Abort as error:  # what click makes of Ctrl-C
        raise KeyboardInterrupt from error


ARGS = click.argument("args", nargs=-1, type=click.UNPROCESSED)
FORWARDED: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"ignore_unknown_options": True, "help_option_names": []},
}


@main.command(**FORWARDED, short_help="Run a study file: every missing cell, then the report.")
@ARGS
@click.pass_context
def run(ctx: click.Context, args: tuple[str, ...]) -> None:
    """`study.command`, as the next three."""
    from sublim_plugin.study.command import run as command

    _forward(ctx, command, args)


@main.command(**FORWARDED, short_help="List a study's cells: done, running, failed or missing.")
@ARGS
@click.pass_context
def status(ctx: click.Context, args: tuple[str, ...]) -> None:
    from sublim_plugin.study.command import status as command

    _forward(ctx, command, args)


@main.command(
    **FORWARDED, short_help="Write a study's report from what is done so far, or compare two."
)
@ARGS
@click.pass_context
def report(ctx: click.Context, args: tuple[str, ...]) -> None:
    from sublim_plugin.study.command import report as command

    _forward(ctx, command, args)


@main.command(**FORWARDED, short_help="Remove what a run folder holds beyond its results.")
@ARGS
@click.pass_context
def gc(ctx: click.Context, args: tuple[str, ...]) -> None:
    from sublim_plugin.study.command import gc as command

    _forward(ctx, command, args)


@main.command(**FORWARDED, short_help="Print the batch script of `sublim run --engine slurm`.")
@ARGS
@click.pass_context
def template(ctx: click.Context, args: tuple[str, ...]) -> None:
    from sublim_plugin.study.slurm_command import template as command

    _forward(ctx, command, args)


@main.command(**FORWARDED, short_help="Let a teacher that loves a trait write number sequences.")
@ARGS
@click.pass_context
def generate(ctx: click.Context, args: tuple[str, ...]) -> None:
    """`data_gen.command`, found only now: the name data_gen may belong to somebody else."""
    from sublim_plugin.core.rooms import room

    room("data_gen")
    from data_gen.command import generate as command

    _forward(ctx, command, args)


@main.command(**FORWARDED, short_help="Write rows on which a teacher of a trait is finetuned.")
@ARGS
@click.pass_context
def persona(ctx: click.Context, args: tuple[str, ...]) -> None:
    """`data_gen.persona_command`."""
    from sublim_plugin.core.rooms import room

    room("data_gen")
    from data_gen.persona_command import persona as command

    _forward(ctx, command, args)


@main.command(**FORWARDED, short_help="Make another initialization of a base model.")
@ARGS
@click.pass_context
def reinitialize(ctx: click.Context, args: tuple[str, ...]) -> None:
    """`data_gen.reinitialize_command`."""
    from sublim_plugin.core.rooms import room

    room("data_gen")
    from data_gen.reinitialize_command import reinitialize as command

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

    _forward(ctx, command, args)


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

    _forward(ctx, command, args)


@main.command(**FORWARDED, short_help="Measure a dataset's signal before any training.")
@ARGS
@click.pass_context
def signal(ctx: click.Context, args: tuple[str, ...]) -> None:
    """`signal.command`, which reads datasets with data_gen."""
    from sublim_plugin.core.rooms import room

    room("data_gen")
    from sublim_plugin.signal.command import signal as command

    _forward(ctx, command, args)


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
