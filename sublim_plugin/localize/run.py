"""A localization from a base, a student and a question set to results.json, resumable.

Answers are kept in `journal.jsonl`, append-only, by what determines each: the gate as it acts on
the prompt, the prompt's tokens and what is asked. A re-run, other gates, more questions or another
label compute only what is missing. What else lies in the folder is of the last run alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sublim_plugin.core.errors import RunError
from sublim_plugin.core.hashing import canonical_json, sha256_json
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.traits import candidates_of, get_trait
from sublim_plugin.core.versions import installed
from sublim_plugin.localize.answers import (
    Found,
    Sampling,
    Work,
    logprob_scores,
    sampled_scores,
)
from sublim_plugin.localize.attach import gated_student, load_base
from sublim_plugin.localize.divergence import divergence
from sublim_plugin.localize.figures import draw
from sublim_plugin.localize.files import JOURNAL, write_results
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.patching import patching, recipients_of
from sublim_plugin.localize.plan import SAMPLED_KINDS, LocalizeSpec, Plan, Say, parts_of, plan
from sublim_plugin.localize.resolve import Resolved, constant, layer_ranges, profile, resolve
from sublim_plugin.localize.results import (
    BASE,
    STUDENT,
    Divergence,
    Localization,
    Measure,
    MeasureResult,
    Patching,
    Spectra,
    Spectrum,
    measure_result,
)
from sublim_plugin.localize.spans import Prompt, one_line
from sublim_plugin.localize.spectra import decompose, filter_scores, spectra
from sublim_plugin.localize.sweep import Part
from sublim_plugin.preference.journal import Journal
from sublim_plugin.preference.matcher import MATCHER_VERSION
from sublim_plugin.preference.score import Student

__all__ = ["LocalizeSpec", "localize", "localize_into"]

Gates = Mapping[str, tuple[Resolved, ...]]


def localize_into(
    base: Path,
    folder: Path,
    spec: LocalizeSpec,
    out: Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    say: Say = lambda text: None,
    progress: bool = False,
) -> tuple[Localization, list[Path]]:
    """`localize` with its figures, for a caller that keeps the files.

    Returns:
        the result, and every file of it in `out`, without the journal from which a run continues.

    Raises:
        MissingDependencyError: matplotlib is not installed; all but the figures is written.
        Otherwise as `localize`.
    """
    found, files = _localized(base, folder, spec, out, device, dtype, say, progress)
    return found, sorted([*files, *draw(found, out)])


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
) -> Localization:
    """Localize the student in `folder`; write results.json, the scores and the replies to `out`.

    The prompt and what each gate or span selects in it are told by `say` before a model is loaded.

    Raises:
        InputError: a student, gate, trait or context that does not fit.
        RunError: a score is not finite, or gates are not exact for this architecture.
        BusyError: another process works on `out`.
    """
    return _localized(base, folder, spec, out, device, dtype, say, progress)[0]


def _localized(
    base: Path,
    folder: Path,
    spec: LocalizeSpec,
    out: Path,
    device: str | None,
    dtype: str,
    say: Say,
    progress: bool,
) -> tuple[Localization, list[Path]]:
    planned = plan(base, folder, spec, dtype, say)
    one, prompts = planned.student, planned.prompts
    assert one.folder is not None
    with cell_lock(out):
        model = load_base(base, device, dtype)
        with gated_student(model, base, one.folder, one.method) as gated:
            parts = parts_of(spec, prompts, gated.branches, gated.layers)
            work = Work(
                gated,
                planned.tokenizer,
                get_trait(spec.trait),
                candidates_of(spec.trait),
                prompts,
                _resolved(parts, prompts, gated),
                Journal(out / JOURNAL, one.identity),
                progress,
            )
            measured = {measure: _measured(measure, work, spec, parts) for measure in spec.measures}
            more = _more(work, spec, planned)
            untouched = _untouched(gated)
        if more.spectra is not None and planned.beside:
            beside = {
                name: _spectra_of(model, base, each)
                for name, each in zip(_names(planned.beside), planned.beside, strict=True)
            }
            more = more._replace(spectra=more.spectra.model_copy(update={"beside": beside}))
        texts = _texts(parts, work.gates, prompts[0])
        results = [
            measure_result(measure, kept, found.scores, texts, found.beside)
            for measure, (kept, found) in measured.items()
        ]
        notes = [
            *prompts[0].rendered.notes,
            *(note for _, found in measured.values() for note in found.notes),
            *(more.divergence.notes if more.divergence else ()),
            *untouched,
            *_notes(spec, parts, results, len(prompts)),
        ]
        localization = _localization(planned, spec, parts, results, more, notes)
        return localization, write_results(localization, measured, out)


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


def _texts(parts: Sequence[Part], gates: Gates, prompt: Prompt) -> dict[str, tuple[str, int]]:
    """Text and number of the tokens at which a part's first gate has anything on, where it is about
    positions."""
    texts = {}
    for part in parts:
        if part.alone.positions is not None:
            gate = gates[part.alone.sha256][0]
            inside, outside = any(gate.profile.inside), any(gate.profile.outside)
            tokens = [i for i, bit in enumerate(gate.selected) if (inside if bit else outside)]
            texts[part.alone.sha256] = (one_line(prompt.text_of(tokens)), len(tokens))
    return texts


def _score(
    measure: Measure, work: Work, spec: LocalizeSpec, gates: Gates, variant: str = ""
) -> Found:
    """One measure under gates. Raises RunError for a value that is not finite."""
    if measure == "logprob":
        found = logprob_scores(work, gates, spec.candidates == "all", variant)
    else:
        sampling = Sampling(spec.replies, spec.max_new_tokens, spec.seed)
        found = sampled_scores(work, gates, sampling, variant)
    for name, values in found.scores.items():
        for number, value in enumerate(values):
            if not abs(value) < float("inf"):
                raise RunError(f"gate {name}, question {number}: {value}; the weights overflow")
    return found


def _measured(
    measure: Measure, work: Work, spec: LocalizeSpec, parts: Sequence[Part]
) -> tuple[list[Part], Found]:
    """The parts that the measure covers, and their scores."""
    kept = [part for part in parts if measure == "logprob" or part.kind in SAMPLED_KINDS]
    wanted = dict.fromkeys(
        [BASE, STUDENT, *(g.sha256 for p in kept for g in (p.alone, p.left_out) if g)]
    )
    return kept, _score(measure, work, spec, {name: work.gates[name] for name in wanted})


class _More(NamedTuple):
    """What was asked for beside the gates."""

    spectra: Spectra | None
    patching: Patching | None
    divergence: Divergence | None


def _more(work: Work, spec: LocalizeSpec, planned: Plan) -> _More:
    found_spectra = found_patching = found_divergence = None
    if spec.spectra:
        svds = decompose(work.gated, max(spec.spectra))
        scores = [
            score
            for measure in dict.fromkeys(spec.measures)
            for score in filter_scores(
                work, svds, spec.spectra, measure, partial(_score, measure, work, spec)
            )
        ]
        found_spectra = Spectra(modules=spectra(svds), scores=tuple(scores))
        del svds
    if spec.patch is not None:
        found_patching = patching(work, spec.patch)
    if planned.held_out is not None:
        completions, rows_sha256 = planned.held_out
        assert planned.student.folder is not None
        found_divergence = divergence(
            work.gated,
            completions,
            rows_sha256,
            planned.student.folder,
            spec.context,
            work.journal,
        )
    return _More(found_spectra, found_patching, found_divergence)


def _spectra_of(model: Any, base: Path, one: Student) -> tuple[Spectrum, ...]:
    assert one.folder is not None
    with gated_student(model, base, one.folder, one.method) as gated:
        return spectra(decompose(gated, 0))


def _names(students: Sequence[Student]) -> list[str]:
    """The folders' names, or their paths where two have the same or one is only `model`."""
    names = [one.name for one in students]
    return [
        str(one.folder) if names.count(one.name) > 1 or one.name == "model" else one.name
        for one in students
    ]


