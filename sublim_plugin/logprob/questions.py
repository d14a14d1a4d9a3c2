"""Question sets: YAML files in `lm_eval_tasks/questions/`, or a lab's own in the same format."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.strict_yaml import load_model
from sublim_plugin.lm_eval_hook import tasks_folder


class Question(BaseModel):
    """One question: `id` is its place in the set, `kind` what it asks for, `text` the message."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    kind: str
    text: str


class QuestionSet(BaseModel):
    """A set of questions about one category of traits. The format is explained in animals.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    category: str
    version: str
    questions: tuple[Question, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash of what is asked (ids and texts): comments, kinds and names do not enter."""
        return sha256_json([[question.id, question.text] for question in self.questions])


@lru_cache(maxsize=8)
def load_questions(name_or_path: str) -> QuestionSet:
    """A set of ours by name ("animals") or a YAML file by path.

    Raises:
        InputError: no such set, a malformed file, ids that are not 0, 1, 2, ... or a doubled text.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = Path(tasks_folder(), "questions", f"{name_or_path}.yaml")
    if not path.is_file():
        known = sorted(file.stem for file in Path(tasks_folder(), "questions").glob("*.yaml"))
        raise InputError(
            f"no question set {name_or_path!r}: {path} is not a file; "
            f"use one of {', '.join(known)} or the path of a YAML file"
        )
    questions = load_model(path, QuestionSet)
    if not questions.questions:
        raise InputError(f"{path}: questions: the set is empty")
    seen: set[str] = set()
    for position, question in enumerate(questions.questions):
        if question.id != position:
            raise InputError(
                f"{path}: questions: id {question.id} at position {position}; ids are 0, 1, 2, ..."
            )
        if not question.text.strip() or question.text in seen:
            raise InputError(f"{path}: questions: id {position} has an empty or doubled text")
        seen.add(question.text)
    return questions
