"""The `sublim:` block of an axolotl YAML; docs/plugin.md explains every key with an example."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.strict_yaml import validate

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ProbeBlock(BaseModel):
    """`sublim.probe`: measure the trait while training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contexts: Annotated[tuple[Context, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Contexts to ask in. Left out: `sublim.context`, else template_default.",
    )
    questions: str | None = Field(
        default=None,
        description="A question set by name, or the path of a YAML file. Left out: the category's.",
    )
    limit: Annotated[int, Field(ge=1)] = Field(
        default=10, description="How many questions to ask, from the first one on."
    )
    every: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description=(
            "Optimizer steps between two measurements; the first is before step 1, the last after "
            "training. Left out: eight a run, fewer where that would cost more than 4% of the "
            "training's time, judged by the first measurement and the first steps."
        ),
    )


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
    trait: str | None = Field(
        default=None,
        description=(
            "The trait that `guard` and `probe` are about: animals/cat, or file.yaml:target. Left "
            "out: the one in the dataset's manifest."
        ),
    )
    guard: bool = Field(
        default=False,
        description=(
            "Check the dataset before training: it has a manifest, its teacher's base model is the "
            "student's, and no row names the trait."
        ),
    )
    cross_model: bool = Field(
        default=False,
        description="With `guard`: allow a teacher of another base model than the student's.",
    )
    probe: ProbeBlock | None = Field(
        default=None, description="Measure the trait's log-probability during training."
    )
    stop_at_update_norm: PositiveFloat | None = Field(
        default=None, description="End the training when ||dW||_F reaches this."
    )
    match_update_norm: str | None = Field(
        default=None,
        description=(
            "End the training when ||dW||_F reaches that of another model, given by its folder or "
            "its sublim_receipt.json."
        ),
    )
    stop_at_loss: PositiveFloat | None = Field(
        default=None,
        description="End the training when the mean of the last ten logged losses is this or less.",
    )
    soft_targets: bool = Field(
        default=False,
        description=(
            "Train on the teacher's log-probs that lie beside the rows (`sublim generate "
            "--soft-targets`), by KL(teacher || student), in the place of the sampled tokens."
        ),
    )
    effective_rank: bool | None = Field(
        default=None,
        description=(
            "Whether the receipt holds the effective rank of dW. Left out: for LoRA only, since a "
            "full update needs a singular value decomposition of every matrix."
        ),
    )

    @model_validator(mode="after")
    def _one_way_to_stop(self) -> Self:
        keys = ("stop_at_update_norm", "match_update_norm", "stop_at_loss")
        given = [key for key in keys if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other; keep one")
        if self.cross_model and not self.guard:
            raise ValueError("cross_model has no meaning without `guard: true`")
        return self


class SublimArgs(BaseModel):
    """Mixin that axolotl merges into its own config model."""

    sublim: SublimBlock | None = Field(default=None, description="Settings of the sublim plugin.")


def parse_block(raw: Any, source: str) -> SublimBlock:
    """Read the raw `sublim:` value of the YAML at `source`.

    Raises:
        InputError: a key is unknown (the nearest valid key is named) or a value does not fit.
    """
    return validate({"sublim": raw}, SublimArgs, source=source).sublim or SublimBlock()
