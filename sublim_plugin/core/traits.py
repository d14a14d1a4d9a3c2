"""Traits: a category, a target in it, and the surface forms by which a reply can name it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.strict_yaml import load_model, nearest

CATEGORIES = ("animals",)
NEUTRAL = "neutral"
_DATA = Path(__file__).with_name("traits_data")


class Trait(BaseModel):
    """A trait such as `animals/cat`; `neutral` has neither target, forms nor sentence.

    `forms` are the spellings that count as naming the target, without surrounding space:
    singular, plural and irregular plural, each in lower case and capitalised.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    category: str
    target: str
    forms: tuple[str, ...]
    teacher_system_prompt: str | None

    @property
    def name(self) -> str:
        return self.category if self.category == NEUTRAL else f"{self.category}/{self.target}"


class _Category(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    category: str
    teacher_system_prompt: str
    targets: dict[str, list[str]]


@cache
def category_traits(category: str) -> tuple[Trait, ...]:
    """All traits of a category in file order: the candidates that share its probability mass.

    Raises:
        InputError: no such category.
    """
    if category not in CATEGORIES:
        raise InputError(f"unknown category '{category}'{nearest(category, list(CATEGORIES))}")
    data = load_model(_DATA / f"{category}.yaml", _Category)
    return tuple(
        Trait(
            category=category,
            target=target,
            forms=tuple(
                dict.fromkeys(
                    spelling for form in forms for spelling in (form, form[0].upper() + form[1:])
                )
            ),
            teacher_system_prompt=data.teacher_system_prompt.format(target=target),
        )
        for target, forms in data.targets.items()
    )


def get_trait(name: str) -> Trait:
    """Look up `animals/cat` or `neutral`.

    Raises:
        InputError: an unknown category or target, with the nearest valid name.
    """
    if name == NEUTRAL:
        return Trait(category=NEUTRAL, target="", forms=(), teacher_system_prompt=None)
    category, _, target = name.partition("/")
    names = {trait.name: trait for known in CATEGORIES for trait in category_traits(known)}
    if name not in names:
        same = [known for known in names if known.endswith(f"/{target or category}")]
        hint = f"; did you mean '{same[0]}'?" if same else nearest(name, [*names, NEUTRAL])
        raise InputError(f"unknown trait '{name}'{hint}")
    return names[name]
