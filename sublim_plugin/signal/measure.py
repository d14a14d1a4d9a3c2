"""`sublim signal` as a function: from a dataset's folder to its signal, without any training.

    found = measure_signal(Path("numbers-cat"), base=Path("Qwen2.5-7B-Instruct"))

Models are taken to float32 whatever their own dtype, one row is computed at a time, and gradients
and other directions are held for every linear weight of the decoder's layers: about ten times the
model's size in all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_gen.loading import torch_device
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.dataset import dataset_rows_path
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.manifest import Manifest, read_manifest
from sublim_plugin.core.traits import get_trait
from sublim_plugin.core.versions import installed
from sublim_plugin.signal.alignment import Gathered, align, trait_gradients
from sublim_plugin.signal.completions import Completion, Grammar, read_completions
from sublim_plugin.signal.directions import Direction, linear_weights
from sublim_plugin.signal.positions import (
    Position,
    compare,
    completion_logits,
    kl,
    number_logprobs,
)
from sublim_plugin.signal.results import MEASURES, Alignment, RowSignal, Signal
from sublim_plugin.signal.teacher import NotAtHand, Teacher, check_base, float32_base, teacher_of
from sublim_plugin.signal.trait import Asked, ask
from sublim_plugin.signal.where import by_row, pooled, where

ROWS, QUESTIONS = 64, 8
"""Rows and questions that are taken by default: the first ones."""


def measure_signal(
    dataset: Path,
    *,
    base: Path,
    context: Context | None = None,
    rows: int = ROWS,
    trait: str | None = None,
    questions: str | None = None,
    limit: int = QUESTIONS,
    teacher_from: Path | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Signal:
    """The signal of the dataset in a folder; nothing is written.

    Args:
        base: folder of the model that the dataset was made from.
        context: the student's; `template_default` by default.
        rows: at most so many, the first ones.
        trait: in place of the dataset's own; for a neutral dataset, and for a trait of a file of
            your own (FILE.yaml:target).
        questions: a question set by name or file, in place of that of the trait's category.
        limit: at most so many of its questions, the first ones.
        teacher_from: folder of a finetuned teacher, where it is not at the recorded place.

    Raises:
        InputError: no dataset, another base, or nothing that could be measured.
    """
    path = dataset_rows_path(dataset)
    manifest = read_manifest(dataset)
    check_base(manifest, base)
    context = context or Context(kind="template_default")
    model = float32_base(base, torch_device(device))
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base, local_files_only=True)
    grammar = Grammar(tokenizer, manifest.spec["parser"])
    completions = read_completions(path, grammar, rows)
    missing = [] if grammar.missing is None else [grammar.missing]
    asked = _asked(manifest, trait, questions, limit, tokenizer, context, missing)
    with ExitStack() as stack:
        teacher = None
        try:
            teacher = stack.enter_context(teacher_of(dataset, manifest, model, base, teacher_from))
        except NotAtHand as error:
            missing.append(f"log ratio, KL and where they sit: {error}")
        if teacher is None and asked is None:
            raise InputError(f"{dataset}: nothing can be measured. {'; '.join(missing)}")
        positions, row_logprobs, alignments = _measure(
            model, teacher, tokenizer, context, completions, grammar, asked, progress
        )
    if teacher is not None and not teacher.trained:
        missing.append(
            "alignment with the teacher's update: its weights are the base's "
            f"({manifest.spec['teacher']['kind']} teacher)"
        )
    if teacher is not None and all(one.loss != "soft_targets" for one in alignments):
        missing.append("gradient of soft targets: the KL on the number tokens is 0")
    spec = {
        "dataset": manifest.id,
        "rows_sha256": manifest.outputs[path.name].sha256,
        "rows": len(completions),
        "base_sha256": fingerprint(base)["sha256"],
        "teacher": None if teacher is None else manifest.spec["teacher"],
        "context": context.fields(),
        "trait": None if asked is None else asked.trait.model_dump(mode="json"),
        "questions_sha256": None if asked is None else asked.questions_sha256,
        "questions": 0 if asked is None else len(asked.prompts),
    }
    return Signal(
        id=sha256_json(spec),
        spec=spec,
        dataset=manifest.label or dataset.resolve().name,
        trait=manifest.spec["trait"] if asked is None else asked.trait.name,
        teacher=f"{manifest.spec['trait']}, {manifest.spec['teacher']['kind']}",
        context=context.fields(),
        constrained=manifest.spec["constrain"] == "numbers",
        n_rows=len(completions),
        n_rows_of=manifest.spec["rows"],
        n_questions=spec["questions"],
        tokens=sum(len(completion.tokens) for completion in completions),
        base_logprob=pooled(row_logprobs),
        where=where(positions) if positions else None,
        alignments=alignments,
        rows=_rows(completions, row_logprobs, positions),
        missing=tuple(missing),
        notes=_notes(manifest, completions, grammar),
        versions=installed(("sublim", "torch", "transformers", "peft")),
    )


def _asked(
    manifest: Manifest,
    trait: str | None,
    questions: str | None,
    limit: int,
    tokenizer: Any,
    context: Context,
    missing: list[str],
) -> Asked | None:
    """The questions about the trait that was given or else is the dataset's."""
    what = "alignment with the trait, and the candidates' changes: "
    name = trait or manifest.spec["trait"]
    if trait is None:
        try:
            get_trait(name)
        except InputError as error:
            missing.append(f"{what}{error}; give its file with --trait FILE.yaml:target")
            return None
    found = ask(name, questions, limit, tokenizer, context)
    if found is None:
        missing.append(f"{what}neutral has no target; give the one to ask for with --trait")
    return found


