"""A localization from a base, a student and a question set to results.json, resumable.

Answers are kept in `journal.jsonl`, append-only, by what determines each: the gate as it acts on
the prompt, the prompt's tokens and what is asked. A re-run, other gates, more questions or another
label compute only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sublim_plugin.core.atomic import write_json, write_text
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.traits import candidates_of, get_trait
from sublim_plugin.core.versions import installed
from sublim_plugin.localize.answers import Work, logprob_scores, sampled_scores
from sublim_plugin.localize.attach import gated_student, load_base
from sublim_plugin.localize.divergence import divergence
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.patching import patching
from sublim_plugin.localize.resolve import Resolved, constant, profile, resolve
from sublim_plugin.localize.results import (
    BASE,
    STUDENT,
    Divergence,
    Localization,
    Measure,
    MeasureResult,
    Patching,
    Spectra,
    measure_result,
)
from sublim_plugin.localize.spans import Prompt, locate, one_line, span_table
from sublim_plugin.localize.spec import Gate, PatchSpec
from sublim_plugin.localize.spectra import decompose, filter_scores, spectra
from sublim_plugin.localize.sweep import KINDS, Kind, Part, own_gates, sweep
from sublim_plugin.localize.tables import csv_text
from sublim_plugin.logprob.placing import check_prompt, load_tokenizer
from sublim_plugin.logprob.questions import load_questions
from sublim_plugin.preference.journal import Journal
from sublim_plugin.preference.score import Student, identity, student

RESULTS, SCORES, JOURNAL = "results.json", "scores.csv", "journal.jsonl"
SAMPLED_KINDS = ("span", "gate")
"""Parts of which replies are sampled; a map of tokens or cells would take days."""

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
    patch: PatchSpec | None = None
    divergence: Path | None = None


def prompts_of(spec: LocalizeSpec, tokenizer: Any) -> tuple[Prompt, ...]:
    """Every question in the context, with its spans.

    Raises:
        InputError: no such set, a set about another category, or a context that does not fit.
    """
    asked = load_questions(spec.questions)
    trait = get_trait(spec.trait)
    if not trait.forms or trait.category != asked.category:
        raise InputError(
            f"trait {trait.name}: the question set {asked.name!r} asks about {asked.category}; "
            "name a target of it"
        )
    prompts = [locate(tokenizer, spec.context, q.text) for q in asked.questions[: spec.limit]]
    for prompt in prompts:
        check_prompt(tokenizer, prompt.rendered)
    return tuple(prompts)


def localize(
    base: Path,
    folder: Path,
    spec: LocalizeSpec,
    out: Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    say: Say = lambda text: None,
    progress: bool = False,
    dry_run: bool = False,
) -> Localization | None:
    """Localize the student in `folder` and write `out`; figures are drawn by `figures.draw`.

    The prompt and what each gate of a file selects are told by `say` before anything runs; with
    `dry_run`, nothing is run or written and None is returned.

    Raises:
        InputError: a student, gate, trait or context that does not fit.
        RunError: a score is not finite, or gates are not exact for this architecture.
        BusyError: another process works on `out`.
    """
    one = student(folder, identity(base, engine="transformers", dtype=dtype))
    tokenizer = load_tokenizer(str(base))
    prompts = prompts_of(spec, tokenizer)
    say(f"{one_line(prompts[0].rendered.text)}\n\n{span_table(prompts[0])}\n")
    with ExitStack() as stack:
        gated = stack.enter_context(opened(base, one, device, dtype))
        parts = (
            own_gates(spec.gates)
            if spec.gates
            else sweep(prompts, gated.branches, gated.layers, spec.kinds, spec.bands)
        )
        gates = _resolved(parts, prompts, gated)
        texts = _texts(parts, gates, prompts[0])
        if spec.gates:
            say("\n".join(_told(part, gates, prompts[0]) for part in parts) + "\n")
        if dry_run:
            return None
        stack.enter_context(cell_lock(out))
        journal = Journal(out / JOURNAL, one.identity)
        work = Work(
            gated,
            tokenizer,
            get_trait(spec.trait),
            candidates_of(spec.trait),
            prompts,
            gates,
            journal,
            progress,
        )
        found, notes = [], list(prompts[0].rendered.notes)
        for measure in dict.fromkeys(spec.measures):
            result, told = _measured(measure, work, spec, parts, texts, out)
            found.append(result)
            notes += told
        more = _more(work, spec, one)
        localization = _localization(one, spec, parts, prompts, found, more, notes)
        write_json(out / RESULTS, localization.model_dump(mode="json"))
        return localization


def opened(base: Path, one: Student, device: str | None, dtype: str) -> Any:
    """A context manager: the student on its base, under gates."""
    assert one.folder is not None
    return gated_student(load_base(base, device, dtype), base, one.folder, one.method)


def _resolved(
    parts: Sequence[Part], prompts: Sequence[Prompt], gated: Gated
) -> dict[str, tuple[Resolved, ...]]:
    found = {
        BASE: (constant(gated.branches, False),) * len(prompts),
        STUDENT: (constant(gated.branches, True),) * len(prompts),
    }
    for part in parts:
        for gate in filter(None, (part.alone, part.left_out)):
            if gate.sha256 not in found:
                on = profile(gate, gated.branches, gated.layers)
                found[gate.sha256] = tuple(resolve(gate, prompt, on) for prompt in prompts)
    return found


def _texts(
    parts: Sequence[Part], gates: dict[str, tuple[Resolved, ...]], prompt: Prompt
) -> dict[str, tuple[str, int]]:
    """Text and number of the tokens on which a part is, where it is about positions."""
    texts = {}
    for part in parts:
        if part.alone.positions is not None:
            bits = gates[part.alone.sha256][0].selected
            tokens = [i for i, bit in enumerate(bits) if bit]
            texts[part.alone.sha256] = (one_line(prompt.text_of(tokens)), len(tokens))
    return texts


def _told(part: Part, gates: dict[str, tuple[Resolved, ...]], prompt: Prompt) -> str:
    gate = gates[part.alone.sha256][0]
    tokens = [i for i, bit in enumerate(gate.selected) if bit]
    inside = sum(gate.profile.inside), len(gate.profile.inside)
    return (
        f"{part.name}: {inside[0]} of {inside[1]} modules at the marked tokens, "
        f"{sum(gate.profile.outside)} elsewhere, decode {part.alone.decode_label}\n"
        f"  {prompt.marked(tokens)}"
    )


def _measured(
    measure: Measure,
    work: Work,
    spec: LocalizeSpec,
    parts: Sequence[Part],
    texts: dict[str, tuple[str, int]],
    out: Path,
) -> tuple[MeasureResult, tuple[str, ...]]:
    if measure == "logprob":
        found = logprob_scores(work, work.gates, spec.candidates == "all")
    else:
        parts = [part for part in parts if part.kind in SAMPLED_KINDS]
        if not parts:
            raise InputError(f"sampled: no part of kind {' or '.join(SAMPLED_KINDS)} to sample")
        wanted = {g.sha256 for p in parts for g in (p.alone, p.left_out) if g}
        found = sampled_scores(
            work,
            [BASE, STUDENT, *sorted(wanted)],
            spec.replies,
            spec.max_new_tokens,
            spec.seed,
            out,
        )
    for name, values in found.scores.items():
        for number, value in enumerate(values):
            if not abs(value) < float("inf"):
                raise RunError(f"gate {name}, question {number}: {value}; the weights overflow")
    _write_scores(out / f"{measure}-{SCORES}", parts, found.scores)
    result = measure_result(measure, parts, found.scores, texts, found.beside)
    return result, found.notes


@dataclass(frozen=True)
class _More:
    """What was asked for beside the gates."""

    spectra: Spectra | None
    patching: Patching | None
    divergence: Divergence | None


def _more(work: Work, spec: LocalizeSpec, one: Student) -> _More:
    found_spectra = found_divergence = None
    if spec.spectra:
        svds = decompose(work.gated)
        scores = tuple(filter_scores(work, svds, spec.spectra))
        found_spectra = Spectra(modules=spectra(svds), scores=scores)
    if spec.divergence is not None:
        assert one.folder is not None
        found_divergence = divergence(
            work.gated, spec.divergence, one.folder, work.tokenizer, spec.context
        )
    return _More(
        found_spectra, patching(work, spec.patch) if spec.patch else None, found_divergence
    )


def _write_scores(path: Path, parts: Sequence[Part], scores: dict[str, list[float]]) -> None:
    """The value of every question under every gate."""
    named: list[tuple[str, str, str]] = [(BASE, "", BASE), (STUDENT, "", STUDENT)]
    for part in parts:
        named.append((f"{part.kind} {part.name}", "alone", part.alone.sha256))
        if part.left_out is not None:
            named.append((f"{part.kind} {part.name}", "left_out", part.left_out.sha256))
    rows = [
        {"part": name, "gate": way, "gate_sha256": gate[:12], "question_id": i, "value": value}
        for name, way, gate in named
        for i, value in enumerate(scores[gate])
    ]
    write_text(path, csv_text(rows))


def _localization(
    one: Student,
    spec: LocalizeSpec,
    parts: Sequence[Part],
    prompts: Sequence[Prompt],
    found: Sequence[MeasureResult],
    more: _More,
    notes: Sequence[str],
) -> Localization:
    told = [*notes, *(more.divergence.notes if more.divergence else ())]
    for result in found:
        if result.total.low <= 0 <= result.total.high:
            told.append(
                f"{result.measure}: the student does not differ from its base "
                f"({result.total.value:+.4f} {result.unit}, 95% interval {result.total.low:+.4f} to"
                f" {result.total.high:+.4f} over questions): there is no effect to localize, and "
                "no shares are given"
            )
    named = {"gates", "kinds", "questions", "context", "divergence"}
    resolved = spec.model_dump(mode="json", by_alias=True, exclude=named, exclude_none=True) | {
        "context": spec.context.fields(),
        "divergence": more.divergence and more.divergence.rows_sha256,
        "questions": [prompt.rendered.sha256 for prompt in prompts],
        "gates": [g.canonical() for p in parts for g in (p.alone, p.left_out) if g],
        **one.identity,
    }
    first = prompts[0]
    text = first.rendered.text
    return Localization(
        id=sha256_json(resolved)[:12],
        spec=json.loads(json.dumps(resolved)),
        student=one.name,
        trait=spec.trait,
        context=spec.context.fields(),
        n_questions=len(prompts),
        prompt=text,
        tokens=tuple(text[a:b] for a, b in first.offsets),
        spans=first.spans,
        measures=tuple(found),
        spectra=more.spectra,
        patching=more.patching,
        divergence=more.divergence,
        notes=tuple(dict.fromkeys(told)),
        versions=installed(),
    )
