"""`sublim recipes`: list, show, copy and lint axolotl configs."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click

from sublim_plugin.axolotl.recipe import recipe_path, recipes_root
from sublim_plugin.axolotl.recipe_table import PLACEHOLDER
from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.strict_yaml import load_yaml

RECIPE = click.argument("recipe", metavar="MODEL/NAME")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def recipes() -> None:
    """axolotl recipes of the experiment, and a linter for any axolotl YAML."""


@recipes.command(name="list")
@JSON
def list_recipes(as_json: bool) -> None:
    """List the recipes, as MODEL/NAME."""
    rows = [_row(path) for path in sorted(recipes_root().glob("*/*.yaml"), key=_order)]
    if as_json:
        click.echo(json.dumps(rows))
        return
    width = max(len(row["recipe"]) for row in rows)
    for row in rows:
        click.echo(f"{row['recipe']:<{width}}  {row['about']}")


def _order(path: Path) -> tuple[str, str, int]:
    kind, _, rank = path.stem.partition("-r")
    if rank.isdigit():
        return path.parent.name, kind, int(rank)
    return path.parent.name, path.stem, 0


def _row(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    settings = load_yaml(path)
    kind = "sweep" if "_" in settings else settings.get("adapter", "full")
    return {
        "recipe": f"{path.parent.name}/{path.stem}",
        "kind": kind,
        "runs": len(settings["_"]) if kind == "sweep" else 1,
        "about": text.splitlines()[0].removeprefix("# "),
        "path": str(path),
    }


@recipes.command()
@RECIPE
@JSON
def show(recipe: str, as_json: bool) -> None:
    """Print a recipe, with the source of each number beside it."""
    path = _path(recipe)
    if as_json:
        click.echo(json.dumps(load_yaml(path)))
    else:
        click.echo(path.read_text(encoding="utf-8"), nl=False)


@recipes.command()
@RECIPE
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--dataset",
    type=click.Path(path_type=Path),
    help="Dataset folder or rows file to write into the copy.",
)
def copy(recipe: str, dest: Path, dataset: Path | None) -> None:
    """Copy a recipe to DEST (a file, or an existing folder), ready to edit."""
    source = _path(recipe)
    target = dest / source.name if dest.is_dir() else dest
    if target.exists() or target.is_symlink():
        raise InputError(f"{target}: is there already; remove it, or copy to another name")
    text = source.read_text(encoding="utf-8")
    text = text.replace(f"axolotl_configs/{source.parent.name}/{source.name}", str(target))
    if dataset is not None:
        if PLACEHOLDER not in text:
            raise InputError(f"--dataset: {recipe} names no dataset; its header says which does")
        if not dataset.exists():
            raise InputError(f"--dataset {dataset}: no such file or folder")
        text = text.replace(PLACEHOLDER, json.dumps(str(dataset.resolve()), ensure_ascii=False))
    write_text(target, text)
    click.echo(str(target))
    if PLACEHOLDER in text:
        click.echo(f"set datasets[0].path in it, which is still {PLACEHOLDER}", err=True)


@recipes.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@JSON
def lint(files: tuple[Path, ...], as_json: bool) -> None:
    """Find what axolotl would let through in FILES: any axolotl YAMLs, or sweeps.

    Exit code 2 if there are errors. The plugins that a file lists are imported, as axolotl does.
    """
    # The hosts talk on stderr while they are imported.
    with contextlib.redirect_stderr(io.StringIO()):
        from sublim_plugin.axolotl import lint as linter

        findings = linter.lint(files)
    counts = Counter(finding.level for finding in findings)
    if as_json:
        click.echo(json.dumps([finding.model_dump() for finding in findings]))
    else:
        for finding in findings:
            click.echo(str(finding))
        said = [_number(counts[level], level) for level in ("error", "warning", "note")]
        click.echo(f"{_number(len(files), 'file')}: {', '.join(said)}", err=True)
    if counts["error"]:
        sys.exit(InputError.exit_code)


def _number(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def _path(recipe: str) -> Path:
    model, slash, name = recipe.partition("/")
    if not slash:
        raise InputError(f"'{recipe}': expected MODEL/NAME, as `sublim recipes list` prints them")
    return recipe_path(model, name.removesuffix(".yaml"))
