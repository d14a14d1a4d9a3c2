"""What a dataset depends on. Planning code imports this; nothing here leads to torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_gen.parse import Mode
from data_gen.prompts import Pool, load_pool
from data_gen.teachers import Teacher
from sublim_plugin.core.traits import Trait
from sublim_plugin.decoding.sampler import Sampler

ConstraintName = Literal["numbers"]
SoftTargetsName = Literal["numbers", "vocabulary"]


class EngineSpec(BaseModel):
    """Which engine answers, and what of it decides the replies (see the engines' modules)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Literal["transformers", "vllm", "openai"] = Field(
        default="transformers", description="openai: a server with OpenAI's API."
    )
    url: str | None = Field(
        default=None, description="openai: where the server answers, with its /v1."
    )
    model: str | None = Field(default=None, description="openai: the model's name on the server.")
    api: Literal["completions", "chat"] = Field(
        default="completions",
        description="openai: completions takes the prompt that we rendered, chat messages only.",
    )
    sends: Literal["all", "openai"] = Field(
        default="all",
        description="openai: all settings (vLLM, SGLang), or only those of OpenAI's own API.",
    )
    prompt_as: Literal["ids", "text"] = Field(
        default="ids",
        description="openai completions: token ids, or text for servers that take no ids.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.name == "openai" and not (self.url and self.model):
            raise ValueError("the openai engine needs the server's URL and the model's name there")
        if self.name != "openai" and (self.url or self.model):
            raise ValueError(f"the {self.name} engine has no server; leave out its URL and model")
        return self

    def spec(self) -> dict[str, Any]:
        """What enters the dataset's id: all that the engine in question reads, but no URL."""
        if self.name != "openai":
            return {"name": self.name}
        return {key: getattr(self, key) for key in ("name", "model", "api", "sends", "prompt_as")}


class DatasetSettings(BaseModel):
    """Everything about a dataset but its base model and its teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    generation_seed: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=1)]
    sampler: Sampler
    constrain: ConstraintName | None = None
    parser: Mode = "strict"
    dedupe: bool = False
    """Whether a reply equal to an earlier accepted one is rejected."""
    held_out: Annotated[int, Field(ge=0)] = 0
    """Further rows in a file of their own, none of whose prompts is in the training rows."""
    divergence: bool = False
    """Whether the positions are marked where teacher and base disagree on the likeliest token."""
    soft_targets: SoftTargetsName | None = None
    """The teacher's log-probs beside the rows: over number tokens alone, or over all tokens."""
    engine: EngineSpec = EngineSpec()


def dataset_spec(
    settings: DatasetSettings,
    *,
    base_fingerprint: dict[str, Any],
    trait: Trait,
    teacher: Teacher,
    pool: Pool | None = None,
) -> dict[str, Any]:
    """Everything that a dataset's files depend on; its sha256 is the dataset's id."""
    chosen = settings.model_dump(mode="json", exclude={"engine"})
    if chosen["soft_targets"] is None:
        del chosen["soft_targets"]
    return {
        "base_model": {key: base_fingerprint[key] for key in ("name", "sha256")},
        "trait": trait.name,
        "teacher": teacher.spec(),
        **chosen,
        "engine": settings.engine.spec(),
        "prompts_sha256": (pool or load_pool()).sha256,
    }
