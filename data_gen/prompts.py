"""Prompt pools, data files in the format that `pools/numbers.yaml` describes, and prompts."""

from __future__ import annotations

import math
import re
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json, sha256_text
from sublim_plugin.core.strict_yaml import load_model
from sublim_plugin.decoding.draws import integers

PARTS = ("opening", "request", "count", "digits", "format", "closing")
_PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "opening": ("examples",),
    "request": ("count", "digits"),
}
_FIELD = re.compile(r"\{\{|\}\}|\{(\w*)\}|[{}]")

Variants = Annotated[tuple[str, ...], Field(min_length=1)]


class Examples(BaseModel):
    """How many example numbers a prompt shows and their range, both ends included."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    count: tuple[Annotated[int, Field(ge=1)], int]
    value: tuple[Annotated[int, Field(ge=0)], int]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("count", "value"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(
                    f"examples.{name}: [{low}, {high}] is empty; put the smaller first"
                )
        return self


class Pool(BaseModel):
    """A prompt pool as its file holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")]
    examples: Examples
    opening: Variants
    request: Variants
    count: Variants
    digits: Variants
    format: Variants
    closing: Variants

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        for part in PARTS:
            variants: tuple[str, ...] = getattr(self, part)
            if doubled := {text for text in variants if variants.count(text) > 1}:
                raise ValueError(f"{part}: {min(doubled)!r} occurs more than once; remove the copy")
            for text in variants:
                found = [m[1] if m[1] is not None else m[0] for m in _FIELD.finditer(text)]
                found = [name for name in found if name not in ("{{", "}}")]
                if sorted(found) != sorted(_PLACEHOLDERS.get(part, ())):
                    wanted = ", ".join(f"{{{n}}}" for n in _PLACEHOLDERS.get(part, ())) or "none"
                    raise ValueError(
                        f"{part}: {text!r} must have these placeholders exactly once: {wanted} "
                        "(write {{ and }} for braces)"
                    )
        return self

    @property
    def sha256(self) -> str:
        """Hash of everything that prompts depend on: the content without its name and comments."""
        return sha256_json(self.model_dump(mode="json", exclude={"name"}))

    @property
    def surface_forms(self) -> int:
        """Number of prompts that differ before the example numbers are filled in."""
        return math.prod(len(getattr(self, part)) for part in PARTS)


class Prompt(NamedTuple):
    """A user message and the first 12 hex digits of its sha256."""

    id: str
    text: str


def load_pool(path: Path | None = None) -> Pool:
    """The pool at `path`, or one of ours: `numbers`, or that of the name given in its place.

    Raises InputError that names the file and the bad entry.
    """
    name = "numbers" if path is None else str(path)
    if path is not None and not re.fullmatch(r"[A-Za-z0-9-]+", name):
        return _load(path)
    with as_file(files("data_gen") / "pools") as folder:
        own = folder / f"{name}.yaml"
        if not own.is_file():
            names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            raise InputError(
                f"no prompt pool is called '{name}'; there are {names}, or give the path of a YAML"
                " file of your own"
            )
        return _load(own)


def _load(path: Path) -> Pool:
    try:
        pool: Any = load_model(path, Pool)
    except ValidationError as error:
        raise InputError(f"{path}: not a prompt pool: {error}") from error
    return Pool.model_validate(pool)


def prompt(pool: Pool, seed: int, index: int) -> Prompt:
    """Prompt `index` (0-based) of prompt seed `seed`: a pure function of its three arguments.

    Draws are taken modulo the number of choices; with 64 bits the bias is below 1e-16.
    """
    low, high = pool.examples.count
    draws = integers(f"sublim prompt/{seed}/{index}", len(PARTS) + 1 + high)
    chosen = {
        part: getattr(pool, part)[d % len(getattr(pool, part))]
        for part, d in zip(PARTS, draws, strict=False)
    }
    how_many = low + draws[len(PARTS)] % (high - low + 1)
    least, most = pool.examples.value
    shown = [least + d % (most - least + 1) for d in draws[len(PARTS) + 1 :][:how_many]]
    text = " ".join(
        (
            chosen["opening"].format(examples=", ".join(map(str, shown))),
            chosen["request"].format(count=chosen["count"], digits=chosen["digits"]),
            chosen["format"].format(),
            chosen["closing"].format(),
        )
    )
    return Prompt(sha256_text(text)[:12], text)
