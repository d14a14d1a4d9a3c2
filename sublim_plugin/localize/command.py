"""`sublim localize`. Imports nothing heavy until it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", default="embedded:smollm2-135m-instruct", help="Base model: a folder.")
@click.option(
    "--student",
    required=True,
    type=FOLDER,
    help="Folder of an adapter, a checkpoint, or a study's student.",
)
@click.option("--trait", required=True, help="A target such as animals/cat.")
@click.option(
    "--context",
    default="template_default",
    help="template_default, empty, none, a named text such as qwen, or text=YOUR TEXT.",
)
@click.option("--gates", type=FILE, help="YAML file of gates.  [default: the sweep]")
@click.option("--out", required=True, type=FOLDER, help="Folder of the results.")
@click.option("--measures", default="logprob", help="logprob, sampled, or both: logprob,sampled.")
@click.option(
    "--parts",
    help="What the sweep covers: span,token,layers,module,cell, or none.  [default: all five]",
)
@click.option("--bands", type=int, help="Bands that the layers are cut into.  [default: 6]")
@click.option(
    "--candidates",
    type=click.Choice(["target", "all"]),
    default="target",
    help="all: score every candidate of the category under every gate.",
)
@click.option("--questions", help="A question set of your own.  [default: the trait's category]")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first questions.")
@click.option("--replies", default=100, help="sampled: replies to each question.")
@click.option("--max-new-tokens", default=50, help="sampled: budget of a reply.")
@click.option("--seed", default=1, help="sampled: seed of the replies.")
@click.option("--spectra", help="Score the top k singular directions and the rest: 1,2,4.")
@click.option(
    "--beside",
    type=FOLDER,
    multiple=True,
    help="A further student whose spectra are set beside; may be repeated.",
)
@click.option("--patch-into", help="Context of the base that activations are patched into.")
@click.option("--patch", type=FILE, help="YAML file of what is patched from where to where.")
@click.option("--divergence", type=FOLDER, help="Dataset made with --divergence.")
@click.option("--device", help="cpu, cuda, ...  [default: a GPU if there is one]")
@click.option("--dtype", default="auto")
@click.option(
    "--dry-run", is_flag=True, help="Show the spans and the gates; load no model and write nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
def localize(**given: Any) -> None:
    """Find the tokens, layers and modules in which a student carries a trait.

    Each part of the prompt and of the model is scored alone (sufficiency) and left out (necessity),
    against the base in the same context. The same command continues what was interrupted.
    """
    from sublim_plugin.core.base_models import resolve

    base = resolve(given["model"])
    spec = _spec(given)

    from sublim_plugin.localize.plan import plan
    from sublim_plugin.localize.run import localize_into
    from sublim_plugin.localize.tables import text

    def say(told: str) -> None:
        click.echo(told, err=given["as_json"])

    if given["dry_run"]:
        plan(base, given["student"], spec, given["dtype"], say)
        return
    found, files = localize_into(
        base,
        given["student"],
        spec,
        given["out"],
        device=given["device"],
        dtype=given["dtype"],
        say=say,
        progress=sys.stderr.isatty(),
    )
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    if given["as_json"]:
        click.echo(json.dumps(found.model_dump(mode="json")))
        return
    click.echo(text(found))
    click.echo(f"results: {given['out'] / 'results.json'}")
    figures = [path.name for path in files if path.suffix == ".png"]
    click.echo(f"figures: {', '.join(figures) or 'none'}")


def _spec(given: dict[str, Any]) -> Any:
    """The spec of the options. Raises InputError that names the option and what it takes."""
    from pydantic import ValidationError

    from sublim_plugin.core.errors import InputError
    from sublim_plugin.core.strict_yaml import nearest
    from sublim_plugin.core.traits import get_trait
    from sublim_plugin.localize.plan import LocalizeSpec
    from sublim_plugin.localize.spec import PatchSpec, load_gates, load_patch
    from sublim_plugin.localize.sweep import KINDS

    for one, other in (("gates", "parts"), ("gates", "bands"), ("patch", "patch_into")):
        if given[one] is not None and given[other] is not None:
            raise InputError(f"--{one} and --{other.replace('_', '-')}: give one of the two")
    kinds: Any = KINDS if given["parts"] is None else given["parts"].split(",")
    kinds = [] if kinds == ["none"] else kinds
    patch = load_patch(given["patch"]) if given["patch"] else None
    if given["patch_into"]:
        patch = PatchSpec(recipient=_context(given["patch_into"]))
    measures = given["measures"].split(",")
    for option, values, known in (
        ("parts", kinds, KINDS),
        ("measures", measures, ("logprob", "sampled")),
    ):
        for value in values:
            if value not in known:
                raise InputError(f"--{option} {value}: not one{nearest(value, list(known))}")
    try:
        return LocalizeSpec(
            trait=given["trait"],
            context=_context(given["context"]),
            questions=given["questions"] or get_trait(given["trait"]).category,
            gates=load_gates(given["gates"]) if given["gates"] else (),
            kinds=kinds,
            measures=measures,
            spectra=given["spectra"].split(",") if given["spectra"] else (),
            beside=given["beside"],
            patch=patch,
            divergence=given["divergence"],
            **{
                key: given[key]
                for key in ("bands", "candidates", "limit", "replies", "max_new_tokens", "seed")
            },
        )
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise InputError("--beside sets spectra side by side: give --spectra too") from error
        option = str(first["loc"][0]).replace("_", "-")
        raise InputError(f"--{option} {first['input']}: {first['msg']}") from error


def _context(text: str) -> Any:
    from sublim_plugin.core.contexts import Context

    own = {"text": text.removeprefix("text=")} if text.startswith("text=") else text
    return Context.parse(own)
