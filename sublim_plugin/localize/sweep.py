"""What is asked of a student: each part of the prompt and of the model, alone and left out.

For every part there are two gates. Alone (sufficiency): the student's change is on there and
nowhere else. Left out (necessity): on everywhere else. Generated tokens follow what lies outside
the part: off where it is alone, on where it is left out, as in the paper's later runs. Gates on
layers and modules act on all positions, generated ones too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.errors import InputError
from sublim_plugin.localize.resolve import Branch
from sublim_plugin.localize.spans import Prompt
from sublim_plugin.localize.spec import As, Choice, Gate, LayerItem, Selector, Tokens

Kind = Literal["span", "token", "layers", "module", "cell", "gate"]
KINDS: tuple[Kind, ...] = ("span", "token", "layers", "module", "cell")
"""What a sweep covers; a `gate` comes from a file."""

BANDS = 6


class Part(BaseModel):
    """A part and its gates; a gate of a file's own has `alone` only.

    `band` and `module` place a cell in the map.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    name: str
    alone: Gate
    left_out: Gate | None
    band: str | None = None
    module: str | None = None


def sweep(
    prompts: Sequence[Prompt],
    branches: Sequence[Branch],
    layers: int,
    kinds: Sequence[Kind] = KINDS,
    bands: int | None = None,
) -> tuple[Part, ...]:
    """Every span and token of the prompts' template, every band of layers, every module and family,
    and every band × module, as far as the student changes anything there.

    Tokens are those before and after the question, which stands in the strip as one span. Spans
    with the same tokens as an earlier one are left out, and so is each special token by itself.

    Args:
        prompts: one context, several questions; a span has to be in all of them.
        bands: how many bands the model's layers are cut into; by default `BANDS`, or a band a layer
            where there are fewer.

    Raises:
        InputError: more bands than layers.
    """
    parts: list[Part] = []
    if "span" in kinds:
        parts += [_positions("span", name, name) for name in distinct_spans(prompts)]
    if "token" in kinds:
        parts += _tokens(prompts[0])
    inner = [b for b in branches if b.layer is not None]
    cuts = {
        band: {b.module for b in inner if b.layer in held}
        for band, held in bands_of(layers, bands).items()
    }
    families = list(dict.fromkeys(b.family for b in branches))
    modules = list(dict.fromkeys(b.module for b in branches))
    if "layers" in kinds:
        parts += [_weights("layers", band, band, None) for band, held in cuts.items() if held]
    if "module" in kinds:
        names = dict.fromkeys([*families, *modules])
        parts += [_weights("module", name, None, name) for name in names]
    if "cell" in kinds:
        parts += [
            _weights("cell", f"{module} {band}", band, module)
            for module in dict.fromkeys(b.module for b in inner)
            for band, held in cuts.items()
            if module in held
        ]
    return tuple(parts)


def own_gates(gates: Sequence[Gate]) -> tuple[Part, ...]:
    """The gates of a file as parts."""
    return tuple(Part(kind="gate", name=g.label, alone=g, left_out=None) for g in gates)


def distinct_spans(prompts: Sequence[Prompt]) -> list[str]:
    """Names of the spans that are in every prompt, one for the same tokens."""
    seen: set[tuple[tuple[int, ...], ...]] = set()
    names = []
    for name in prompts[0].spans:
        by_itself = name.startswith("special_token:")
        if not by_itself and all(name in prompt.spans for prompt in prompts):
            tokens = tuple(prompt.spans[name] for prompt in prompts)
            if tokens not in seen:
                seen.add(tokens)
                names.append(name)
    return names


def _tokens(prompt: Prompt) -> list[Part]:
    length, question = len(prompt.offsets), set(prompt.spans["question"])
    # counted from the end behind the question, whose length differs from prompt to prompt
    places = [i if i < min(question) else i - length for i in range(length) if i not in question]
    return [_positions("token", str(place), Tokens(tokens=(place,))) for place in places]


def _positions(kind: Kind, name: str, selector: Selector) -> Part:
    return Part(
        kind=kind,
        name=name,
        alone=Gate(positions=Choice[Selector](only=(selector,)), decode="off"),
        left_out=Gate(positions=Choice[Selector](except_=(selector,)), decode="on"),
    )


def _weights(kind: Kind, name: str, band: str | None, module: str | None) -> Part:
    """A part of the weights; what is left out of it is off at generated tokens too."""
    layers = None if band is None else Choice[LayerItem](only=(band,))
    modules = None if module is None else Choice[str](only=(module,))
    rest = Gate(layers=layers, modules=modules, complement=True, decode=As(span="last_token"))
    place = {"band": band, "module": module} if kind == "cell" else {}
    return Part(
        kind=kind,
        name=name,
        alone=Gate(layers=layers, modules=modules, decode="on"),
        left_out=rest,
        **place,
    )


def bands_of(layers: int, count: int | None) -> dict[str, range]:
    """The bands that the layers are cut into, by name.

    Raises:
        InputError: more bands than layers.
    """
    count = count or min(BANDS, layers)
    if count > layers:
        raise InputError(f"bands: {count}; the model has {layers} layers, so use 1 to {layers}")
    edges = [round(i * layers / count) for i in range(count + 1)]
    return {f"{a}-{b - 1}": range(a, b) for a, b in pairwise(edges)}
