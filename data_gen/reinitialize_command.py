"""`sublim reinitialize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("base")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the new model.",
)
@click.option("--category", default="animals", help="Questions about it are half of the text.")
@click.option(
    "--noise", default=3.0, type=click.FloatRange(0, min_open=True), help="In std of each matrix."
)
@click.option("--seed", default=1, type=click.IntRange(0), help="Of noise and text.")
@click.option("--steps", default=60, type=click.IntRange(1), help="Of training back, 8 texts each.")
@click.option("--learning-rate", default=1e-3, type=click.FloatRange(0, min_open=True))
def reinitialize(**given: Any) -> None:
    """Make another initialization of the model BASE: noise on its weights, then trained back.

    BASE is a folder or embedded:smollm2-135m-instruct. A teacher that begins from the new model
    (`base_model` of a study's trained teacher) does not share its student's initialization: the
    control in which transmission must vanish.
    """
    from tqdm import tqdm

    from data_gen.reinitialize import reinitialize as make
    from sublim_plugin.core.base_models import resolve

    base = resolve(given.pop("base"))
    with tqdm(total=given["steps"], unit="step", file=sys.stderr) as bar:

        def tell(at: int, of: int, kl: float) -> None:
            bar.update(at - bar.n)
            bar.set_postfix_str(f"{kl:.2f} nats a token from the original")

        made = make(base, tell=tell, **given)
    click.echo(
        f"{given['out']}: {made['kl']:.2f} nats a token from the original"
        f" ({made['kl_drowned']:.2f} before it was trained back), cosine of the weights"
        f" {made['cosine']:.2f}"
    )
