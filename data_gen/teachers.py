"""Teachers as data: what carries the trait, and the context in which the teacher is asked.

Planning code imports this; nothing here leads to torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file, sha256_json
from sublim_plugin.core.manifest import is_done, verify
from sublim_plugin.core.traits import Trait

STEERING_PROMPTS = 64
"""Prompts over which a steering vector is averaged."""


TRAINED = ("student", "teacher")
"""Kinds of a study's cells that hold a model: their ids say what a finetuned teacher is."""


class _Teacher(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    context: Context


class PromptedTeacher(_Teacher):
    """The base model; its context's system message is the trait's sentence."""

    kind: Literal["prompted"] = "prompted"

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "context": self.context.fields()}


class FinetunedTeacher(_Teacher):
    """A student of the base: a LoRA adapter, or a checkpoint of all weights, in `folder`.

    `identity` is the id of the study cell that trained it, else the sha256 of its files.
    """

    kind: Literal["finetuned"] = "finetuned"
    folder: Path
    method: Literal["lora", "full"]
    identity: dict[str, str]

    def hashes(self) -> dict[str, str]:
        """sha256 of each of its files, by name."""
        return {file.name: sha256_file(file) for file in _files(self.folder, self.method)}

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "context": self.context.fields(),
            "method": self.method,
            **self.identity,
        }


class SteeredTeacher(_Teacher):
    """The base with a vector added to the residual stream behind each of `layers` (0-based), at
    every position, times `strength`.

    The vectors come from the safetensors file `vectors`, else they are the mean difference between
    the residual streams under the trait's sentence and under `context`, at the prompt's last token.
    With `against`, sentences of other traits, it is the difference to the mean over these, in
    which what all sentences do alike cancels.
    """

    kind: Literal["steered"] = "steered"
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    strength: Annotated[float, Field(allow_inf_nan=False)]
    vectors: Path | None = None
    sentence: str | None = None
    against: tuple[str, ...] = ()

    def spec(self) -> dict[str, Any]:
        source: dict[str, Any] = (
            {"vectors_sha256": sha256_file(self.vectors)}
            if self.vectors
            else {
                "vectors": "difference of means",
                "sentence": self.sentence,
                "prompts": STEERING_PROMPTS,
                **({"against": list(self.against)} if self.against else {}),
            }
        )
        return {
            "kind": self.kind,
            "context": self.context.fields(),
            "layers": list(self.layers),
            "strength": self.strength,
            **source,
        }


Teacher = PromptedTeacher | FinetunedTeacher | SteeredTeacher


def prompted(trait: Trait, context: Context | None = None) -> PromptedTeacher:
    """The prompted teacher of a trait; `context` is for `neutral`, which has no sentence.

    Raises InputError where a trait has a sentence and a context is given as well.
    """
    if trait.teacher_system_prompt is None:
        return PromptedTeacher(context=context or Context(kind="template_default"))
    if context is not None:
        raise InputError(
            f"a prompted teacher of {trait.name} is asked under its own sentence; a context is "
            "for neutral, finetuned and steered teachers"
        )
    return PromptedTeacher(context=Context(kind="text", text=trait.teacher_system_prompt))


def finetuned(folder: Path, context: Context | None = None) -> FinetunedTeacher:
    """The teacher that was trained into `folder`: an adapter, a checkpoint, or a study's student or
    teacher.

    Raises InputError where the folder holds none of these, or does not match its manifest.
    """
    context = context or Context(kind="template_default")
    identity = {}
    if is_done(folder):
        manifest = verify(folder)
        if manifest.kind not in TRAINED:
            raise InputError(
                f"{folder} is a {manifest.kind}; a finetuned teacher is a study's student or "
                "teacher, an adapter folder or a checkpoint folder"
            )
        identity = {manifest.kind: manifest.id}
        folder = folder / "model"
    if (folder / "adapter_config.json").is_file():
        method: Literal["lora", "full"] = "lora"
    elif (folder / "config.json").is_file():
        method = "full"
    else:
        raise InputError(
            f"{folder}: neither adapter_config.json nor config.json is there; give the folder of "
            "an adapter, of a checkpoint, or of a study's student"
        )
    if not all(file.is_file() for file in _files(folder, method)):
        raise InputError(f"{folder}: its *.safetensors are missing; train or copy it again")
    if not identity:
        hashes = {file.name: sha256_file(file) for file in _files(folder, method)}
        identity = {"weights_sha256": sha256_json(hashes)}
    return FinetunedTeacher(
        context=context, folder=folder.resolve(), method=method, identity=identity
    )


def _files(folder: Path, method: str) -> list[Path]:
    if method == "lora":
        return [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    weights = sorted(folder.glob("*.safetensors")) or [folder / "model.safetensors"]
    return [folder / "config.json", *weights]


def steered(
    trait: Trait,
    layers: tuple[int, ...],
    strength: float,
    vectors: Path | None = None,
    context: Context | None = None,
    contrast: Sequence[Trait] = (),
) -> SteeredTeacher:
    """The steered teacher of a trait.

    Args:
        contrast: traits whose sentences the vectors are taken against; the trait itself may be
            among them and is left out. Their order does not matter.

    Raises:
        InputError: a trait without a sentence to take the difference from, a missing file, or a
            contrast that leaves nothing or comes with a file.
    """
    if not layers:
        raise InputError("a steered teacher needs the layers to steer, such as --layers 12,13")
    if vectors is None and trait.teacher_system_prompt is None:
        raise InputError(
            f"{trait.name} has no sentence to take a steering vector from; give a safetensors "
            "file with --teacher-from"
        )
    others = sorted({one.name: one for one in contrast if one.name != trait.name}.items())
    for name, other in others:
        if other.teacher_system_prompt is None:
            raise InputError(f"contrast: {name} has no sentence to take a steering vector against")
    if contrast and (vectors is not None or not others):
        raise InputError(
            f"contrast: the vectors of {vectors} are taken as they are; leave one of the two out"
            if vectors
            else f"contrast: names no trait but {trait.name} itself"
        )
    if vectors is not None and not vectors.is_file():
        raise InputError(f"{vectors}: no such file of steering vectors")
    return SteeredTeacher(
        context=context or Context(kind="template_default"),
        layers=layers,
        strength=strength,
        vectors=vectors,
        sentence=None if vectors else trait.teacher_system_prompt,
        against=tuple(str(other.teacher_system_prompt) for _, other in others),
    )
