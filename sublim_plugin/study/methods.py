"""How students are finetuned: LoRA ranks, schemes of alpha, learning rates, matched controls."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema

Rank = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_TIMES_RANK = re.compile(r"(?:(\d+(?:\.\d+)?)\s*x\s*)?rank")


class Strict(BaseModel):
    """What study files are made of: immutable, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Alpha(Strict):
    """A scheme of alpha over rank: `rank`, `2 x rank`, a number at every rank, or one of these
    under `rslora`, which divides by sqrt(rank) in the place of rank (arXiv 2312.03732)."""

    times_rank: float | None = None
    fixed: int | None = None
    rslora: bool = False

    @model_validator(mode="before")
    @classmethod
    def _notation(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return value
        stabilized = isinstance(value, dict) and [*value] == ["rslora"]
        inner = value["rslora"] if stabilized else value
        if isinstance(inner, int) and not isinstance(inner, bool) and inner >= 1:
            return {"fixed": inner, "rslora": stabilized}
        found = _TIMES_RANK.fullmatch(inner.strip()) if isinstance(inner, str) else None
        if found is None or float(found[1] or 1) == 0:
            raise ValueError(
                f"{value!r} is no scheme of alpha; write rank, '2 x rank', a whole number, or"
                " {rslora: one of these}"
            )
        return {"times_rank": float(found[1] or 1), "rslora": stabilized}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        plain: list[dict[str, Any]] = [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": rf"^{_TIMES_RANK.pattern}$"},
        ]
        stabilized = {
            "type": "object",
            "properties": {
                "rslora": {"anyOf": plain, "description": "alpha, to be divided by sqrt(rank)."}
            },
            "required": ["rslora"],
            "additionalProperties": False,
        }
        return {"anyOf": [*plain, stabilized]}

    def at(self, rank: int) -> int | None:
        """alpha at a rank, None where it is no whole number."""
        if self.fixed is not None:
            return self.fixed
        value = (self.times_rank or 1) * rank
        return int(value) if value == int(value) and value >= 1 else None

    def __str__(self) -> str:
        times = "" if self.times_rank in (None, 1) else f"{self.times_rank:g} x "
        text = str(self.fixed) if self.fixed is not None else f"{times}rank"
        return f"{{rslora: {text}}}" if self.rslora else text


AS_RANK = Alpha.model_validate("rank")


class Reference(Strict):
    """The LoRA students of a rank, or those of them with this alpha or learning rate."""

    lora_rank: Rank = Field(description="Rank of the LoRA student.")
    alpha: Alpha | None = Field(
        default=None, description="Its alpha, where the study has several at this rank."
    )
    learning_rate: Rate | None = Field(
        default=None, description="Its learning rate, where the study has several at this rank."
    )

    @model_validator(mode="before")
    @classmethod
    def _rank_alone(cls, value: Any) -> Any:
        plain = isinstance(value, int) and not isinstance(value, bool)
        return {"lora_rank": value} if plain else value

    def fits(self, spec: dict[str, Any]) -> bool:
        """Whether a student's spec is one of them."""
        method = spec["method"]
        return bool(
            method.get("rank") == self.lora_rank
            and (self.alpha is None or has_alpha(spec, self.alpha))
            and self.learning_rate in (None, spec["recipe"].get("learning_rate"))
        )

    def __str__(self) -> str:
        more = [f"alpha {self.alpha}"] if self.alpha is not None else []
        more += [f"learning rate {self.learning_rate:g}"] if self.learning_rate else []
        return ", ".join([f"LoRA rank {self.lora_rank}", *more])


def has_alpha(spec: dict[str, Any], alpha: Alpha) -> bool:
    """Whether a LoRA student's spec has the alpha that this scheme gives at its rank."""
    rank: int = spec["method"]["rank"]
    stabilized = bool(spec["recipe"].get("peft_use_rslora"))
    own: int = spec["method"]["alpha"]
    return alpha.at(rank) == own and alpha.rslora == stabilized


References = tuple[
    Annotated[
        Reference,
        Field(description="A rank, or {lora_rank, alpha, learning_rate} to choose among several."),
    ],
    ...,
]


class FullStudents(Strict):
    """Fully finetuned students: plain, and stopped where a LoRA student of the same dataset, train
    context and training seed ended."""

    plain: bool = Field(
        default=True, description="Whether there is a student that trains for the whole recipe."
    )
    learning_rates: tuple[Rate, ...] = Field(
        default=(), description="One student each. Left out: the recipe's own rate."
    )
    norm_matched_to: References = Field(
        default=(),
        description=(
            "Ranks. For each LoRA student of such a rank, a full one whose training ends at the "
            "same update norm."
        ),
    )
    loss_matched_to: References = Field(
        default=(),
        description=(
            "Ranks. For each LoRA student of such a rank, a full one whose training ends at the "
            "same training loss, the mean of the last ten logged ones."
        ),
    )

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not (self.plain or self.norm_matched_to or self.loss_matched_to):
            raise ValueError(
                "plain is false and nothing is matched, so no student is fully finetuned; leave"
                " `full` out"
            )
        return self


def _full(value: Any) -> Any:
    if isinstance(value, bool):
        return FullStudents() if value else None
    return value


Full = Annotated[FullStudents | None, BeforeValidator(_full)]


class StudentGroup(Strict):
    """Students of each dataset of these traits: LoRA ranks x alphas x learning rates, and fully
    finetuned ones."""

    traits: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="Traits, out of datasets.traits, whose datasets these students train on."
    )
    teachers: tuple[str, ...] = Field(
        default=(),
        description=(
            "Names of the teachers whose datasets these students train on. Left out: all teachers."
        ),
    )
    shuffled: bool = Field(
        default=False,
        description="A control: these students train on the datasets with the numbers of all "
        "replies permuted among the rows, and on nothing else.",
    )
    lora_ranks: tuple[Rank, ...] = Field(default=(), description="LoRA ranks, one student each.")
    alphas: Annotated[tuple[Alpha, ...], Field(min_length=1)] = Field(
        default=(AS_RANK,),
        description=(
            "Schemes of alpha, one student each: rank (alpha = rank, scaling 1, the default), "
            "'2 x rank', a number for all ranks, or {rslora: 8} for alpha / sqrt(rank)."
        ),
    )
    learning_rates: tuple[Rate, ...] = Field(
        default=(),
        description="Learning rates of the LoRA students, one student each. Left out: the "
        "recipe's own rate.",
    )
    full: Full = Field(
        default=None,
        description="Full finetuning: true, or a mapping with learning rates and matched controls.",
    )

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not self.lora_ranks and self.full is None:
            raise ValueError("expected lora_ranks, full: true, or both")
        if not self.lora_ranks and (self.learning_rates or self.alphas != (AS_RANK,)):
            raise ValueError(
                "alphas and learning_rates are those of LoRA; give lora_ranks too, or write the"
                " rates under full: {learning_rates: [...]}"
            )
        for alpha in self.alphas:
            for rank in self.lora_ranks:
                if alpha.at(rank) is None:
                    raise ValueError(f"alpha {alpha} is no whole number at rank {rank}")
        return self


