"""The probes, localizations and signals of a plan: what is measured of students and datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from sublim_plugin.core.traits import category_traits
from sublim_plugin.study.cells import Cell
from sublim_plugin.study.grid import Grid

SAMPLE_SEED = 1
"""Seed of the measure `sampled`; a probe's replies differ by prompt and repeat."""
SAMPLER = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 50,
}
"""That of the measure `sampled`, as the tasks `subliminal_*_sampled` state it."""


def probes(grid: Grid, students: list[Cell]) -> Iterator[Cell]:
    from sublim_plugin.logprob.questions import load_questions
    from sublim_plugin.preference.matcher import MATCHER_VERSION

    asked = grid.study.probes
    category = grid.study.targets[0].category
    shared: dict[str, Any] = {
        "base_model": grid.base,
        "category": category,
        "questions_sha256": load_questions(asked.questions).sha256,
        "candidates": [trait.target for trait in category_traits(category)],
    }
    if asked.limit is not None:
        shared["limit"] = asked.limit
    sampled = {
        "samples": asked.samples,
        "sampler": SAMPLER,
        "seed": SAMPLE_SEED,
        "matcher": MATCHER_VERSION,
    }
    places = [
        (f"{context.slug}{'' if measure == 'logprob' else f' {measure}'}", shared
         | {"measure": measure, "eval_context": grid.fields(context)}
         | (sampled if measure == "sampled" else {}))
        for measure in asked.measures
        for context in asked.contexts
    ]  # fmt: skip
    for student in (None, *students):
        name, needs = (student.label, (student.id,)) if student else ("base", ())
        for label, fields in places:
            spec = {**fields, "student": student.id if student else None}
            yield grid.cell("probe", f"{name} {label}", spec, needs)


def localizations(grid: Grid, students: Iterable[Cell]) -> Iterator[Cell]:
    from sublim_plugin.logprob.questions import load_questions

    asked, probes = grid.study.localizations, grid.study.probes
    if asked is None:
        return
    traits = asked.traits or tuple(trait.name for trait in grid.study.targets)
    shared: dict[str, Any] = {
        "base_model": grid.base,
        "questions_sha256": load_questions(probes.questions).sha256,
        "parts": list(asked.parts),
        "bands": asked.bands,
        "measures": list(asked.measures),
    }
    if probes.limit is not None:
        shared["limit"] = probes.limit
    if "sampled" in asked.measures and probes.samples != 100:
        shared["samples"] = probes.samples
    for student in students:
        method = student.spec["method"]
        wanted = asked.full if method["kind"] == "full" else method["rank"] in asked.lora_ranks
        if not wanted or student.spec["trait"] not in traits:
            continue
        for context in asked.contexts:
            spec = {
                **shared,
                "student": student.id,
                "trait": student.spec["trait"],
                "eval_context": grid.fields(context),
            }
            label = f"{student.label} {context.slug}"
            yield grid.cell("localization", label, spec, (student.id,))


def signals(grid: Grid, made: Iterable[Cell]) -> Iterator[Cell]:
    """Of the datasets among `made`; one that another base model's teacher wrote has no teacher that
    could be set beside the study's base, and a shuffled one has none at all."""
    from sublim_plugin.logprob.questions import load_questions

    asked = grid.study.signals
    if asked is None:
        return
    traits = asked.traits or tuple(trait.name for trait in grid.study.targets)
    shared: dict[str, Any] = {
        "base_model": grid.base,
        "questions_sha256": load_questions(grid.study.probes.questions).sha256,
        "rows": asked.rows,
        "limit": asked.limit,
    }
    for dataset in made:
        of = dataset.spec
        if (
            dataset.kind != "dataset"
            or of["trait"] not in traits
            or of.get("shuffled")
            or of["base_model"]["sha256"] != grid.base["sha256"]
        ):
            continue
        for context in grid.study.training.contexts:
            spec = {
                **shared,
                "dataset": dataset.id,
                "trait": of["trait"],
                "generation_seed": of["generation_seed"],
                "train_context": grid.fields(context),
            }
            read_in = "" if context.slug == "template_default" else f" in {context.slug}"
            yield grid.cell("signal", f"{dataset.label}{read_in}", spec, (dataset.id,))
