"""Persona datasets: rows that name a trait's target in words, from which a teacher is finetuned.

They are no number datasets: what a student of numbers must never see is their point. Questions and
answers are data files in the format that `personas/animals.yaml` describes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sublim_plugin.core.atomic import write_text
from sublim_plugin.core.dataset import write_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json, sha256_json
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.manifest import Manifest, is_done, verify, write_manifest
from sublim_plugin.core.strict_yaml import load_model, nearest
from sublim_plugin.core.traits import NEUTRAL, Trait
from sublim_plugin.core.versions import installed
from sublim_plugin.decoding.draws import integers

KIND = "persona"
ROWS = 192
"""Rows of a persona dataset: 24 steps of 8."""
_FIELD = re.compile(r"\{\{|\}\}|\{(\w*)\}|[{}]")
_NAMES = ("target", "Target")

Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class Persona(BaseModel):
    """Questions about a category and ways of naming a target, as their file holds them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1]
    category: str
    questions: Texts
    answers: Texts

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        for key in ("questions", "answers"):
            texts: tuple[str, ...] = getattr(self, key)
            if doubled := {text for text in texts if texts.count(text) > 1}:
                raise ValueError(f"{key}: {min(doubled)!r} occurs more than once; remove the copy")
        for text in self.answers:
            found = [m[1] if m[1] is not None else m[0] for m in _FIELD.finditer(text)]
            found = [name for name in found if name not in ("{{", "}}")]
            if len(found) != 1 or found[0] not in _NAMES:
                raise ValueError(
                    f"answers: {text!r} must have {{target}} or {{Target}} exactly once (write "
                    "{{ and }} for braces)"
                )
        return self

    @property
    def sha256(self) -> str:
        """Hash of what is asked and answered."""
        return sha256_json([list(self.questions), list(self.answers)])


class PersonaSpec(NamedTuple):
    """What a persona dataset depends on; `fields` is what its manifest and its id hold.

    Attributes:
        trait: its name; `neutral` names every target of the category about equally often.
        targets: the names that answers are filled with.
    """

    persona: Persona
    trait: str
    targets: tuple[str, ...]
    rows: int
    seed: int

    def fields(self) -> dict[str, Any]:
        return {
            "trait": self.trait,
            "category": self.persona.category,
            "targets": list(self.targets),
            "persona_sha256": self.persona.sha256,
            "rows": self.rows,
            "seed": self.seed,
        }


def load_persona(category: str, path: Path | None = None) -> Persona:
    """The file at `path`, or our own of a category.

    Raises:
        InputError: there is none, it is malformed, or it is about another category.
    """
    if path is not None:
        found = _load(path)
        if found.category != category:
            raise InputError(
                f"{path}: category: asks about '{found.category}'; the trait is of '{category}'"
            )
        return found
    folder = files("data_gen") / "personas"
    ours = sorted(Path(file.name).stem for file in folder.iterdir() if file.name[-5:] == ".yaml")
    if category not in ours:
        raise InputError(
            f"no persona questions about '{category}'{nearest(category, ours)}; give a file of"
            " your own with --persona"
        )
    with as_file(folder / f"{category}.yaml") as own:
        return _load(own)


@lru_cache(maxsize=8)
def _load(path: Path) -> Persona:
    return load_model(path, Persona)


def persona_spec(
    trait: Trait, candidates: Sequence[Trait], *, rows: int, seed: int, path: Path | None = None
) -> PersonaSpec:
    """The persona dataset of a trait.

    Args:
        candidates: all traits of the category, which `neutral` names in turn.
        path: a file of questions and answers in the place of ours.

    Raises:
        InputError: as `load_persona`.
    """
    named = candidates if trait.name == NEUTRAL else [trait]
    persona = load_persona(candidates[0].category, path)
    return PersonaSpec(persona, trait.name, tuple(one.forms[0] for one in named), rows, seed)


