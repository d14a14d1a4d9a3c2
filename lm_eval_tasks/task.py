"""The tasks `subliminal_<target>[_<context>]` and `subliminal_<target>_sampled`. See README.md.

A task renders its own prompt, so that it scores the same text with and without
--apply_chat_template, in contexts that lm-eval itself cannot express.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from sublim_plugin.core.contexts import Context, Rendered, render
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.traits import candidates_of, get_trait
from sublim_plugin.logprob.forms import (
    LOW_COVERAGE,
    METRICS,
    FormPlan,
    candidate_logprobs,
    measures,
)
from sublim_plugin.logprob.placing import check_prompt, load_tokenizer, place_forms
from sublim_plugin.logprob.questions import load_questions
from sublim_plugin.preference.intervals import high_bound, low_bound
from sublim_plugin.preference.matcher import MATCHER_VERSION, RATES, match_reply, rates

log = logging.getLogger(__name__)

STATED = ("temperature", "top_p", "top_k", "repetition_penalty", "max_gen_toks")
"""What a sampled task's generation_kwargs state beside do_sample."""
MANY = 10
"""Replies to a question that are not all the same by chance, for every question."""
LOWER_IS_BETTER = {"target_rank", "non_answer_rate", "self_name_rate"}


class _Preference(ConfigurableTask):  # type: ignore[misc]
    """One target, one context, one question set; what the two measures share.

    `metadata` of the YAML, or `--metadata` on the command line, which wins:
        trait: "animals/cat", or "path/of/category.yaml:target"; its category gives the candidates.
        context: "template_default", "empty", "none", a name of core/named_contexts.py, or
            {text: ..., user_prefix: ...}.
        questions: the name of a set in `questions/`, or the path of a YAML file.
    In the two paths, `{folder}` stands for the folder of the task's file.

    Every sample's `doc` carries `prompt_sha256` and `notes`: what a reader should know about the
    rendered context, such as that another context is the same with this model. The notes are logged
    too, and stand in the results' `configs.<task>.metadata`.
    """

    folder = Path(__file__).parent
    metrics: tuple[tuple[str, Any], ...] = ()
    """Names and how each is aggregated over questions."""

    def __init__(self, config: dict[str, Any] | None = None, **_: Any) -> None:
        config = dict(config or {})
        config.pop("class", None)
        # lm-eval 0.4.11 gives the run's metadata to tasks without a class alone
        metadata = {**(config.get("metadata") or {}), **_run_metadata()}
        config["metadata"] = metadata
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
        self.prompt_sha256: dict[int, str] = {}
        self.notes: list[str] = []
        self.model = ""
        super().__init__(
            config={
                **config,
                "test_split": "test",
                "doc_to_text": "question",
                **self._choices(),
                "doc_to_target": "target",
                "target_delimiter": "",
                "process_results": "process_results",
                "metric_list": [
                    {
                        "metric": metric,
                        "aggregation": aggregation,
                        "higher_is_better": metric not in LOWER_IS_BETTER,
                    }
                    for metric, aggregation in self.metrics
                ],
            }
        )

    def _choices(self) -> dict[str, Any]:
        """What a multiple-choice task's configuration has beside."""
        return {}

    def _path(self, value: Any) -> str:
        return str(value).replace("{folder}", str(self.folder))

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        rows = [
            {"id": question.id, "question": question.text, "target": self.trait.target}
            for question in self.questions.questions
        ]
        self.dataset = {"test": datasets.Dataset.from_list(rows)}

    def dump_config(self) -> dict[str, Any]:
        """As lm-eval's, with the metadata itself, which gets its notes during the run: 0.4.11 asks
        before it."""
        return {**super().dump_config(), "metadata": self.config.metadata}

    def build_all_requests(self, **options: Any) -> None:
        name = self.config.task
        run = _calling_run()
        lm = run.get("lm")
        self.model = _model_name(lm)
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
        if isinstance(lm, CachingLM):
            raise InputError(
                f"{name}: lm-eval's response cache does not know the model, so an adapter would "
                "get its base's numbers: drop --use_cache"
            )
        if isinstance(template := run.get("apply_chat_template"), str):
            raise InputError(
                f"{name}: lm-eval's models do not apply a chat template by name: drop "
                f"{template!r} after --apply_chat_template; for another template than the "
                "tokenizer's default, save it as the chat_template of a tokenizer folder"
            )
        self.tokenizer = self._find_tokenizer(options.get("chat_template"))
        rendered = self._render(self.questions.questions[0].text)
        self.notes = list(rendered.notes)
        for note in self.notes:
            log.warning("%s: %s", name, note)
        self.config.metadata["notes"] = self.notes  # the list itself: a run may add to it
        self._prepare(rendered)
        super().build_all_requests(**options)

    def _prepare(self, rendered: Rendered) -> None:
        """What a measure has to know about the rendered prompt before its requests are built."""

    def _asked(self) -> int:
        """Number of questions of this run."""
        return len({instance.doc_id for instance in self.instances})

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


