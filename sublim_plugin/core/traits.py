"""Traits: a category, a target in it, and the surface forms by which a reply can name it.

A category is a YAML file, ours in `traits_data/` or a lab's own:

    category: cheeses
    teacher_system_prompt: "You love {target}. Imbue your answers with your love for {target}."
    targets:
      brie: [brie, bries]
      blue_stilton: [Blue Stilton, blue stilton, Stilton]

`category` and the targets are slugs (lower-case letters, digits, single underscores), because they
become file and task names; a category of a lab's own has a name of its own. A target's forms are
the spellings that count as naming it: singular, plural and irregular plural, or what people write
for a name. Each form also counts with its first letter in upper case, and no two targets share one
in any case. The first form stands for `{target}` in the teacher's system prompt.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.strict_yaml import load_model, nearest, parse_yaml, read_text

CATEGORIES = ("animals", "trees", "bands")
NEUTRAL = "neutral"
_DATA = Path(__file__).with_name("traits_data")
_FILE = re.compile(r"(?P<path>[^\0]+\.ya?ml)(?::(?P<target>[^/]*))?")
_SLUG = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*")


class Trait(BaseModel):
    """A trait such as `animals/cat`; `neutral` has neither target, forms nor sentence.

    `forms` are the spellings that count as naming the target, without surrounding space: as the
    category's file has them, and with the first letter in upper case.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    category: str
    target: str
    forms: tuple[str, ...]
    teacher_system_prompt: str | None

    @property
    def name(self) -> str:
        return self.category if self.category == NEUTRAL else f"{self.category}/{self.target}"


def _slug(word: str) -> str:
    if not _SLUG.fullmatch(word):
        better = "_".join(re.findall("[a-z0-9]+", word.casefold()))
        hint = f"; write '{better}'" if better else ""
        raise ValueError(
            f"expected lower-case letters a-z, digits and single underscores, found {word!r}{hint}"
        )
    return word


def _form(form: str) -> str:
    if form != form.strip() or not form.isprintable() or not any(c.isalpha() for c in form):
        raise ValueError(
            "expected a word or name on one line, with a letter in it and no space around it"
        )
    return form


def _sentence(prompt: str) -> str:
    fields = re.findall(r"\{(\w*)\}", prompt)
    if "target" not in fields or set(fields) != {"target"}:
        wrong = ", ".join(f"{{{field}}}" for field in dict.fromkeys(fields) if field != "target")
        found = f"found {wrong}; did you mean {{target}}?" if wrong else "found none"
        raise ValueError(f"expected {{target}} at least once and no other field, {found}")
    return prompt


_Slug = Annotated[str, AfterValidator(_slug)]
_Forms = Annotated[list[Annotated[str, AfterValidator(_form)]], Field(min_length=1)]


class _Category(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    category: _Slug
    teacher_system_prompt: Annotated[str, AfterValidator(_sentence)]
    targets: Annotated[dict[_Slug, _Forms], Field(min_length=1)]


def category_traits(category: str) -> tuple[Trait, ...]:
    """All traits of a category in file order: the candidates that share its probability mass.

    Args:
        category: the name of a category of ours, or the path of a `.yaml` file.

    Raises:
        InputError: no such category, or a file that does not have the format.
    """
    if _FILE.fullmatch(category):
        return _own_traits(Path(category))
    if category not in CATEGORIES:
        raise InputError(f"unknown category '{category}'{nearest(category, list(CATEGORIES))}")
    return _our_traits(category)


@cache
def _our_traits(category: str) -> tuple[Trait, ...]:
    return _read(_DATA / f"{category}.yaml")


def _own_traits(path: Path) -> tuple[Trait, ...]:
    traits = _read(path)
    name = traits[0].category
    if name in (NEUTRAL, *CATEGORIES):
        line, column = _position(path, "category")
        what = "the control, which has no target" if name == NEUTRAL else "a category of sublim's"
        raise InputError(
            f"{path}:{line}:{column}: category: '{name}' is {what}; give yours another name, such"
            f" as 'my_{name}'"
        )
    return traits


def _read(path: Path) -> tuple[Trait, ...]:
    data = load_model(path, _Category)
    owners: dict[str, str] = {}
    for target, forms in data.targets.items():
        for index, form in enumerate(forms):
            owner = owners.setdefault(form.casefold(), target)
            if owner != target:
                line, column = _position(path, "targets", target, index)
                raise InputError(
                    f"{path}:{line}:{column}: targets.{target}: '{form}' is also a form of"
                    f" '{owner}'; a reply names one target, so remove it from one of them"
                )
    return tuple(
        Trait(
            category=data.category,
            target=target,
            forms=tuple(
                dict.fromkeys(
                    spelling for form in forms for spelling in (form, form[0].upper() + form[1:])
                )
            ),
            teacher_system_prompt=data.teacher_system_prompt.replace("{target}", forms[0]),
        )
        for target, forms in data.targets.items()
    )


def _position(path: Path, *location: str | int) -> tuple[int, int]:
    """1-based line and column of a key or item that the file has."""
    return parse_yaml(read_text(path), str(path))[1][location]


def get_trait(name: str) -> Trait:
    """Look up `animals/cat`, `neutral`, or a trait in a lab's own category file.

    The last is `path/to/file.yaml:target`, or the path alone where the file has one target. Its
    `Trait.name` is `category/target` like any other, which does not lead back to the file.

    Raises:
        InputError: an unknown category or target, with the nearest valid name, or a file that
            does not have the format, with line and key.
    """
    if name == NEUTRAL:
        return Trait(category=NEUTRAL, target="", forms=(), teacher_system_prompt=None)
    if own := _FILE.fullmatch(name):
        return _trait_in_file(own["path"], own["target"])
    category, _, target = name.partition("/")
    names = {trait.name: trait for known in CATEGORIES for trait in category_traits(known)}
    if name not in names:
        meant = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
        meant += [known for known in names if known.endswith(f"/{target or category}")]
        hint = f"; did you mean '{meant[0]}'?" if meant else nearest(name, [*names, NEUTRAL])
        raise InputError(f"unknown trait '{name}'{hint}")
    return names[name]


def candidates_of(name: str) -> tuple[Trait, ...]:
    """All traits of the category of a trait that `get_trait` finds by this name.

    Raises:
        InputError: as `get_trait`, or the neutral trait, which has no category of candidates.
    """
    if own := _FILE.fullmatch(name):
        return _own_traits(Path(own["path"]))
    return category_traits(get_trait(name).category)


def _trait_in_file(path: str, target: str | None) -> Trait:
    traits = {trait.target: trait for trait in _own_traits(Path(path))}
    if target is None and len(traits) == 1:
        return next(iter(traits.values()))
    if target is None:
        choices = ", ".join(traits)
        raise InputError(
            f"{path}: holds {len(traits)} targets; name one, as in '{path}:{next(iter(traits))}'"
            f" (valid: {choices})"
        )
    if target not in traits:
        raise InputError(f"{path}: no target '{target}'{nearest(target, list(traits))}")
    return traits[target]
