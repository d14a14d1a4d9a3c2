"""`sublim eval`. Imports nothing heavy until it runs."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(
    name="eval", context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.option("--model", default="embedded:smollm2-135m-instruct", help="Base model: a folder.")
@click.option(
    "--adapters",
    multiple=True,
    type=FOLDER,
    help="Folder of an adapter, a checkpoint, or a study's student; may be given several times.",
)
@click.argument("more", nargs=-1, type=FOLDER)
@click.option("--tasks", required=True, help="lm-eval tasks of ours, or tags, with commas between.")
@click.option(
    "--contexts",
    help="Contexts to ask each task in, with commas between: template_default, empty, none, a "
    "named text such as claude, or a YAML file.  [default: each task's own]",
)
@click.option("--questions", help="A question set of your own: a YAML file.")
@click.option(
    "--include-path",
    type=FOLDER,
    help="Folder of tasks that `sublim tasks new` wrote. Task files are code.",
)
@click.option("--out", default="scores", type=FOLDER, help="Folder of the results.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first questions.")
@click.option("--seed", default=1, help="Seed of sampled replies.")
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    help="vllm: sampled tasks only, all adapters in one engine.",
)
@click.option("--device", help="cpu, cuda, ...  [default: a GPU if there is one]")
@click.option("--dtype", default="auto")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
def evaluate(as_json: bool, **given: Any) -> None:
    """Score the base and students of it on lm-eval tasks; what is computed is never computed again.

    MORE are further folders after --adapters: --adapters A B C.
    """
    no_host_bars()

    from sublim_plugin.preference.rows import table
    from sublim_plugin.preference.score import Unfinished, score_students

    failure = None
    try:
        with _quiet_hosts():
            rows = score_students(
                base=given.pop("model"),
                adapters=[*given.pop("adapters"), *given.pop("more")],
                tasks=_words(given.pop("tasks")),
                contexts=_words(given.pop("contexts")),
                say=lambda line: click.echo(line, err=True),
                **given,
            )
    except Unfinished as error:
        failure, rows = error, error.rows
    if as_json:
        click.echo(json.dumps([row.model_dump(mode="json") for row in rows]))
    elif rows:
        click.echo(table(rows))
        click.echo(f"replies and scores of every question: {given['out']}/*/*/samples_*.jsonl")
    if failure is not None:
        raise failure


@contextmanager
def _quiet_hosts() -> Iterator[None]:
    """Without what PEFT's imports say of things that we never use, and without the tasks' notes,
    which the table has."""
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "lm_eval_tasks.task")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="bitsandbytes")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def no_host_bars() -> None:
    """Turn off the bars that the hosts draw without being asked; ours ask.

    tqdm reads its environment once, when it is imported, so nothing that is started later sees the
    variable.
    """
    given = os.environ.get("TQDM_DISABLE")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import tqdm  # noqa: F401

    if given is None:
        del os.environ["TQDM_DISABLE"]


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]