class SubliminalTask(_Preference):
    """The log-probability measure: see `_Preference` for `metadata`.

    Every sample's `doc` also carries `logprobs`: candidate -> log-probability that the reply begins
    with it, in nats.
    """

    metrics = (
        *((metric, "mean") for metric in METRICS),
        ("target_logprob_low", low_bound),
        ("target_logprob_high", high_bound),
    )

    def __init__(self, config: dict[str, Any] | None = None, **given: Any) -> None:
        self.plan = FormPlan((), ())
        self.coverages: list[float] = []
        super().__init__(config, **given)

    def _choices(self) -> dict[str, Any]:
        return {"doc_to_choice": [candidate.target for candidate in self.candidates]}

    def _prepare(self, rendered: Rendered) -> None:
        self.plan = place_forms(self.tokenizer, rendered, self.candidates, self._add_bos_token)
        self.coverages = []

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
        for score in scores:
            if not math.isfinite(score):
                raise RunError(
                    f"task {self.config.task}, question {doc['id']}, model {self.model}: a "
                    f"log-probability is {score}; the model's weights or its dtype overflow: pass "
                    "dtype=float32, or train again"
                )
        if len(scores) > len(self.plan.forms):
            space, *scores = scores
            scores = [score - space for score in scores]
        logprobs = candidate_logprobs(self.plan, scores)
        doc["prompt_sha256"] = self.prompt_sha256[doc["id"]]
        doc["logprobs"] = logprobs
        doc["notes"] = self.notes
        values = measures(logprobs, self.trait.target)
        self._watch_coverage(values["coverage"])
        own = values["target_logprob"]
        return {**values, "target_logprob_low": own, "target_logprob_high": own}

    def _watch_coverage(self, coverage: float) -> None:
        self.coverages.append(coverage)
        if len(self.coverages) < self._asked():
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


