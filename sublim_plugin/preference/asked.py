"""What models are asked: tasks in contexts, with everything that determines an answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.named_contexts import NAMED_CONTEXTS
from sublim_plugin.core.rooms import room
from sublim_plugin.core.strict_yaml import nearest
from sublim_plugin.lm_eval_hook import tasks_folder
from sublim_plugin.logprob.placing import check_prompt, load_tokenizer, place_forms
from sublim_plugin.preference.matcher import MATCHER_VERSION

SCORING = 1
"""Raised when the same question to the same model gets another number."""


class Asked(BaseModel):
    """One task in one context.

    Attributes:
        context: the context as resolved; `label` is its readable name.
        given: whether the context was asked for, rather than being the task's own.
        determines: all that decides the result beside the model: texts, hashes, versions, sampler.
        questions: `name`, `version`, `sha256` of those asked, and how many (`asked`).
        example: `text` and `sha256` of the first question's rendered prompt.
        notes: what a reader should know about the context.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    task: str
    measure: str
    context: Context
    label: str
    given: bool
    determines: dict[str, Any]
    questions: dict[str, Any]
    example: dict[str, str]
    notes: tuple[str, ...]


class Tasks:
    """lm-eval's index of our tasks, and of a folder's, made once for every context."""

    def __init__(self, questions: str | None, include_path: Path | None) -> None:
        self.questions, self.include_path = questions, include_path
        self._managers: dict[Context | None, Any] = {}

    def manager(self, context: Context | None) -> Any:
        """The index whose tasks ask in `context`, or each in its own where that is None."""
        from lm_eval.tasks import TaskManager

        if context not in self._managers:
            metadata: dict[str, Any] = {}
            if context is not None:
                fields = context.fields()
                metadata["context"] = fields["kind"] if len(fields) == 1 else fields
            if self.questions is not None:
                metadata["questions"] = self.questions
            paths = [tasks_folder(), *([str(self.include_path)] if self.include_path else [])]
            self._managers[context] = TaskManager(
                include_path=paths, include_defaults=False, metadata=metadata or None
            )
        return self._managers[context]

    def load(self, names: Sequence[str], context: Context | None) -> dict[str, Any]:
        """The tasks by name, in the order asked for; a tag stands for all of its tasks.

        Raises InputError for a name that is none, and for a task that is not one of sublim's.
        """
        manager = self.manager(context)
        tasks: dict[str, Any] = {}
        for name in names:
            if name not in manager.all_tasks:
                raise InputError(f"unknown task '{name}'{nearest(name, manager.all_tasks)}")
            tasks |= dict(sorted(_flat(manager.load_task_or_group([name])).items()))
        for name, task in tasks.items():
            if not hasattr(task, "trait"):
                raise InputError(
                    f"task {name}: not one of sublim's, and sublim eval scores no others; write "
                    "one with `sublim tasks new`, or score it with lm_eval"
                )
        return tasks


def check_folder(folder: Path) -> None:
    """Refuse a folder of tasks that lm-eval would skip in part, or that everybody may write.

    Raises InputError with a line for each file that is wrong, as `sublim tasks validate`.
    """
    room("lm_eval_tasks")
    from lm_eval_tasks.validate import validate

    validate(folder)


def label(given: Any, context: Context) -> str:
    """A readable name: that of a named text, or of the file that it was read from."""
    known = {text: name for name, text in NAMED_CONTEXTS.items()}
    if isinstance(given, str) and given.endswith((".yaml", ".yml")):
        return Path(given).stem
    if context.text in known:
        return "-".join([known[context.text], *context.slug.split("-")[2:]])
    return context.slug


def resolve(
    base: Path,
    names: Sequence[str],
    contexts: Sequence[tuple[str, Context]],
    tasks: Tasks,
    *,
    limit: int | None,
    seed: int,
) -> list[Asked]:
    """Every task in every context, or in its own where there are none, in the order of contexts.

    Nothing is computed, but every prompt is rendered and the forms are placed after the first.

    Raises:
        InputError: a task or a question set that is not there, a context that the base's template
            cannot express, or a task that is named after another context than the one asked for.
    """
    own = tasks.load(names, None)
    for name, task in own.items():
        for shown, context in contexts:
            if task.context not in (Context(kind="template_default"), context):
                raise InputError(
                    f"task {name} asks in the context '{label(None, task.context)}', not "
                    f"'{shown}': name the task without a context, or leave --contexts out"
                )
    tokenizer = load_tokenizer(str(base))
    prompts = _Prompts(tokenizer)
    places: list[tuple[str, dict[str, Any]]] = [
        (shown, tasks.load(names, context)) for shown, context in contexts
    ]
    found = [
        _asked(name, task, shown or label(None, task.context), prompts, limit, seed)
        for shown, loaded in places or [("", own)]
        for name, task in loaded.items()
    ]
    return [one.model_copy(update={"given": bool(contexts)}) for one in found]


class _Prompts:
    """Rendered prompts; many tasks ask the same questions in the same context."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[tuple[Context, str], Any] = {}

    def __call__(self, context: Context, question: str) -> Any:
        key = (context, question)
        if key not in self._known:
            self._known[key] = render(self.tokenizer, context, question)
        return self._known[key]


def _asked(
    name: str, task: Any, shown: str, prompts: _Prompts, limit: int | None, seed: int
) -> Asked:
    questions = task.questions.questions[:limit]
    rendered = [prompts(task.context, question.text) for question in questions]
    check_prompt(prompts.tokenizer, rendered[0])
    measure = str(task.OUTPUT_TYPE)
    sampled: dict[str, Any] = {}
    if measure == "multiple_choice":
        place_forms(prompts.tokenizer, rendered[0], task.candidates)
    else:
        sampled = {
            "sampler": dict(task.config.generation_kwargs),
            "repeats": task.config.repeats,
            "matcher": MATCHER_VERSION,
            "seed": seed,
        }
    of_questions = {
        "name": task.questions.name,
        "version": task.questions.version,
        "sha256": sha256_json([[question.id, question.text] for question in questions]),
        "asked": len(questions),
    }
    return Asked(
        task=name,
        measure=measure,
        context=task.context,
        label=re.sub(r"[^\w.-]+", "-", shown),
        given=False,
        determines={
            "scoring": SCORING,
            "task": name,
            "version": str((task.config.metadata or {}).get("version")),
            "measure": measure,
            "target": task.trait.target,
            "candidates": {one.target: list(one.forms) for one in task.candidates},
            "context": task.context.fields(),
            "questions": of_questions["sha256"],
            "prompts": sha256_json([one.sha256 for one in rendered]),
            **sampled,
        },
        questions=of_questions,
        example={"text": rendered[0].text, "sha256": rendered[0].sha256},
        notes=rendered[0].notes,
    )


def _flat(found: dict[Any, Any]) -> dict[str, Any]:
    """The tasks of lm-eval's nested mapping, by name."""
    tasks: dict[str, Any] = {}
    for name, value in found.items():
        tasks |= _flat(value) if isinstance(value, dict) else {str(name): value}
    return tasks