def _untouched(gated: Gated) -> list[str]:
    absent = sorted(set(range(gated.layers)) - {b.layer for b in gated.branches})
    if not absent:
        return []
    return [f"the student changes nothing in layers {layer_ranges(absent)}: no part of them"]


def _notes(
    spec: LocalizeSpec,
    parts: Sequence[Part],
    results: Sequence[MeasureResult],
    questions: int,
) -> list[str]:
    told = []
    if "sampled" in spec.measures:
        without = [
            name
            for name, there in (
                ("single tokens", any(part.kind == "token" for part in parts)),
                ("modules in bands of layers", any(part.kind == "cell" for part in parts)),
                ("patched activations", spec.patch is not None),
            )
            if there
        ]
        if without:
            told.append(f"{', '.join(without)}: by log-probability only, never sampled")
    for result in results:
        total = result.total
        if questions < 2:
            told.append(f"{result.measure}: one question gives no interval, so no shares are given")
        elif total.low <= 0 <= total.high:
            told.append(
                f"{result.measure}: the student does not differ from its base "
                f"({total.value:+.4f} {result.unit}, 95% interval {total.low:+.4f} to "
                f"{total.high:+.4f} over questions): there is no effect to localize, and no shares "
                "are given"
            )
    return told


def _localization(
    planned: Plan,
    spec: LocalizeSpec,
    parts: Sequence[Part],
    results: Sequence[MeasureResult],
    more: _More,
    notes: Sequence[str],
) -> Localization:
    first = planned.prompts[0]
    text = first.rendered.text
    resolved = _determining(planned, spec, parts, more)
    return Localization(
        id=sha256_json(resolved)[:12],
        spec=json.loads(json.dumps(resolved)),
        student=planned.student.name,
        trait=get_trait(spec.trait).name,
        context=spec.context.fields(),
        n_questions=len(planned.prompts),
        prompt=text,
        tokens=tuple(text[a:b] for a, b in first.offsets),
        spans=first.spans,
        measures=tuple(results),
        spectra=more.spectra,
        patching=more.patching,
        divergence=more.divergence,
        notes=tuple(dict.fromkeys(notes)),
        versions=installed(),
    )