class Arm(NamedTuple):
    """One way to finetune: what a student's spec says of it, and what it overrides in the recipe.

    `matched` is the kind of match and the LoRA students that are matched.
    """

    method: dict[str, Any]
    overrides: dict[str, Any]
    matched: tuple[str, Reference] | None = None

    @property
    def is_lora(self) -> bool:
        return bool(self.method["kind"] == "lora")


NORM, LOSS = "update_norm_of", "loss_of"
"""Keys of a matched student's spec, under `matched`; their value is the other student's id."""


def arms(group: StudentGroup) -> Iterator[Arm]:
    """The ways of a group, LoRA first and matched ones last."""
    for rank in group.lora_ranks:
        for alpha in group.alphas:
            method = {"kind": "lora", "rank": rank, "alpha": alpha.at(rank)}
            overrides = {"lora_r": rank, "lora_alpha": alpha.at(rank)}
            if alpha.rslora:
                overrides["peft_use_rslora"] = True
            for rate in _rates(group.learning_rates):
                yield Arm(method, overrides | rate)
    if group.full is None:
        return
    if group.full.plain:
        for rate in _rates(group.full.learning_rates):
            yield Arm({"kind": "full"}, rate)
    for kind, references in (
        (NORM, group.full.norm_matched_to),
        (LOSS, group.full.loss_matched_to),
    ):
        for reference in references:
            for rate in _rates(group.full.learning_rates):
                yield Arm({"kind": "full"}, rate, (kind, reference))


def _rates(rates: tuple[float, ...]) -> list[dict[str, Any]]:
    return [{"learning_rate": rate} for rate in rates] or [{}]


def overrides_of(spec: dict[str, Any]) -> dict[str, Any]:
    """What a student's spec overrides in its recipe; the inverse of `arms`."""
    method, recipe = spec["method"], spec["recipe"]
    found = {"learning_rate": recipe["learning_rate"]} if "learning_rate" in recipe else {}
    if method["kind"] == "lora":
        found |= {"lora_r": method["rank"], "lora_alpha": method["alpha"]}
        if recipe.get("peft_use_rslora"):
            found["peft_use_rslora"] = True
    return found
