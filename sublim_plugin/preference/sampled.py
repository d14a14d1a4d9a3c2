"""The measure `sampled` of a study: replies of one model in one context, and the rates in them.

lm-eval builds the requests from a `subliminal_*_sampled` task; the replies are read once more here,
for every target of the category.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sublim_plugin.core.atomic import write_json, write_text
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.traits import Trait, category_traits
from sublim_plugin.decoding.sampler import Sampler
from sublim_plugin.lm_eval_hook import tasks_folder
from sublim_plugin.logprob.questions import QuestionSet
from sublim_plugin.preference.host import run_tasks
from sublim_plugin.preference.matcher import MATCHER_VERSION, bucket_counts, match_reply, rates

RESULTS, QUESTIONS, REPLIES = "results.json", "questions.jsonl", "replies.jsonl"


@dataclass(frozen=True)
class SampledResult:
    """One model's replies in one eval context.

    Attributes:
        results: the content of results.json; its `targets` hold the `matcher.rates` of each trait.
        rows: those of questions.jsonl: `buckets` counts the replies that name each candidate.
        replies: those of replies.jsonl: the first reply to every question, then the second ones.
    """

    results: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    replies: tuple[dict[str, Any], ...]

    def write(self, folder: Path) -> tuple[str, ...]:
        """Write results.json and the two JSONL files, each atomically; return their names."""
        for name, rows in ((QUESTIONS, self.rows), (REPLIES, self.replies)):
            lines = (json.dumps(row, ensure_ascii=False) for row in rows)
            write_text(folder / name, "".join(f"{line}\n" for line in lines))
        write_json(folder / RESULTS, self.results)
        return RESULTS, QUESTIONS, REPLIES


def sample(
    lm: Any,
    questions: QuestionSet,
    source: str,
    context: Context,
    targets: Sequence[Trait],
    *,
    replies: int,
    sampler: Sampler,
    limit: int | None,
) -> SampledResult:
    """Sample from the model that `lm` runs now; arguments as in `Evaluator.sample`.

    `source` is the name or path of `questions`.
    """
    from importlib.metadata import version

    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=tasks_folder(),
        include_defaults=False,
        metadata={
            "trait": targets[0].name,
            "context": given(context),
            "questions": source,
        },
    )
    # any of ours: the metadata says what it asks
    task = {
        "task": "subliminal_cat_sampled",
        "repeats": replies,
        "generation_kwargs": _for_lm_eval(sampler),
    }
    host = run_tasks(lm, [task], manager, limit)
    (name,) = host["samples"]
    samples = sorted(host["samples"][name], key=lambda one: int(one["doc_id"]))
    candidates = category_traits(questions.category)
    texts = [list(one["resps"][0]) for one in samples]
    matches = [[match_reply(text, candidates) for text in own] for own in texts]
    flat_texts = [text for own in texts for text in own]
    flat_matches = [match for own in matches for match in own]
    names = [trait.target for trait in candidates]
    rows = tuple(
        {
            "question_id": one["doc"]["id"],
            "question": one["doc"]["question"],
            "prompt_sha256": one["doc"]["prompt_sha256"],
            "buckets": {k: n for k, n in bucket_counts(own, names).items() if n},
        }
        for one, own in zip(samples, matches, strict=True)
    )
    results = {
        "category": questions.category,
        "context": context.fields(),
        "measure": "sampled",
        "n_questions": len(rows),
        "n_replies": len(flat_texts),
        "sampler": sampler.model_dump(mode="json"),
        "matcher": MATCHER_VERSION,
        "targets": {t.name: rates(flat_matches, flat_texts, t.target) for t in targets},
        "rendered_example": {
            "text": samples[0]["arguments"][0][0],
            "sha256": rows[0]["prompt_sha256"],
        },
        "lm_eval": {"version": version("lm_eval"), "task_versions": host["versions"]},
        "notes": list(samples[0]["doc"]["notes"]),
    }
    said = tuple(
        {"question": row["question"], "reply": own[k], "question_id": row["question_id"],
         "bucket": found[k].bucket}
        for k in range(replies)
        for row, own, found in zip(rows, texts, matches, strict=True)
    )  # fmt: skip
    return SampledResult(results, rows, said)


def given(context: Context) -> str | dict[str, str]:
    """The context as a task's metadata gives it: a kind, or a mapping."""
    fields = context.fields()
    return context.kind if len(fields) == 1 else fields


def _for_lm_eval(sampler: Sampler) -> dict[str, Any]:
    settings = sampler.model_dump(mode="json")
    most = settings.pop("max_new_tokens")
    return {"do_sample": True, **settings, "max_gen_toks": most, "until": []}