def _determining(
    planned: Plan, spec: LocalizeSpec, parts: Sequence[Part], more: _More
) -> dict[str, Any]:
    """Everything that the numbers follow from, and nothing else: no names, paths or order."""
    canonical = [g.canonical() for part in parts for g in (part.alone, part.left_out) if g]
    found: dict[str, Any] = {
        **planned.student.identity,
        "trait": get_trait(spec.trait).target,
        "candidates": {trait.target: list(trait.forms) for trait in candidates_of(spec.trait)},
        "context": spec.context.fields(),
        "questions": [prompt.rendered.sha256 for prompt in planned.prompts],
        "measures": sorted(set(spec.measures)),
        "scored": spec.candidates,
        "gates": [json.loads(text) for text in sorted({canonical_json(g) for g in canonical})],
    }
    if "sampled" in spec.measures:
        found["sampled"] = {
            "replies": spec.replies,
            "max_new_tokens": spec.max_new_tokens,
            "seed": spec.seed,
            "matcher": MATCHER_VERSION,
        }
    if spec.spectra:
        found["spectra"] = sorted(set(spec.spectra))
        found["beside"] = [each.identity for each in planned.beside]
    if spec.patch is not None:
        recipients = recipients_of(planned.tokenizer, spec.patch, planned.prompts)
        patch = spec.patch.model_dump(mode="json", by_alias=True, exclude={"recipient"})
        found["patch"] = patch | {
            "modules": sorted(spec.patch.modules),
            "recipients": [prompt.rendered.sha256 for prompt in recipients],
        }
    if more.divergence is not None:
        found["divergence"] = more.divergence.rows_sha256
    return found
