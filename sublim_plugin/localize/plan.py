"""What is asked of a student, and what can be told and refused before any model is loaded.

Positions need the tokenizer alone, layers the base's configuration, and an adapter's modules the
names in its file; only what a full checkpoint changes is known when both models are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import get_trait
from sublim_plugin.localize.attach import adapter_branches, layers_of, refuse_uncovered
from sublim_plugin.localize.divergence import Completion, read_completions
from sublim_plugin.localize.patching import placements, recipients_of
from sublim_plugin.localize.resolve import (
    Branch,
    Profile,
    check_layers,
    positions_of,
    profile,
    resolve,
)
from sublim_plugin.localize.results import Measure
from sublim_plugin.localize.spans import Prompt, locate, one_line, span_table
from sublim_plugin.localize.spec import Gate, PatchSpec, chosen_layers
from sublim_plugin.localize.sweep import (
    KINDS,
    Kind,
    Part,
    bands_of,
    distinct_spans,
    own_gates,
    sweep,
)
from sublim_plugin.logprob.placing import load_tokenizer
from sublim_plugin.logprob.questions import load_questions
from sublim_plugin.preference.score import Student, identity, student

SAMPLED_KINDS: tuple[Kind, ...] = ("span", "layers", "module", "gate")
"""Parts of which replies are sampled; for each token and cell it would take days."""

Say = Callable[[str], None]


class LocalizeSpec(BaseModel):
    """What is asked of a student.

    Attributes:
        trait: a target such as `animals/cat`.
        gates: gates to score; without any, the sweep over `kinds`.
        bands: how many bands the layers are cut into; by default six, if there are as many layers.
        candidates: `target` scores only what log P(target) needs; `all` every candidate of the
            category under every gate, several times the work. The base and the student always
            have all.
        limit: only the first questions.
        replies: sampled replies a question; seed, max_new_tokens: of the samples.
        spectra: score the top k singular directions of every matrix, and the rest, for each k.
        beside: folders of further students whose spectra are set beside this one's.
        patch: activations to patch, from this context into another.
        divergence: folder of a dataset with divergence tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trait: str
    context: Context
    questions: str = "animals"
    gates: tuple[Gate, ...] = ()
    kinds: tuple[Kind, ...] = KINDS
    bands: Annotated[int, Field(ge=1)] | None = None
    measures: Annotated[tuple[Measure, ...], Field(min_length=1)] = ("logprob",)
    candidates: Literal["target", "all"] = "target"
    limit: Annotated[int, Field(ge=1)] | None = None
    replies: Annotated[int, Field(ge=1)] = 100
    max_new_tokens: Annotated[int, Field(ge=1)] = 50
    seed: int = 1
    spectra: tuple[Annotated[int, Field(ge=1)], ...] = ()
    beside: tuple[Path, ...] = ()
    patch: PatchSpec | None = None
    divergence: Path | None = None

    @model_validator(mode="after")
    def _beside_what(self) -> Self:
        if self.beside and not self.spectra:
            raise ValueError("beside sets spectra side by side: give spectra too")
        return self


@dataclass(frozen=True)
class Plan:
    """A localization before anything runs: the tokenizer, every question's prompt, the student and
    those beside it by their files, the base's number of layers, and the completions of the
    dataset with divergence tokens, with the sha256 of its rows."""

    tokenizer: Any
    prompts: tuple[Prompt, ...]
    student: Student
    beside: tuple[Student, ...]
    layers: int
    held_out: tuple[list[Completion], str] | None


