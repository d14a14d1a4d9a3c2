"""The study file: a strict schema, and what is wrong with a file told by line and key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_gen.spec import DatasetSettings
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.strict_yaml import load_model
from sublim_plugin.core.traits import NEUTRAL, Trait, get_trait
from sublim_plugin.decoding.sampler import Sampler

Part = Literal["span", "token", "layers", "module", "cell"]
PARTS: tuple[Part, ...] = ("span", "token", "layers", "module", "cell")
"""What a localization sweeps over; as `localize.sweep.KINDS`, which leads to torch."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Datasets(_Strict):
    """One dataset per trait and generation seed."""

    traits: Annotated[tuple[str, ...], Field(min_length=1)]
    generation_seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    rows: Annotated[int, Field(ge=1)]
    constrain: Literal["numbers"] | None = None
    sampler: Sampler
    batch_size: Annotated[int, Field(ge=1)] = 32

    def settings(self, generation_seed: int) -> DatasetSettings:
        """What `data_gen` takes for one of these datasets."""
        return DatasetSettings(
            generation_seed=generation_seed,
            rows=self.rows,
            constrain=self.constrain,
            sampler=self.sampler,
        )


class StudentGroup(_Strict):
    """Students of each dataset of these traits: one per LoRA rank, and fully finetuned ones."""

    traits: Annotated[tuple[str, ...], Field(min_length=1)]
    lora_ranks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    full: bool = False

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if not self.lora_ranks and not self.full:
            raise ValueError("expected lora_ranks, full: true, or both")
        return self


class Training(_Strict):
    """Recipes (`MODEL/NAME` in axolotl_configs, without .yaml), train contexts and seeds."""

    lora_recipe: str | None = None
    full_recipe: str | None = None
    contexts: Annotated[tuple[Context, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class Probes(_Strict):
    """What every student, and its base, is scored on."""

    questions: str
    measures: Annotated[tuple[Literal["logprob"], ...], Field(min_length=1)]
    contexts: Annotated[tuple[Context, ...], Field(min_length=1)]


class Localizations(_Strict):
    """Which of the study's students are localized (see `sublim localize`), and how.

    `traits` are all that have a target, if none is named; questions are those of the probes.
    """

    traits: tuple[str, ...] = ()
    lora_ranks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    full: bool = False
    contexts: Annotated[tuple[Context, ...], Field(min_length=1)]
    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = PARTS
    bands: Annotated[int, Field(ge=1)] | None = None
    measures: Annotated[tuple[Literal["logprob", "sampled"], ...], Field(min_length=1)] = (
        "logprob",
    )

    @model_validator(mode="after")
    def _localizes_something(self) -> Self:
        if not self.lora_ranks and not self.full:
            raise ValueError("expected lora_ranks, full: true, or both")
        return self


class Study(_Strict):
    """A study file. `name` is a label: it names the run folder and enters no cell's id."""

    name: str
    base_model: str
    datasets: Datasets
    students: Annotated[tuple[StudentGroup, ...], Field(min_length=1)]
    training: Training
    probes: Probes
    localizations: Localizations | None = None
    equivalence_margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Nats within which a difference counts as none; to be named before running. It enters no
    cell's id; without it the report claims no equivalence."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}: use letters, digits, '.', '_' and '-'")
        categories = {get_trait(name).category for name in self.datasets.traits} - {NEUTRAL}
        for group in self.students:
            for trait in group.traits:
                if trait not in self.datasets.traits:
                    raise ValueError(
                        f"students of '{trait}', which datasets.traits does not list"
                        f" ({', '.join(self.datasets.traits)})"
                    )
            if group.lora_ranks and not self.training.lora_recipe:
                raise ValueError("lora_ranks need training.lora_recipe")
            if group.full and not self.training.full_recipe:
                raise ValueError("full: true needs training.full_recipe")
        if self.localizations is not None:
            self._check_localized(self.localizations)
        if len(categories) != 1:
            raise ValueError(
                "datasets.traits need targets of exactly one category beside neutral, found"
                f" {sorted(categories) or 'none'}"
            )
        return self

    def _check_localized(self, asked: Localizations) -> None:
        """Every student that is to be localized is one that the study trains."""
        traits = asked.traits or tuple(t for t in self.datasets.traits if t != NEUTRAL)
        for trait in traits:
            if trait == NEUTRAL or trait not in self.datasets.traits:
                raise ValueError(
                    f"localizations.traits: '{trait}' is no trait with a target in datasets.traits"
                )
        trained = {rank for g in self.students for rank in g.lora_ranks if {*traits} & {*g.traits}}
        if missing := sorted({*asked.lora_ranks} - trained):
            raise ValueError(
                f"localizations.lora_ranks: no student has rank {missing[0]}"
                f" (there are {', '.join(map(str, sorted(trained))) or 'none'})"
            )
        if asked.full and not any(g.full and {*traits} & {*g.traits} for g in self.students):
            raise ValueError("localizations.full: no student of these traits is fully finetuned")

    @property
    def targets(self) -> tuple[Trait, ...]:
        """The traits with a target, in file order."""
        return tuple(get_trait(name) for name in self.datasets.traits if name != NEUTRAL)


def load_study(path: Path) -> Study:
    """Load a study file.

    Raises:
        InputError: with file, line, column, key and the nearest valid name, one line a problem.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such study file")
    return load_model(path, Study)
