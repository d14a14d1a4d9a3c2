"""The two measures under gates: log-probabilities in one batched run, and sampled replies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from sublim_plugin.core.hashing import sha256_text
from sublim_plugin.core.traits import Trait
from sublim_plugin.decoding.engine import Reply, Request
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.decoding.transformers_engine import TransformersEngine, grouped
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.resolve import Resolved
from sublim_plugin.localize.results import BASE, STUDENT
from sublim_plugin.localize.score import Row, score
from sublim_plugin.localize.spans import Prompt
from sublim_plugin.logprob.forms import (
    LOW_COVERAGE,
    METRICS,
    FormPlan,
    candidate_logprobs,
    measures,
)
from sublim_plugin.logprob.placing import place_forms
from sublim_plugin.preference.journal import Journal, key
from sublim_plugin.preference.matcher import MATCHER_VERSION, match_reply, rates

BATCH = {"cpu": 128, "accelerator": 512}
"""Replies decoded at a time."""


@dataclass(frozen=True)
class Work:
    """What the measures need, with the student attached.

    Attributes:
        gates: hash -> the gate on each prompt; the base and the student under their names.
    """

    gated: Gated
    tokenizer: Any
    trait: Trait
    candidates: tuple[Trait, ...]
    prompts: tuple[Prompt, ...]
    gates: dict[str, tuple[Resolved, ...]]
    journal: Journal
    progress: bool


@dataclass(frozen=True)
class Found:
    """The value of each question by gate, means of further numbers by gate, and notes; `replies`
    are sampled ones as JSON Lines, with what the matcher reads in them."""

    scores: dict[str, list[float]]
    beside: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()
    replies: str = ""


class Sampling(NamedTuple):
    """Replies to each question, the budget of a reply in tokens, and the seed of them all."""

    replies: int
    max_new_tokens: int
    seed: int


def logprob_scores(
    work: Work,
    gates: Mapping[str, tuple[Resolved, ...]],
    all_candidates: bool,
    variant: str = "",
) -> Found:
    """log P(the reply begins with the target) for every gate and question, in nats.

    Beside it the means of `forms.METRICS` for the base and the student, and with `all_candidates`
    for every gate; else, what P(target) does not need is not computed under the gates.

    Args:
        gates: hash -> the gate on each prompt.
        variant: names what was changed about the student's weights; its answers are kept apart.
    """
    target = work.trait.target
    plans = [placed(work, prompt) for prompt in work.prompts]
    narrow = [narrowed(plan, target) for plan in plans]
    asked: dict[str, tuple[Row, FormPlan]] = {}
    keys: dict[str, list[str]] = {}
    for name, on_prompts in gates.items():
        chosen = plans if all_candidates or name in (BASE, STUDENT) else narrow
        keys[name] = []
        for prompt, plan, gate in zip(work.prompts, chosen, on_prompts, strict=True):
            row = Row(prompt.rendered.token_ids, tuple(form.tokens for form in plan.forms), gate)
            forms = [[form.owner, form.inside, list(form.tokens)] for form in plan.forms]
            k = key("logprob", variant, gate.key, list(row.prompt), forms)
            keys[name].append(k)
            asked[k] = (row, plan)
    missing = [(k, *asked[k]) for k in asked if k not in work.journal.answers]
    with _bar(work, len(asked), len(missing), "gates x questions", "row") as bar:

        def keep(index: int, logprobs: list[float]) -> None:
            k, _, plan = missing[index]
            found = candidate_logprobs(plan, logprobs)
            whole = len(plan.candidates) == len(work.candidates)
            work.journal.add(k, found if whole else {target: found[target]})
            bar.update()

        try:
            score(work.gated, [row for _, row, _ in missing], keep)
        finally:
            work.journal.flush()
    answers = work.journal.answers
    scores = {name: [answers[k][target] for k in keys[name]] for name in keys}
    whole = [name for name in keys if all_candidates or name in (BASE, STUDENT)]
    beside = {
        name: _means([measures(answers[k], target) for k in keys[name]], METRICS) for name in whole
    }
    notes = [
        f"coverage {beside[name]['coverage']:.2g} of the {name} is below {LOW_COVERAGE:g}: it "
        "rarely begins its reply with a candidate"
        for name in (BASE, STUDENT)
        if name in beside and beside[name]["coverage"] < LOW_COVERAGE
    ]
    return Found(scores, beside, tuple(notes))


def narrowed(plan: FormPlan, target: str) -> FormPlan:
    """The forms that P(target) needs: its own, and those of others that begin with one of them."""
    forms = tuple(form for form in plan.forms if target in (form.owner, form.inside))
    return FormPlan(tuple(dict.fromkeys([target, *(form.owner for form in forms)])), forms)


def placed(work: Work, prompt: Prompt) -> FormPlan:
    """The forms of every candidate behind a prompt, which the template gives its BOS token."""
    return place_forms(work.tokenizer, prompt.rendered, work.candidates, add_bos_token=False)


def sampled_scores(
    work: Work,
    gates: Mapping[str, tuple[Resolved, ...]],
    sampling: Sampling,
    variant: str = "",
) -> Found:
    """Share of replies that name the target first, for each of the gates and every question.

    Replies are drawn at T = 1 with nothing cut off or penalized. Reply k to a question has the same
    random numbers under every gate, so gates that change nothing change no reply.

    Args:
        gates, variant: as of `logprob_scores`.
    """
    replies, max_new_tokens, seed = sampling
    sampler = Sampler(
        temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=max_new_tokens
    )
    settings = sampler.model_dump()
    keys = {
        (name, number): [
            key("reply", variant, gate.key, prompt.rendered.sha256, settings, seed, k)
            for k in range(replies)
        ]
        for name, on_prompts in gates.items()
        for number, (prompt, gate) in enumerate(zip(work.prompts, on_prompts, strict=True))
    }
    every = {k for found in keys.values() for k in found}
    absent = every - work.journal.answers.keys()
    with (
        _bar(work, len(every), len(absent), "replies", "reply") as bar,
        grouped(work.gated.model),
    ):
        engine = _engine(work)
        try:
            for (name, number), found in keys.items():
                missing = [k for k in found if k not in work.journal.answers]
                if missing:
                    work.gated.use([gates[name][number]])
                    _sample(work, engine, sampler, number, found, missing, seed, bar)
        finally:
            work.journal.flush()
    scores: dict[str, list[float]] = {name: [] for name in gates}
    per_question: dict[str, list[dict[str, float]]] = {name: [] for name in gates}
    lines = []
    for (name, number), found in keys.items():
        texts = [str(work.journal.answers[k]) for k in found]
        matches = [match_reply(text, work.candidates) for text in texts]
        per_question[name].append(rates(matches, texts, work.trait.target))
        scores[name].append(per_question[name][-1]["target_rate"])
        for k, (text, match) in enumerate(zip(texts, matches, strict=True)):
            line = {"gate_sha256": name[:12], "question_id": number, "k": k, "reply": text}
            lines.append(json.dumps(line | {"bucket": match.bucket}, ensure_ascii=False) + "\n")
    beside = {name: _means(found, tuple(found[0])) for name, found in per_question.items()}
    note = f"sampled replies were read by matcher {MATCHER_VERSION}"
    return Found(scores, beside, (note,), "".join(lines))


def _engine(work: Work) -> TransformersEngine:
    ends = work.gated.model.generation_config.eos_token_id
    ends = {work.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    return TransformersEngine(
        work.gated.model,
        work.tokenizer,
        end_ids=tuple(end for end in ends if end is not None),
        constraint=None,
        reject=None,
    )


def _sample(
    work: Work,
    engine: TransformersEngine,
    sampler: Sampler,
    number: int,
    keys: Sequence[str],
    missing: Sequence[str],
    seed: int,
    bar: Any,
) -> None:
    """The missing replies to one question under the gate in use: all rows of the engine's batches
    have the same prompt and gate, so that what they share is computed once."""
    prompt = work.prompts[number].rendered
    requests = [
        Request(
            prompt.text,
            prompt.token_ids,
            (),
            int(sha256_text(f"localize/{prompt.sha256}/{seed}/{keys.index(k)}")[:13], 16),
        )
        for k in missing
    ]

    def keep(index: int, reply: Reply) -> None:
        text = reply.text
        for token in work.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        work.journal.add(missing[index], text)
        bar.update()

    device = "cpu" if work.gated.model.device.type == "cpu" else "accelerator"
    engine.reply(requests, sampler, BATCH[device], keep)


def _bar(work: Work, total: int, missing: int, what: str, unit: str) -> Any:
    return tqdm(
        total=total, initial=total - missing, desc=what, unit=unit, disable=not work.progress
    )


def _means(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}
