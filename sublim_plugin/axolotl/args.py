"""The `sublim:` block of an axolotl YAML."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.strict_yaml import validate


class SublimBlock(BaseModel):
    """What the plugin does beyond its receipt, which it always writes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: Context | None = Field(
        default=None,
        description=(
            "Context of the training prompts: template_default, empty, none or {text: ...}. "
            "The tokenized rows are compared with the context's own rendering before the first "
            "step, and a difference stops the run. Left out: nothing is compared."
        ),
    )
    data_seed: int | None = Field(
        default=None,
        description=(
            "Seed of the row order, apart from `seed` (LoRA's initialization). axolotl has no such "
            "key and drops a `data_seed` of its own. Left out: the order follows `seed`."
        ),
    )


class SublimArgs(BaseModel):
    """Mixin that axolotl merges into its own config model."""

    sublim: SublimBlock | None = Field(default=None, description="Settings of the sublim plugin.")


def parse_block(raw: Any, source: str) -> SublimBlock:
    """Read the raw `sublim:` value of the YAML at `source`.

    Raises:
        InputError: a key is unknown (the nearest valid key is named) or a value does not fit.
    """
    return validate({"sublim": raw}, SublimArgs, source=source).sublim or SublimBlock()
