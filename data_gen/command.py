"""`sublim generate`, which is also `python -m data_gen`. Imports nothing heavy until it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("trait")
@click.option("--out", required=True, type=FOLDER, help="Folder of the dataset.")
@click.option("--model", default="embedded:smollm2-135m-instruct", help="Base model: a folder.")
@click.option("--rows", default=10_000, help="Accepted rows to keep.")
@click.option("--seed", default=1, help="Generation seed.")
@click.option(
    "--teacher", type=click.Choice(["prompted", "finetuned", "steered"]), default="prompted"
)
@click.option(
    "--teacher-from",
    type=FILE,
    help="finetuned: folder of an adapter, a checkpoint, or a study's student. steered: a "
    "safetensors file with a vector layer.N for each layer, in place of the difference of means.",
)
@click.option("--layers", help="steered: layers to steer, counted from 0, such as 12,13.")
@click.option(
    "--contrast",
    help="steered: traits against which the vector is taken, in the place of no system prompt: "
    "names such as animals/owl with commas between, or 'category' for all others.",
)
@click.option("--strength", default=1.0, help="steered: factor of the vectors.")
@click.option(
    "--context",
    "context_name",
    type=click.Choice(["template_default", "empty", "none"]),
    help="Context in which a neutral, finetuned or steered teacher is asked.  [default: "
    "template_default]",
)
@click.option(
    "--prompts",
    type=FILE,
    help="Prompt pool: numbers, one-number, or a YAML file of yours. Left out: numbers.",
)
@click.option("--parser", type=click.Choice(["strict", "tolerant"]), default="strict")
@click.option("--constrain", type=click.Choice(["numbers"]), help="Sample only number tokens.")
@click.option("--dedupe", is_flag=True, help="Keep one of each reply.")
@click.option("--held-out", default=0, help="Further rows, in a file of their own.")
@click.option("--divergence", is_flag=True, help="Mark where teacher and base disagree.")
@click.option(
    "--soft-targets",
    type=click.Choice(["numbers", "vocabulary"]),
    help="Keep the teacher's log-probs at the completions' tokens, for students to be trained on: "
    "over number tokens alone, or over the whole vocabulary (a weaker claim).",
)
@click.option("--temperature", default=1.0, help="0 takes the most likely token.")
@click.option("--top-p", default=1.0)
@click.option("--top-k", default=0, help="0 keeps every token.")
@click.option("--repetition-penalty", default=1.0)
@click.option("--max-new-tokens", default=128)
@click.option(
    "--engine", type=click.Choice(["transformers", "vllm", "openai"]), default="transformers"
)
@click.option("--server", help="openai: URL with its /v1.")
@click.option("--server-model", help="openai: the model's name on the server.")
@click.option(
    "--api",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    help="openai: completions takes the prompt that we rendered, chat messages only.",
)
@click.option(
    "--sends",
    type=click.Choice(["all", "openai"]),
    default="all",
    help="openai: all settings (vLLM, SGLang), or only those of OpenAI's own API.",
)
@click.option(
    "--prompt-as",
    type=click.Choice(["ids", "text"]),
    default="ids",
    help="openai completions: token ids, or text for servers that take no ids.",
)
@click.option("--batch-size", default=64, help="Replies under way at a time.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1 or auto.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
def generate(**given: Any) -> None:
    """Let a teacher that loves TRAIT write number sequences.

    TRAIT is a name such as animals/cat, or neutral, or the YAML file of a trait of your own
    (FILE.yaml or FILE.yaml:target). The same command continues what was interrupted.
    """
    from data_gen.generate import generate_dataset
    from data_gen.prompts import load_pool
    from sublim_plugin.core.base_models import fingerprint, resolve
    from sublim_plugin.core.traits import get_trait

    trait = get_trait(given["trait"])
    settings = _settings(given)
    teacher = _teacher(given, trait)
    base = resolve(given["model"])
    manifest = generate_dataset(
        given["out"],
        base_model=base,
        base_fingerprint=fingerprint(base),
        trait=trait,
        teacher=teacher,
        settings=settings,
        batch_size=given["batch_size"],
        device=given["device"],
        progress=sys.stderr.isatty(),
        pool=load_pool(given["prompts"]) if given["prompts"] else None,
        label=f"{trait.name} g{settings.generation_seed}",
    )
    counts = manifest.counts
    for note in manifest.notes:
        click.echo(f"note: {note}", err=True)
    if given["as_json"]:
        click.echo(json.dumps({"out": str(given["out"]), "id": manifest.id, "counts": counts}))
        return
    for reason, number in counts["reasons"].items():
        click.echo(f"{number:>8} rejected: {reason}", err=True)
    click.echo(f"{counts['accepted']} rows kept of {counts['asked']} asked: {given['out']}")


def _settings(given: dict[str, Any]) -> Any:
    """The settings of a dataset. Raises InputError that names the option and what it takes."""
    from pydantic import ValidationError

    from data_gen.spec import DatasetSettings, EngineSpec
    from sublim_plugin.core.errors import InputError
    from sublim_plugin.decoding.sampler import Sampler

    try:
        return DatasetSettings(
            generation_seed=given["seed"],
            sampler=Sampler(**{key: given[key] for key in Sampler.model_fields}),
            engine=EngineSpec(
                name=given["engine"],
                url=given["server"],
                model=given["server_model"],
                **{key: given[key] for key in ("api", "sends", "prompt_as")},
            ),
            **{
                key: given[key]
                for key in (
                    "rows",
                    "constrain",
                    "parser",
                    "dedupe",
                    "held_out",
                    "divergence",
                    "soft_targets",
                )
            },
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][-1]) if first["loc"] else ""
        option = {"generation_seed": "seed", "url": "server", "model": "server-model"}.get(
            where, where.replace("_", "-")
        )
        named = f"--{option} {first['input']}: " if where else ""
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(named + message) from error


def _teacher(given: dict[str, Any], trait: Any) -> Any:
    """The teacher that the options describe. Raises InputError for those that do not fit."""
    from data_gen.teachers import finetuned, prompted, steered
    from sublim_plugin.core.contexts import Context
    from sublim_plugin.core.errors import InputError
    from sublim_plugin.core.traits import candidates_of, get_trait

    context = Context(kind=given["context_name"]) if given["context_name"] else None
    source, kind = given["teacher_from"], given["teacher"]
    for option in ("layers", "contrast"):
        if kind != "steered" and given[option]:
            raise InputError(f"--{option} is for --teacher steered")
    if kind == "prompted":
        if source:
            raise InputError("--teacher-from is for --teacher finetuned or steered")
        return prompted(trait, context)
    if kind == "finetuned":
        if not source:
            raise InputError(
                "--teacher finetuned needs --teacher-from: the folder of an adapter, of a "
                "checkpoint, or of a study's student"
            )
        return finetuned(source, context)
    try:
        layers = tuple(int(part) for part in (given["layers"] or "").split(",") if part)
    except ValueError as error:
        raise InputError(f"--layers {given['layers']}: expected numbers such as 12,13") from error
    named = given["contrast"] or ""
    contrast = (
        candidates_of(given["trait"])
        if named == "category"
        else [get_trait(name) for name in named.split(",") if name]
    )
    return steered(trait, layers, given["strength"], source, context, contrast)