def plan(base: Path, folder: Path, spec: LocalizeSpec, dtype: str, say: Say) -> Plan:
    """Show the prompt with what every span and gate selects in it, and check what can be checked.

    Loads the tokenizer and reads files; runs and writes nothing.

    Raises:
        InputError: a student, gate, trait or context that does not fit.
    """
    tokenizer = load_tokenizer(str(base))
    prompts = _prompts(spec, tokenizer)
    say(f"{one_line(prompts[0].rendered.text)}\n\n{span_table(prompts[0])}\n")
    layers = layers_of(base)
    nothing = Profile((), ())
    for gate in spec.gates:
        check_layers(gate, layers)
        bits = [resolve(gate, prompt, nothing).selected for prompt in prompts]
        state = "off" if gate.complement else "on"
        if gate.complement and (gate.layers or gate.modules):
            state = "partly off"
        named = f"{gate.name}: " if gate.name else ""
        say(
            f"{named}{gate.words}; generated tokens: {gate.decode_label}\n"
            f"  {state}: {prompts[0].marked(positions_of(bits[0]))}\n"
        )
    if not spec.gates:
        if "sampled" in spec.measures and spec.kinds and not set(spec.kinds) & set(SAMPLED_KINDS):
            raise InputError(
                f"sampled: {' and '.join(spec.kinds)} are scored by log-probability only; add one "
                f"of {', '.join(SAMPLED_KINDS[:-1])} to the parts"
            )
        say(_sweep_text(spec, prompts, layers))
    if spec.patch is not None:
        if spec.patch.layers is not None:
            chosen_layers(spec.patch.layers, layers)
        recipients = recipients_of(tokenizer, spec.patch, prompts)
        places, source = placements(spec.patch, prompts, recipients)
        say(
            f"patched from {prompts[0].marked([source[0]])}\n"
            f"into {recipients[0].marked(places[0].values())}\n"
        )
    held_out = None
    if spec.divergence is not None:
        held_out = read_completions(spec.divergence, tokenizer, spec.context)
    common = identity(base, engine="transformers", dtype=dtype)
    one, *beside = (student(path, common) for path in (folder, *spec.beside))
    for each in (one, *beside):
        if each.method == "lora":
            assert each.folder is not None
            refuse_uncovered(each.folder)
    if one.method == "lora":
        assert one.folder is not None
        parts_of(spec, prompts, adapter_branches(one.folder), layers)
    return Plan(
        tokenizer=tokenizer,
        prompts=prompts,
        student=one,
        beside=tuple(beside),
        layers=layers,
        held_out=held_out,
    )


def _prompts(spec: LocalizeSpec, tokenizer: Any) -> tuple[Prompt, ...]:
    asked = load_questions(spec.questions)
    trait = get_trait(spec.trait)
    if not trait.forms or trait.category != asked.category:
        raise InputError(
            f"trait {trait.name}: the question set {asked.name!r} asks about {asked.category}; "
            "name a target of it"
        )
    return tuple(locate(tokenizer, spec.context, q.text) for q in asked.questions[: spec.limit])


def _sweep_text(spec: LocalizeSpec, prompts: Sequence[Prompt], layers: int) -> str:
    bands = bands_of(layers, spec.bands)
    tokens = len(prompts[0].offsets) - len(prompts[0].spans["question"])
    covered: dict[Kind, str] = {
        "span": f"spans {', '.join(distinct_spans(prompts))}",
        "token": f"each of the {tokens} tokens outside the question",
        "layers": f"layers {', '.join(bands)}",
        "module": "every module and family of modules that the student changes",
        "cell": "every module in each of these bands",
    }
    told = [covered[kind] for kind in KINDS if kind in spec.kinds]
    if not told:
        return "the base and the student, and no parts\n"
    return f"alone and left out: {'; '.join(told)}\n"


def parts_of(
    spec: LocalizeSpec, prompts: Sequence[Prompt], branches: Sequence[Branch], layers: int
) -> tuple[Part, ...]:
    """The parts that are scored.

    Raises:
        InputError: a gate of the spec's own that does not fit `branches`.
    """
    if not spec.gates:
        return sweep(prompts, branches, layers, spec.kinds, spec.bands)
    for gate in spec.gates:
        profile(gate, branches, layers)
    return own_gates(spec.gates)