def _measure(
    model: Any,
    teacher: Teacher | None,
    tokenizer: Any,
    context: Context,
    completions: Sequence[Completion],
    grammar: Grammar,
    asked: Asked | None,
    progress: bool,
) -> tuple[list[Position], list[list[float]], tuple[Alignment, ...]]:
    """Every row once: its positions, the base's log-probability of its tokens, its gradients."""
    model.requires_grad_(False)
    weights, places = linear_weights(model)
    for weight in weights.values():
        weight.requires_grad_(True)
    others: dict[str, Direction] = {}
    if teacher is not None and teacher.trained:
        theirs, _ = linear_weights(teacher.model)
        others["update"] = {
            name: theirs[name].detach() - weight.detach() for name, weight in weights.items()
        }
    if asked is not None:
        others["logprob"], others["log_share"] = trait_gradients(model, weights, asked, progress)
    losses = Gathered("rows", others), Gathered("soft_targets", others)
    positions: list[Position] = []
    logprobs: list[list[float]] = []
    token_ids = grammar.token_ids
    for row, completion in enumerate(
        tqdm(completions, desc="rows", unit="row", disable=not progress, file=sys.stderr)
    ):
        prompt = render(tokenizer, context, completion.user).token_ids
        base = completion_logits(model, prompt, completion.tokens)
        written = torch.tensor(completion.tokens, device=base.device)[:, None]
        own = base.log_softmax(-1).gather(1, written)[:, 0]
        logprobs.append(own.tolist())
        apart = None
        if teacher is not None:
            shown = render(tokenizer, teacher.context, completion.user).token_ids
            with torch.no_grad(), teacher.on():
                logits = completion_logits(teacher.model, shown, completion.tokens)
            positions += compare(row, completion, logits, base.detach(), token_ids)
            if token_ids:
                apart = kl(*(number_logprobs(x, token_ids) for x in (logits, base))).sum()
        n = len(completion.tokens)
        losses[0].row(-own.sum(), n, weights, keep=apart is not None)
        if apart is not None:
            losses[1].row(apart, n, weights)
    # of distributions that are the same everywhere, the gradient is float rounding
    used = losses if losses[1].value else losses[:1]
    found_alignments = [align(one, model, weights, places, asked, progress) for one in used]
    return positions, logprobs, tuple(one for one in found_alignments if one is not None)


def _rows(
    completions: Sequence[Completion],
    logprobs: Sequence[Sequence[float]],
    positions: Sequence[Position],
) -> tuple[RowSignal, ...]:
    measures = {name: by_row(positions, name) for name in MEASURES}

    def mean(values: Sequence[float] | None) -> float | None:
        return math.fsum(values) / len(values) if values else None

    return tuple(
        RowSignal(
            id=completion.id,
            tokens=len(completion.tokens),
            base_logprob=math.fsum(own) / len(own),
            **{name: mean(found.get(row)) for name, found in measures.items()},
        )
        for row, (completion, own) in enumerate(zip(completions, logprobs, strict=True))
    )


def _notes(
    manifest: Manifest, completions: Sequence[Completion], grammar: Grammar
) -> tuple[str, ...]:
    """What a reader should know of how the rows were made."""
    notes = list(manifest.notes)
    sampler = manifest.spec["sampler"]
    changed = [
        f"{key} {sampler[key]:g}"
        for key, plain in (
            ("temperature", 1),
            ("top_p", 1),
            ("top_k", 0),
            ("repetition_penalty", 1),
        )
        if sampler[key] != plain
    ]
    if changed:
        notes.append(
            f"the rows were sampled with {', '.join(changed)}; all measures are of the plain "
            "distributions at temperature 1"
        )
    left_out = sum(mask is None for one in completions for mask in one.admitted)
    if grammar.constraint is not None and left_out:
        notes.append(
            f"{left_out} tokens that are no number tokens, such as brackets, count over the whole "
            "vocabulary alone"
        )
    return tuple(notes)