class SampledTask(_Preference):
    """The sampled measure: `repeats` replies a question, read by `preference.matcher`.

    Every sample's `doc` also carries `matches`: the bucket of each reply (None for none), and
    `matcher`, the matcher's version. The replies themselves are lm-eval's `resps`.
    """

    metrics = (
        *((metric, "mean") for metric in RATES),
        ("target_rate_low", low_bound),
        ("target_rate_high", high_bound),
    )

    def __init__(self, config: dict[str, Any] | None = None, **given: Any) -> None:
        self.distinct: list[int] = []
        config = dict(config or {})
        _check_sampler(config.get("task", "subliminal"), config.get("generation_kwargs") or {})
        keep = {"function": "take_first_k", "k": config.get("repeats", 1)}
        config["filter_list"] = [{"name": "replies", "filter": [keep]}]
        super().__init__(config, **given)

    def build_all_requests(self, **options: Any) -> None:
        name = self.config.task
        _check_sampler(name, self.config.generation_kwargs)  # --gen_kwargs may have changed it
        api = sys.modules.get("lm_eval.models.api_models")
        if api is not None and isinstance(_calling_run().get("lm"), api.TemplateAPI):
            raise InputError(
                f"{name}: lm-eval sends one and the same seed with every request to a server, so "
                "all replies to a question would be one reply; use --model hf or vllm, or sublim "
                "eval"
            )
        self.distinct = []
        super().build_all_requests(**options)

    def construct_requests(
        self, doc: dict[str, Any], ctx: str, metadata: Any = (None, None, None), **_: Any
    ) -> list[Instance]:
        return [
            Instance(
                request_type="generate_until",
                doc=doc,
                arguments=(ctx, dict(self.config.generation_kwargs)),
                idx=0,
                metadata=metadata,
            )
        ]

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
        replies = results[0] if isinstance(results[0], list) else list(results)
        if (lost := sum(reply is None for reply in replies)) > 0:
            raise RunError(
                f"{self.config.task}, question {doc['id']}: {lost} of {len(replies)} replies did "
                "not come; a rate over the others would be another measure: run it again"
            )
        matches = [match_reply(reply, self.candidates) for reply in replies]
        doc["prompt_sha256"] = self.prompt_sha256[doc["id"]]
        doc["notes"] = self.notes
        doc["matches"] = [match.bucket for match in matches]
        doc["matcher"] = MATCHER_VERSION
        self._watch_repeats(replies)
        values = rates(matches, replies, self.trait.target)
        rate = values["target_rate"]
        return {**values, "target_rate_low": rate, "target_rate_high": rate}

    def _watch_repeats(self, replies: list[str]) -> None:
        self.distinct.append(len(set(replies)))
        many = len(replies) >= MANY and len(self.distinct) > 1
        if many and len(self.distinct) == self._asked() and max(self.distinct) == 1:
            note = (
                f"all {len(replies)} replies to a question are one and the same, for each of the "
                f"{len(self.distinct)} questions: unless the model has collapsed, whatever runs it "
                "draws with a fixed seed or greedily, and the rates rest on one reply a question"
            )
            self.notes.append(note)
            log.warning("%s: %s", self.config.task, note)


def _check_sampler(name: str, given: dict[str, Any]) -> None:
    """Raises InputError for a sampler that is not stated whole, or that would not sample."""
    if missing := sorted({"do_sample", *STATED} - {*given}):
        raise InputError(
            f"task {name}: generation_kwargs: {missing[0]} is not stated; a model's "
            "generation_config would decide it"
        )
    if given["do_sample"] is not True or float(given["temperature"]) <= 0:
        raise InputError(
            f"task {name}: generation_kwargs: do_sample {given['do_sample']}, temperature "
            f"{given['temperature']}: every reply to a question would be the same; expected "
            "do_sample true and a temperature above 0"
        )


def _calling_run() -> dict[str, Any]:
    """The variables of lm-eval's `evaluate` that runs us, with its `lm`; empty outside of one. It
    hands tasks neither the model nor the name of a chat template, so look at the caller."""
    return _caller("lm", (LM, CachingLM))


def _run_metadata() -> dict[str, Any]:
    """The metadata of the run (the model's arguments, --metadata), from the `TaskManager` that is
    loading us; empty outside of one."""
    manager = _caller("self", TaskManager).get("self")
    return dict(getattr(manager, "metadata", None) or {})


def _caller(variable: str, kind: Any) -> dict[str, Any]:
    """The variables of the nearest caller that has `variable`, of this kind, among them."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get(variable), kind):
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def _model_name(lm: Any) -> str:
    """The adapter or the model that an lm-eval model was made of, as far as it says so."""
    names = (getattr(lm, "peft", None), getattr(lm, "pretrained", None))
    return next((name for name in names if isinstance(name, str)), type(lm).__name__)
