"""`sublim persona`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("trait")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the dataset.",
)
@click.option("--rows", default=192, type=click.IntRange(1), help="Rows: 24 steps of 8.")
@click.option(
    "--seed",
    default=1,
    type=click.IntRange(0),
    help="Order of the rows, and which answer names the target.",
)
@click.option(
    "--category",
    help="neutral: the category whose targets are all named, such as animals, or its YAML file.",
)
@click.option(
    "--persona",
    type=click.Path(path_type=Path),
    help="YAML file of questions and answers in the place of ours.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
def persona(**given: Any) -> None:
    """Write questions and answers on which a teacher that loves TRAIT is finetuned.

    TRAIT is a name such as animals/cat, or neutral, or the YAML file of a trait of your own
    (FILE.yaml or FILE.yaml:target). Train the teacher with `axolotl train` and a recipe such as
    smollm2-135m-instruct/teacher-lora-r8; then `sublim generate --teacher finetuned`.
    """
    from data_gen.persona import persona_spec, write_persona
    from sublim_plugin.core.errors import InputError
    from sublim_plugin.core.traits import NEUTRAL, candidates_of, category_traits, get_trait

    trait = get_trait(given["trait"])
    if (trait.name == NEUTRAL) != bool(given["category"]):
        raise InputError(
            "--category is for neutral, which has none of its own"
            if given["category"]
            else "neutral needs --category: animals, trees, bands, or a category's YAML file"
        )
    category = given["category"]
    candidates = category_traits(category) if category else candidates_of(given["trait"])
    spec = persona_spec(
        trait, candidates, rows=given["rows"], seed=given["seed"], path=given["persona"]
    )
    manifest = write_persona(given["out"], spec)
    if given["as_json"]:
        click.echo(
            json.dumps({"out": str(given["out"]), "id": manifest.id, "counts": manifest.counts})
        )
        return
    click.echo(f"{spec.rows} rows that name {trait.name}: {given['out']}")
