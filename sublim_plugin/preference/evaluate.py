"""Scores a base and its students in one process through lm-eval's own `simple_evaluate`.

    with_base = Evaluator(base)
    for student in students:
        for result in with_base.evaluate(student, "lora", contexts, traits):
            result.write(folder)

The base is loaded once; adapters are attached and taken off again without touching its weights.
lm-eval builds the requests, collects the samples and aggregates, from the tasks in
`lm_eval_tasks/`; the model is `SharedLM`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sublim_plugin.core.atomic import write_json, write_text
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_text
from sublim_plugin.core.traits import Trait, category_traits
from sublim_plugin.lm_eval_hook import tasks_folder
from sublim_plugin.logprob.forms import LOW_COVERAGE, measures, summarize
from sublim_plugin.logprob.questions import load_questions
from sublim_plugin.preference.host import run_tasks
from sublim_plugin.preference.sampled import given

if TYPE_CHECKING:
    from sublim_plugin.decoding.sampler import Sampler
    from sublim_plugin.preference.sampled import SampledResult

Method = Literal["lora", "full"]
Progress = Callable[[int, int], None]
"""Called with (prompts scored, prompts in all) after every prompt."""

RESULTS, QUESTIONS, REPLIES = "results.json", "questions.jsonl", "replies.jsonl"

SAMPLE_REPLIES = 3
"""Questions whose reply is also sampled once, for a reader to look at; no number rests on them."""
SAMPLE_TOKENS = 12


@dataclass(frozen=True)
class ProbeResult:
    """One model in one eval context.

    Attributes:
        context: the eval context.
        results: the content of results.json.
        rows: the rows of questions.jsonl, in the order of the question set.
        replies: the rows of replies.jsonl: `question` and one sampled `reply` each.
        lm_eval: what `simple_evaluate` returned, without the samples.
    """

    context: Context
    results: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    replies: tuple[dict[str, str], ...]
    lm_eval: dict[str, Any]

    def write(self, folder: Path) -> tuple[str, ...]:
        """Write results.json and the two JSONL files, each atomically; return their names."""
        for name, rows in ((QUESTIONS, self.rows), (REPLIES, self.replies)):
            lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
            write_text(folder / name, "".join(f"{line}\n" for line in lines))
        write_json(folder / RESULTS, self.results)
        return RESULTS, QUESTIONS, REPLIES


@contextmanager
def student_on(lm: Any, base: Path, student: Path | None, method: str | None) -> Iterator[None]:
    """The LM runs the student inside, and the base again afterwards, whatever happens."""
    from sublim_plugin.students import attached, load_full

    base_model = lm._model
    try:
        if student is None:
            yield
        elif method == "lora":
            with attached(base_model, student, base) as model:
                lm._model = model
                yield
        elif method == "full":
            lm._model = load_full(student, base, base_model.dtype, lm.device)
            yield
        else:
            raise InputError(f"method {method!r} for {student}: use 'lora' or 'full'")
    finally:
        lm._model = base_model


class Evaluator:
    """One loaded base and what it takes to score students of it.

    Args:
        base: folder of the base model (config, safetensors, tokenizer with a chat template).
        questions: name of a question set in `lm_eval_tasks/questions/`, or a YAML file.
        device: "cpu", "cuda", ...; by default a GPU if there is one.
        dtype: the dtype to load in; "auto" is the checkpoint's. Log-softmax is always in float32.

    Raises:
        InputError: the base or the question set cannot be read.
    """

    def __init__(
        self,
        base: Path,
        *,
        questions: str = "animals",
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        import torch

        from sublim_plugin.preference.shared_lm import SharedLM

        self.base = base
        self.questions = load_questions(questions)
        self._questions_source = questions
        if not (base / "config.json").is_file():
            raise InputError(f"{base} is not a model folder: it has no config.json")
        self.lm: Any
        try:
            self.lm = SharedLM(
                pretrained=str(base),
                device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
                dtype=dtype,
                softmax_dtype="float32",
                batch_size=1,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise InputError(f"the base model in {base} cannot be loaded: {error}") from error

    def evaluate(
        self,
        student: Path | None,
        method: Method | None,
        contexts: Sequence[Context],
        traits: Sequence[Trait],
        *,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> list[ProbeResult]:
        """Score one student, or the base where `student` is None, in every context.

        Args:
            student: folder of a PEFT adapter (method "lora") or a full checkpoint ("full").
            method: None only for the base.
            contexts: eval contexts, one result each, in this order.
            traits: the targets to report, all of the question set's category (`neutral` is
                skipped). Every candidate of the category is scored in any case.
            limit: only the first questions; for trying out.
            progress: replaces lm-eval's own progress bar.

        Raises:
            InputError: the student, a context or a trait does not fit; nothing has been written.
            RunError: a log-probability is not finite.
        """
        targets = self._targets(traits)
        asked = len(self.questions.questions)
        total = len(contexts) * min(limit or asked, asked)
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        self.lm.on_prompt = step if progress is not None else None
        with student_on(self.lm, self.base, student, method):
            return [self._score(context, targets, limit) for context in contexts]

    def sample(
        self,
        student: Path | None,
        method: Method | None,
        context: Context,
        traits: Sequence[Trait],
        *,
        replies: int,
        seed: int,
        sampler: Sampler,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> SampledResult:
        """Sample replies of one student, or of the base, to every question in one context.

        Args:
            student, method, context, traits, limit: as in `evaluate`.
            replies: to each question; `seed` decides them, with the prompt and their number.
            progress: called with (replies sampled, replies in all); replaces the bar.

        Raises:
            InputError: as `evaluate`.
        """
        from sublim_plugin.preference.sampled import sample

        targets = self._targets(traits)
        asked = len(self.questions.questions)
        total, done = replies * min(limit or asked, asked), 0

        def step() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        self.lm.on_reply = step if progress is not None else None
        self.lm.sample_seed = seed
        with student_on(self.lm, self.base, student, method):
            return sample(
                self.lm,
                self.questions,
                self._questions_source,
                context,
                targets,
                replies=replies,
                sampler=sampler,
                limit=limit,
            )

    def _targets(self, traits: Sequence[Trait]) -> list[Trait]:
        category = self.questions.category
        targets = [trait for trait in traits if trait.forms]  # the neutral trait has none
        foreign = [trait.name for trait in targets if trait.category != category]
        if foreign or not targets:
            raise InputError(
                f"traits {foreign or 'neutral alone'}: the question set {self.questions.name!r} "
                f"asks about {category}; name at least one target of it, and no other"
            )
        return targets

    def _score(self, context: Context, targets: Sequence[Trait], limit: int | None) -> ProbeResult:
        from importlib.metadata import version

        from lm_eval.tasks import TaskManager

        manager = TaskManager(
            include_path=tasks_folder(),
            include_defaults=False,
            metadata={
                "trait": targets[0].name,
                "context": given(context),
                "questions": self._questions_source,
            },
        )
        task = f"subliminal_{targets[0].target}"
        if context.kind in ("empty", "none"):
            task = f"{task}_{context.kind}"
        if task not in manager.all_tasks:
            task = "subliminal_cat"  # any of ours: the metadata says what it scores
        host = run_tasks(self.lm, [task], manager, limit)
        samples = sorted(host.pop("samples")[task], key=lambda sample: int(sample["doc_id"]))
        rows = tuple(
            {
                "question_id": sample["doc"]["id"],
                "question": sample["doc"]["question"],
                "prompt_sha256": sample["doc"]["prompt_sha256"],
                "logprobs": sample["doc"]["logprobs"],
            }
            for sample in samples
        )
        summaries = {
            trait.name: summarize([measures(row["logprobs"], trait.target) for row in rows])
            for trait in targets
        }
        coverage = summaries[targets[0].name]["coverage"] or 0.0
        notes = list(samples[0]["doc"]["notes"])
        if coverage < LOW_COVERAGE:
            notes.append(
                f"coverage {coverage:.2g} is below {LOW_COVERAGE:g}: the model rarely begins its "
                "reply with a candidate, so shares and ranks say little about its replies"
            )
        results = {
            "category": self.questions.category,
            "context": context.fields(),
            "measure": "logprob",
            "n_questions": len(rows),
            "targets": summaries,
            "rendered_example": {
                "text": samples[0]["arguments"][0][0],
                "sha256": rows[0]["prompt_sha256"],
            },
            "lm_eval": {"version": version("lm_eval"), "task_versions": host["versions"]},
            "notes": notes,
        }
        shown = samples[:SAMPLE_REPLIES]
        replies = tuple(
            {"question": s["doc"]["question"], "reply": self._reply(s["arguments"][0][0])}
            for s in shown
        )
        return ProbeResult(context, results, rows, replies, host)

    def _reply(self, prompt: str) -> str:
        """One sampled reply: T = 1, nothing cut off or penalised, seeded by the prompt."""
        import torch
        from transformers import GenerationConfig

        tokenizer = self.lm.tokenizer
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(self.lm.device)
        ends = {tokenizer.eos_token_id, *_as_list(self.lm._model.generation_config.eos_token_id)}
        settings: Any = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            max_new_tokens=SAMPLE_TOKENS,
            eos_token_id=sorted(end for end in ends if end is not None),
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(int(sha256_text(prompt)[:8], 16))
            out = self.lm._model.generate(**ids, generation_config=settings)
        reply: str = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        return reply


def _as_list(value: int | list[int] | None) -> list[int | None]:
    return list(value) if isinstance(value, list) else [value]


def evaluate(
    base: Path,
    student: Path | None,
    method: Method | None,
    contexts: Sequence[Context],
    traits: Sequence[Trait],
    *,
    questions: str = "animals",
    device: str | None = None,
    dtype: str = "auto",
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[ProbeResult]:
    """Load `base` and score one student of it: see `Evaluator`, which scores many."""
    evaluator = Evaluator(base, questions=questions, device=device, dtype=dtype)
    return evaluator.evaluate(student, method, contexts, traits, limit=limit, progress=progress)


def candidates(category: str) -> list[str]:
    """The candidates that are scored for a category, for a probe's spec."""
    return [trait.target for trait in category_traits(category)]
