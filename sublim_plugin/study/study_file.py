"""The study file: a strict schema, and what is wrong with a file told by line and key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from data_gen.parse import Mode
from data_gen.spec import DatasetSettings, EngineSpec
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.strict_yaml import load_model, nearest
from sublim_plugin.core.traits import NEUTRAL, Trait, get_trait
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.study.methods import Rank, Reference, Strict, StudentGroup
from sublim_plugin.study.selecting import MeasureName, Seed, Selector
from sublim_plugin.study.teaching import PROMPTED, Entry, check_teachers, names_of

__all__ = ["Study", "StudentGroup", "load_study"]

Part = Literal["span", "token", "layers", "module", "cell"]
PARTS: tuple[Part, ...] = ("span", "token", "layers", "module", "cell")
"""What a localization sweeps over; as `localize.sweep.KINDS`, which leads to torch."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Datasets(Strict):
    """One dataset per trait, generation seed and teacher."""

    traits: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="animals/cat, trees/oak, ... of one category, and neutral for the control."
    )
    generation_seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        description="One dataset each: the unit of replication."
    )
    teachers: Annotated[tuple[Entry, ...], Field(min_length=1)] = Field(
        default=(PROMPTED,),
        description=(
            "Who writes the numbers: prompted (the default), or mappings with kind finetuned, "
            "trained (by this study, on answers that name the trait), steered or student (students "
            "of this study)."
        ),
    )
    rows: Annotated[int, Field(ge=1)] = Field(description="Accepted rows of a dataset.")
    constrain: Literal["numbers"] | None = Field(
        default=None, description="numbers: sample only tokens that the parser can accept."
    )
    parser: Mode = Field(default="strict", description="Which replies are accepted.")
    dedupe: bool = Field(
        default=False, description="Whether a reply equal to an earlier one is rejected."
    )
    held_out: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Further rows in a file of their own, with prompts of their own."
    )
    divergence: bool = Field(
        default=False,
        description="Whether tokens are marked where teacher and base disagree on the likeliest.",
    )
    soft_targets: Literal["numbers", "vocabulary"] | None = Field(
        default=None,
        description="Students are trained on the teacher's log-probs at the completions' tokens, "
        "not on the sampled tokens: over number tokens alone (numbers), or over all tokens "
        "(vocabulary: a weaker claim). The transformers engine only. Left out: sampled tokens.",
    )
    engine: EngineSpec = Field(
        default=EngineSpec(), description="What writes the replies; transformers if left out."
    )
    prompts: Path | None = Field(
        default=None,
        description="Prompt pool: numbers (left out), one-number, or a YAML file of your own.",
    )
    sampler: Sampler = Field(description="How replies are sampled; nothing has a default.")
    batch_size: Annotated[int, Field(ge=1)] = Field(
        default=32, description="Replies under way at a time; no part of any id."
    )

    @model_validator(mode="after")
    def _engine_gives_targets(self) -> Self:
        if self.soft_targets and self.engine.name != "transformers":
            raise ValueError(
                f"soft_targets need the transformers engine; {self.engine.name} does not give the"
                " teacher's log-probs"
            )
        return self

    def settings(self, generation_seed: int) -> DatasetSettings:
        """What `data_gen` takes for one of these datasets."""
        shared = DatasetSettings.model_fields.keys() & type(self).model_fields.keys()
        return DatasetSettings(
            generation_seed=generation_seed, **{key: getattr(self, key) for key in shared}
        )


class Training(Strict):
    """Recipes, train contexts and training seeds."""

    lora_recipe: str | None = Field(
        default=None,
        description="MODEL/NAME of a LoRA recipe in axolotl_configs, without .yaml; rank, alpha "
        "and learning rate are set by `students`.",
    )
    full_recipe: str | None = Field(
        default=None, description="MODEL/NAME of a recipe for full finetuning in axolotl_configs."
    )
    contexts: Annotated[tuple[Context, ...], Field(min_length=1)] = Field(
        description="Contexts of the training prompts, one student each."
    )
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        description="Training seeds (LoRA's initialization, order of rows), one student each."
    )


class Probes(Strict):
    """What every student, and its base, is scored on."""

    questions: str = Field(
        description="A question set by name (animals, trees, bands), or a YAML file."
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Ask only the first questions of the set. Left out: all."
    )
    measures: Annotated[tuple[MeasureName, ...], Field(min_length=1)] = Field(
        description="logprob (no sampling noise), sampled (the share of replies), or both."
    )
    samples: Annotated[int, Field(ge=1)] = Field(
        default=100, description="Replies to each question, for the measure sampled."
    )
    contexts: Annotated[tuple[Context, ...], Field(min_length=1)] = Field(
        description="Eval contexts: each student and its base is asked in each of them."
    )


class Localizations(Strict):
    """Which of the study's students are localized (see `sublim localize`), and how.

    `traits` are all that have a target, if none is named; questions are those of the probes.
    """

    traits: tuple[str, ...] = Field(
        default=(), description="Traits of the students. Left out: all that have a target."
    )
    lora_ranks: tuple[Rank, ...] = Field(default=(), description="LoRA students of these ranks.")
    full: bool = Field(default=False, description="Whether fully finetuned students are localized.")
    contexts: Annotated[tuple[Context, ...], Field(min_length=1)] = Field(
        description="Eval contexts, one localization each."
    )
    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = Field(
        default=PARTS, description="What is switched on and off. Left out: all."
    )
    bands: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Number of bands of layers. Left out: each layer by itself."
    )
    measures: Annotated[tuple[MeasureName, ...], Field(min_length=1)] = Field(
        default=("logprob",), description="logprob, sampled (with probes.samples replies), or both."
    )

    @model_validator(mode="after")
    def _localizes_something(self) -> Self:
        if not self.lora_ranks and not self.full:
            raise ValueError("expected lora_ranks, full: true, or both")
        return self


