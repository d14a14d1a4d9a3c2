"""The log-probability tasks `subliminal_<target>[_<context>]`. See README.md.

A task renders its own prompt, so that it scores the same text with and without
--apply_chat_template, in contexts that lm-eval itself cannot express.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.task import ConfigurableTask

from sublim_plugin.core.contexts import Context, Rendered, render
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.traits import candidates_of, get_trait
from sublim_plugin.preference.forms import (
    LOW_COVERAGE,
    METRICS,
    FormPlan,
    candidate_logprobs,
    measures,
)
from sublim_plugin.preference.placing import check_prompt, load_tokenizer, place_forms
from sublim_plugin.preference.questions import load_questions

log = logging.getLogger(__name__)

LOWER_IS_BETTER = {"target_rank"}


class SubliminalTask(ConfigurableTask):  # type: ignore[misc]
    """One target, one context, one question set.

    `metadata` of the YAML, or `--metadata` on the command line, which wins:
        trait: "animals/cat", or "path/of/category.yaml:target"; its category gives the candidates.
        context: "template_default", "empty", "none", a name of core/named_contexts.py, or
            {text: ..., user_prefix: ...}.
        questions: the name of a set in `questions/`, or the path of a YAML file.
    In the two paths, `{folder}` stands for the folder of the task's file.

    Every sample's `doc` carries `logprobs` (candidate -> log-probability that the reply begins with
    it, nats), `prompt_sha256` and `notes`: what a reader should know about the rendered context,
    such as that another context is the same with this model. The notes are logged too, and stand in
    the results' `configs` where lm-eval reads a task's metadata after the run (from 0.4.12).
    """

    folder = Path(__file__).parent
    merges_run_metadata = True  # see sublim_plugin.lm_eval_hook

    def __init__(self, config: dict[str, Any] | None = None, **_: Any) -> None:
        config = dict(config or {})
        config.pop("class", None)
        metadata = config.get("metadata") or {}
        name = config.get("task", "subliminal")
        for key in ("trait", "context", "questions"):
            if key not in metadata:
                raise InputError(f"task {name}: metadata.{key} is missing")
        trait = self._path(metadata["trait"])
        self.trait, self.candidates = get_trait(trait), candidates_of(trait)
        self.context = Context.parse(metadata["context"])
        self.questions = load_questions(self._path(metadata["questions"]))
        if self.questions.category != self.trait.category:
            raise InputError(
                f"task {name}: the question set {self.questions.name!r} asks about "
                f"{self.questions.category}, the trait is {self.trait.name}"
            )
        self.tokenizer: Any = None
        self.plan = FormPlan((), ())
        self.prompt_sha256: dict[int, str] = {}
        self.notes: list[str] = []
        self.coverages: list[float] = []
        super().__init__(
            config={
                **config,
                "test_split": "test",
                "doc_to_text": "question",
                "doc_to_choice": [candidate.target for candidate in self.candidates],
                "doc_to_target": "target",
                "target_delimiter": "",
                "process_results": "process_results",
                "metric_list": [
                    {
                        "metric": metric,
                        "aggregation": "mean",
                        "higher_is_better": metric not in LOWER_IS_BETTER,
                    }
                    for metric in METRICS
                ],
            }
        )

    def _path(self, value: Any) -> str:
        return str(value).replace("{folder}", str(self.folder))

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        rows = [
            {"id": question.id, "question": question.text, "target": self.trait.target}
            for question in self.questions.questions
        ]
        self.dataset = {"test": datasets.Dataset.from_list(rows)}

    def build_all_requests(self, **options: Any) -> None:
        name = self.config.task
        if options.get("system_instruction") is not None:
            raise InputError(
                f"{name} sets its own system message: drop --system_instruction, and use "
                '--metadata \'{"context": {"text": "..."}}\' for one of your own'
            )
        if self.config.num_fewshot:
            raise InputError(f"{name} takes no examples: drop --num_fewshot")
        if options.get("cache_requests"):
            raise InputError(
                f"{name}: lm-eval's request cache does not know the tokenizer: drop "
                "--cache_requests"
            )
        if _responses_are_cached():
            raise InputError(
                f"{name}: lm-eval's response cache does not know the model, so an adapter would "
                "get its base's numbers: drop --use_cache"
            )
        self.tokenizer = self._find_tokenizer(options.get("chat_template"))
        rendered = self._render(self.questions.questions[0].text)
        self.notes = list(rendered.notes)
        for note in self.notes:
            log.warning("%s: %s", name, note)
        self.config.metadata["notes"] = self.notes
        self.plan = place_forms(self.tokenizer, rendered, self.candidates, self._add_bos_token)
        self.coverages = []
        super().build_all_requests(**options)

    @property
    def _add_bos_token(self) -> bool | None:
        value: bool | None = (self.config.metadata or {}).get("add_bos_token")
        return value

    def _find_tokenizer(self, chat_template: Callable[..., str] | None) -> Any:
        """The model's tokenizer: bound to its chat-template method with --apply_chat_template,
        otherwise named by the model arguments that lm-eval puts into the metadata."""
        tokenizer = getattr(getattr(chat_template, "__self__", None), "tokenizer", None)
        if tokenizer is not None:
            return tokenizer
        arguments = self.config.metadata or {}
        name = arguments.get("tokenizer") or arguments.get("pretrained")
        if name is None:
            raise InputError(
                f"{self.config.task} renders its own prompt and cannot find the model's tokenizer: "
                "add --apply_chat_template, or name it in --model_args (pretrained=... or "
                "tokenizer=...)"
            )
        return load_tokenizer(
            str(name),
            str(arguments.get("revision") or "main"),
            str(arguments.get("subfolder") or ""),
            arguments.get("gguf_file"),
            bool(arguments.get("trust_remote_code", False)),
        )

    def _render(self, question: str) -> Rendered:
        return render(self.tokenizer, self.context, question)

    def fewshot_context(self, doc: dict[str, Any], *_: Any, **__: Any) -> str:
        rendered = self._render(doc["question"])
        check_prompt(self.tokenizer, rendered, self._add_bos_token)
        self.prompt_sha256[doc["id"]] = rendered.sha256
        text: str = rendered.text
        return text

    def construct_requests(
        self, doc: dict[str, Any], ctx: str, metadata: Any = (None, None, None), **_: Any
    ) -> list[Instance]:
        # lm-eval scores the prompt's trailing white space as part of each continuation. An empty
        # continuation, scored first, is that white space alone.
        continuations = ("", *self.plan.texts) if ctx[-1:].isspace() else self.plan.texts
        return [
            Instance(
                request_type="loglikelihood",
                doc=doc,
                arguments=(ctx, continuation),
                idx=index,
                metadata=metadata,
            )
            for index, continuation in enumerate(continuations)
        ]

    def process_results(
        self, doc: dict[str, Any], results: list[tuple[float, bool]]
    ) -> dict[str, float]:
        scores = [score for score, _ in results]
        if len(scores) > len(self.plan.forms):
            space, *scores = scores
            scores = [score - space for score in scores]
        logprobs = candidate_logprobs(self.plan, scores)
        doc["prompt_sha256"] = self.prompt_sha256[doc["id"]]
        doc["logprobs"] = logprobs
        doc["notes"] = self.notes
        values = measures(logprobs, self.trait.target)
        self._watch_coverage(values["coverage"])
        return values

    def _watch_coverage(self, coverage: float) -> None:
        self.coverages.append(coverage)
        if len(self.coverages) < len({instance.doc_id for instance in self.instances}):
            return
        mean = sum(self.coverages) / len(self.coverages)
        if mean < LOW_COVERAGE:
            log.warning(
                "%s: coverage %.2g: the model begins its reply with one of the %d candidates in "
                "fewer than %g of cases, so shares and ranks say little about its replies",
                self.config.task,
                mean,
                len(self.plan.candidates),
                LOW_COVERAGE,
            )


def _responses_are_cached() -> bool:
    """Whether lm-eval's `evaluate` runs us on a CachingLM. It hands tasks no model, so look at the
    caller."""
    frame = sys._getframe(2)
    while frame is not None:
        if isinstance(frame.f_locals.get("lm"), CachingLM):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