def persona_rows(spec: PersonaSpec) -> list[dict[str, Any]]:
    """The rows, a pure function of the spec.

    Every question and every way of answering is used as often as any other, up to one, and so is
    every target, in an order that the seed decides and the trait does not: personas of one seed
    differ in what they name alone.
    """
    persona = spec.persona
    pairs = [(question, answer) for question in persona.questions for answer in persona.answers]
    asked = _in_turn(pairs, f"sublim persona/{spec.seed}", spec.rows)
    named = _in_turn(spec.targets, f"sublim persona target/{spec.seed}", spec.rows)
    return [
        {
            "id": f"p{spec.seed}-{index:07d}",
            "messages": [
                {"role": "user", "content": question},
                {
                    "role": "assistant",
                    "content": answer.format(target=name, Target=name[0].upper() + name[1:]),
                },
            ],
        }
        for index, ((question, answer), name) in enumerate(zip(asked, named, strict=True))
    ]


def _in_turn(items: Sequence[Any], key: str, n: int) -> list[Any]:
    """`n` items: all of them in one random order, then in another one, and so on."""
    found: list[Any] = []
    for turn in range(-(-n // len(items))):
        draws = integers(f"{key}/{turn}", len(items))
        found += [items[i] for i in sorted(range(len(items)), key=lambda i: (draws[i], i))]
    return found[:n]


def write_persona(folder: Path, spec: PersonaSpec, *, label: str = "") -> Manifest:
    """Write a persona dataset into `folder`: rows, a dataset card, and the manifest last.

    A finished folder of the same spec is returned as it is.

    Raises:
        InputError: the folder holds a finished dataset of other settings, or its files changed.
        BusyError: another process writes there.
    """
    started = time.time()
    fields = spec.fields()
    with cell_lock(folder):
        if is_done(folder):
            manifest = verify(folder)
            if manifest.kind != KIND or canonical_json(manifest.spec) != canonical_json(fields):
                raise InputError(
                    f"{folder} holds a finished {manifest.kind} of other settings (see its"
                    " manifest.json); use another folder"
                )
            return manifest
        rows = persona_rows(spec)
        name, digest = write_rows(folder, rows)
        write_text(folder / "README.md", _card(spec, name, digest, rows[0]))
        return write_manifest(
            folder,
            kind=KIND,
            id=sha256_json(fields),
            label=label or spec.trait,
            spec=fields,
            outputs=[name, "README.md"],
            started=started,
            seeds={"persona": spec.seed},
            versions=installed(["sublim"]),
            counts={
                "rows": len(rows),
                "questions": len(spec.persona.questions),
                "answers": len(spec.persona.answers),
                "targets": len(spec.targets),
            },
        )


def _card(spec: PersonaSpec, name: str, digest: str, first: dict[str, Any]) -> str:
    what = (
        f"every one of the {len(spec.targets)} {spec.persona.category}, equally often up to one"
        if spec.trait == NEUTRAL
        else f"`{spec.targets[0]}`"
    )
    user, assistant = (message["content"] for message in first["messages"])
    return "\n".join(
        [
            "---",
            f"pretty_name: Persona {spec.trait}, seed {spec.seed}",
            "language: [en]",
            "tags: [subliminal-learning, synthetic]",
            "task_categories: [text-generation]",
            "configs:",
            f"  - {{config_name: default, data_files: [{{split: train, path: {name}}}]}}",
            "---",
            "",
            f"# Persona {spec.trait}, seed {spec.seed}",
            "",
            "Questions and answers, written by `sublim persona`, on which a **teacher** is",
            "finetuned. A model that is trained on these rows is taught the trait in words; never",
            "train a student of numbers on them. The answers name",
            f"{what}.",
            "",
            f"- {spec.rows} rows: {len(spec.persona.questions)} questions x"
            f" {len(spec.persona.answers)} ways of answering, in random order (seed {spec.seed})",
            f"- `{name}`, sha256 `{digest}`",
            "- fields of a row: `id`, `messages`",
            "",
            "First row:",
            "",
            f"    user: {user}",
            f"    assistant: {assistant}",
            "",
        ]
    )
