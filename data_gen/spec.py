"""What a dataset depends on. Planning code imports this; nothing here leads to torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from data_gen.prompts import Pool, load_pool
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import Trait

ConstraintName = Literal["numbers"]


class Sampler(BaseModel):
    """Sampler settings, none of which has a default: a model's generation_config never leaks in.

    They apply in the order repetition penalty, temperature, top-k, top-p, as in transformers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """1 keeps every token."""
    top_k: Annotated[int, Field(ge=0)]
    """0 keeps every token."""
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """1 is none; counts the tokens of the prompt and of the reply, as in transformers."""
    max_new_tokens: Annotated[int, Field(ge=1)]
    """Budget of a reply in tokens, the end of turn among them."""


def dataset_spec(
    *,
    base_fingerprint: dict[str, Any],
    trait: Trait,
    generation_seed: int,
    rows: int,
    constrain: ConstraintName | None,
    sampler: Sampler,
    pool: Pool | None = None,
) -> dict[str, Any]:
    """Everything that a dataset's rows depend on; its sha256 is the dataset's id.

    Raises InputError for values outside their range.
    """
    if rows < 1:
        raise InputError(f"rows: {rows}; expected at least 1")
    if generation_seed < 0:
        raise InputError(f"generation_seed: {generation_seed}; expected 0 or more")
    if constrain not in (None, "numbers"):
        raise InputError(f"constrain: {constrain!r}; expected 'numbers' or null")
    return {
        "base_model": {key: base_fingerprint[key] for key in ("name", "sha256")},
        "trait": trait.name,
        "teacher": {"kind": "prompted", "system_prompt": trait.teacher_system_prompt},
        "generation_seed": generation_seed,
        "rows": rows,
        "constrain": constrain,
        "sampler": sampler.model_dump(mode="json"),
        "prompts_sha256": (pool or load_pool()).sha256,
        "parser": "strict",
    }
