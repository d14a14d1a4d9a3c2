"""`sublim signal`. Imports nothing heavy until it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(file_okay=False, path_type=Path)
RESULTS = "signal.json"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("dataset", type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="Folder of the results.")
@click.option(
    "--model",
    default="embedded:smollm2-135m-instruct",
    help="Base model that the dataset was made from: a folder.",
)
@click.option(
    "--context",
    default="template_default",
    help="The student's: template_default, empty, none, a named text such as qwen, or text=YOUR "
    "TEXT.",
)
@click.option("--rows", default=64, type=click.IntRange(min=1), help="Only the first rows.")
@click.option("--trait", help="A target such as animals/cat.  [default: the dataset's]")
@click.option("--questions", help="A question set of your own.  [default: the trait's category]")
@click.option("--limit", default=8, type=click.IntRange(min=1), help="Only the first questions.")
@click.option(
    "--teacher-from",
    type=FOLDER,
    help="Folder of the finetuned teacher.  [default: the recorded one]",
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:1 or auto.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
def signal(**given: Any) -> None:
    """Measure what a student can learn from DATASET, a folder of `sublim generate`, untrained.

    How much likelier the rows are under the teacher than under the base, where in them that sits,
    and whether a step along them leads to the teacher and to the trait.
    """
    from sublim_plugin.core.base_models import resolve
    from sublim_plugin.core.contexts import Context
    from sublim_plugin.core.errors import InputError
    from sublim_plugin.core.manifest import read_manifest

    read_manifest(given["dataset"])
    out, dataset = given["out"], given["dataset"]
    if out.resolve() == dataset.resolve() or (out / "manifest.json").exists():
        raise InputError(
            f"--out {out}: holds a dataset or a study's cell; give a folder of its own"
        )
    base = resolve(given["model"])
    text = given["context"]
    own = {"text": text.removeprefix("text=")} if text.startswith("text=") else text
    context = Context.parse(own)

    from sublim_plugin.core.atomic import write_json
    from sublim_plugin.signal.figure import NAME, signal_figure
    from sublim_plugin.signal.measure import measure_signal
    from sublim_plugin.signal.tables import text as as_text

    found = measure_signal(
        dataset,
        base=base,
        context=context,
        progress=sys.stderr.isatty(),
        **{
            key: given[key]
            for key in ("rows", "trait", "questions", "limit", "teacher_from", "device")
        },
    )
    for name in (RESULTS, *(f"{NAME}.{kind}" for kind in ("png", "svg", "pdf", "csv"))):
        (out / name).unlink(missing_ok=True)
    write_json(out / RESULTS, found.model_dump(mode="json"))
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    if given["as_json"]:
        click.echo(json.dumps(found.model_dump(mode="json")))
    else:
        click.echo(as_text(found))
        click.echo(f"results: {out / RESULTS}")
    files = signal_figure(found, out)
    if files is not None and not given["as_json"]:
        click.echo(f"figure: {files.png}")
