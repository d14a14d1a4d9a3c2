"""`sublim norms` and `sublim rescale`."""

from __future__ import annotations

import json
from pathlib import Path

import click

BASE = click.option(
    "--base", help="The base model, for students without a receipt that names it: a folder."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=FOLDER)
@BASE
@JSON
def norms(folders: tuple[Path, ...], base: str | None, as_json: bool) -> None:
    """Compare students side by side: update norm, in total, relative to the base's weights, by
    module kind and by layer, and effective rank.

    FOLDERS are adapters, full checkpoints or a study's students. Says so where two hold the same
    weights.
    """
    from sublim_plugin.axolotl.compare import compare, equal_weights, tables

    students = compare(folders, base)
    if as_json:
        click.echo(json.dumps([student.model_dump(mode="json") for student in students]))
    else:
        click.echo(tables(students))
    for same in equal_weights(students):
        click.echo(
            f"sublim: warning: the weights of {', '.join(same)} are the same to the last bit; if "
            "they were to differ in a seed, it did not reach the training",
            err=True,
        )


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--to-norm", type=float, help="The Frobenius norm that the update shall have.")
@click.option("--to-norm-of", type=FOLDER, help="Another student, whose norm it shall have.")
@click.option("--out", required=True, type=FOLDER, help="Folder to write; it must not exist.")
@BASE
@JSON
def rescale(
    folder: Path,
    to_norm: float | None,
    to_norm_of: Path | None,
    out: Path,
    base: str | None,
    as_json: bool,
) -> None:
    """Scale a student's update, W - W_base, to a norm; write a normal adapter or checkpoint."""
    from sublim_plugin.axolotl.rescale import rescale as scaled

    target = to_norm_of if to_norm is None else to_norm
    if target is None or None not in (to_norm, to_norm_of):
        raise click.UsageError("give one of --to-norm and --to-norm-of")
    note = scaled(folder, out, to_norm=target, base=base)
    if as_json:
        click.echo(note.model_dump_json())
        return
    click.echo(
        f"{out}: update norm {note.from_norm:.6g} -> {note.to_norm:.6g} (x {note.factor:.6g})"
    )
    if note.rounded_norm is not None:
        click.echo(
            f"written in float32; rounded to the dtype of {folder}, the norm would be "
            f"{note.rounded_norm:.6g}"
        )