class Signals(Strict):
    """Of which datasets the signal is measured (see `sublim signal`), in each train context.

    Those of the traits whose teacher began from the study's base model, without the shuffled ones;
    questions are those of the probes.
    """

    traits: tuple[str, ...] = Field(
        default=(), description="Traits of the datasets. Left out: all that have a target."
    )
    rows: Annotated[int, Field(ge=1)] = Field(
        default=64, description="Only the first rows of each dataset."
    )
    limit: Annotated[int, Field(ge=1)] = Field(
        default=8, description="Only the first questions of the set."
    )


class Study(Strict):
    """A study file. `name` is a label: it names the run folder and enters no cell's id."""

    name: str = Field(
        json_schema_extra={"pattern": f"^{_NAME.pattern}$"},
        description="A label: it names the run folder and enters no cell's id.",
    )
    base_model: str = Field(
        description="Teacher and student: a folder with weights, tokenizer and chat template, or "
        "embedded:smollm2-135m-instruct."
    )
    datasets: Datasets = Field(description="The number sequences that teachers write.")
    students: Annotated[tuple[StudentGroup, ...], Field(min_length=1)] = Field(
        description="Which students are trained on which datasets; the groups add up."
    )
    training: Training = Field(description="How students are trained.")
    probes: Probes = Field(description="What every student, and its base, is asked.")
    localizations: Localizations | None = Field(
        default=None, description="Students whose trait is localized. Left out: none."
    )
    signals: Signals | None = Field(
        default=None,
        description="Datasets whose signal is measured without training, to be set against what "
        "their students took up. Left out: none.",
    )
    include: Annotated[tuple[Selector, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="Keep only what agrees with one of these entries, on the axes that a cell has: "
        "{rank: 8} keeps all datasets and the base's probes, and of the students those of rank 8.",
    )
    exclude: tuple[Selector, ...] = Field(
        default=(),
        description="Drop every cell that has all keys of an entry and agrees with them: "
        "{rank: 512, eval_context: none} drops these probes and no student.",
    )
    equivalence_margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Nats within which a difference counts as none; to be named before running. It "
        "enters no cell's id; without it the report claims no equivalence.",
    )

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}: use letters, digits, '.', '_' and '-'")
        for name in self.datasets.traits:
            if get_trait(name).name != name:
                raise ValueError(
                    f"datasets.traits: '{name}' is a file; a study takes the traits that sublim has"
                )
        categories = {get_trait(name).category for name in self.datasets.traits} - {NEUTRAL}
        check_teachers(self.datasets.teachers, self.datasets.traits)
        for group in self.students:
            self._check_group(group)
        if self.localizations is not None:
            self._check_localized(self.localizations)
        self._targets_of("signals", self.signals)
        if len(categories) != 1:
            raise ValueError(
                "datasets.traits need targets of exactly one category beside neutral, found"
                f" {sorted(categories) or 'none'}"
            )
        return self

    def _check_group(self, group: StudentGroup) -> None:
        for trait in group.traits:
            if trait not in self.datasets.traits:
                raise ValueError(
                    f"students of '{trait}', which datasets.traits does not list"
                    f" ({', '.join(self.datasets.traits)})"
                )
        teachers = names_of(self.datasets.teachers)
        for name in group.teachers:
            if name not in teachers:
                raise ValueError(
                    f"students of the teacher '{name}', which datasets.teachers does not have"
                    f"{nearest(name, teachers)}"
                )
        if group.lora_ranks and not self.training.lora_recipe:
            raise ValueError("lora_ranks need training.lora_recipe")
        if group.full is None:
            return
        if not self.training.full_recipe:
            raise ValueError("full: true needs training.full_recipe")
        for reference in (*group.full.norm_matched_to, *group.full.loss_matched_to):
            for trait in group.traits:
                self._check_reference(reference, trait)

    def _check_reference(self, reference: Reference, trait: str) -> None:
        ranks = {rank for g in self.students if trait in g.traits for rank in g.lora_ranks}
        if reference.lora_rank not in ranks:
            raise ValueError(
                f"a full student of {trait} cannot be matched to {reference}: there is no such"
                f" student (LoRA ranks of {trait}: {', '.join(map(str, sorted(ranks))) or 'none'})"
            )

    def _check_localized(self, asked: Localizations) -> None:
        """Every student that is to be localized is one that the study trains."""
        traits = self._targets_of("localizations", asked)
        trained = {rank for g in self.students for rank in g.lora_ranks if {*traits} & {*g.traits}}
        if missing := sorted({*asked.lora_ranks} - trained):
            raise ValueError(
                f"localizations.lora_ranks: no student has rank {missing[0]}"
                f" (there are {', '.join(map(str, sorted(trained))) or 'none'})"
            )
        if asked.full and not any(
            g.full is not None and {*traits} & {*g.traits} for g in self.students
        ):
            raise ValueError("localizations.full: no student of these traits is fully finetuned")

    def _targets_of(self, key: str, asked: Localizations | Signals | None) -> tuple[str, ...]:
        """The traits that an entry names, or all; each of the datasets and with a target."""
        named = asked.traits if asked is not None else ()
        for trait in named:
            if trait == NEUTRAL or trait not in self.datasets.traits:
                raise ValueError(
                    f"{key}.traits: '{trait}' is no trait with a target in datasets.traits"
                )
        return named or tuple(t for t in self.datasets.traits if t != NEUTRAL)

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
