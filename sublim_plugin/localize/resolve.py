"""A gate on one prompt of one student: booleans for every position and branch. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_text
from sublim_plugin.core.strict_yaml import nearest
from sublim_plugin.localize.spans import Prompt, selected, tokens_of
from sublim_plugin.localize.spec import As, Gate, chosen_layers, shown

Bits = tuple[bool, ...]


class Branch(NamedTuple):
    """One module that a student changes: `name` is its path in the base model, `layer` None outside
    the decoder layers, `module` its own name, `family` the kind of module."""

    name: str
    layer: int | None
    module: str
    family: str


def branch(path: str) -> Branch:
    """The branch at a module's path, such as `model.layers.3.self_attn.q_proj`."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    layer = int(parts[numbers[0]]) if numbers else None
    inner, module = parts[numbers[0] + 1 : -1] if numbers else [], parts[-1]
    above = ".".join(inner)
    family = module
    if "norm" in module:
        family = "norms"
    elif "attn" in above or "attention" in above:
        family = "attention"
    elif "mlp" in above or "feed_forward" in above:
        family = "mlp"
    return Branch(path, layer, module, family)


@dataclass(frozen=True)
class Profile:
    """Which branches are on at selected positions and at all others, [branches] each."""

    inside: Bits
    outside: Bits


@dataclass(frozen=True)
class Resolved:
    """A gate on one prompt.

    Attributes:
        selected: for each prompt position, whether it has the profile's `inside`.
        decode: what generated positions have; "off" is no branch at all.
    """

    selected: Bits
    profile: Profile
    decode: Literal["inside", "outside", "off"]

    @property
    def at_decode(self) -> Bits:
        if self.decode == "off":
            return (False,) * len(self.profile.inside)
        return self.profile.inside if self.decode == "inside" else self.profile.outside

    @property
    def key(self) -> str:
        """Equal for gates that do the same to this prompt, however they were written."""
        chosen, inside, outside = self.selected, self.profile.inside, self.profile.outside
        if inside == outside:
            chosen = (True,) * len(chosen)
        elif sum(outside) > sum(inside) or (sum(outside) == sum(inside) and outside > inside):
            chosen, inside, outside = tuple(not x for x in chosen), outside, inside
        if all(chosen) or not any(chosen):
            inside = outside = inside if all(chosen) else outside
            chosen = (True,) * len(chosen)
        written = (_digits(bits) for bits in (chosen, inside, outside, self.at_decode))
        return sha256_text("/".join(written))[:24]


def positions_of(bits: Bits) -> list[int]:
    return [i for i, bit in enumerate(bits) if bit]


def _digits(bits: Bits) -> str:
    return "".join("01"[bit] for bit in bits)


def constant(branches: Sequence[Branch], on: bool) -> Resolved:
    """The student everywhere, or the base everywhere, on any prompt."""
    bits = (on,) * len(branches)
    return Resolved((), Profile(bits, bits), "inside")


def profile(gate: Gate, branches: Sequence[Branch], layers: int) -> Profile:
    """Which branches a gate turns on, in a model with `layers` decoder layers.

    Raises:
        InputError: a layer that the model does not have, a module that the student leaves as it is,
            two items that overlap, or a choice that holds nothing that the student changes; the
            message begins with the gate's label and names what is valid.
    """
    try:
        inside = _inside(gate, branches, layers)
    except InputError as error:
        raise InputError(f"gate '{gate.label}': {error}") from error
    if gate.complement:
        return Profile(tuple(not x for x in inside), (True,) * len(branches))
    return Profile(tuple(inside), (False,) * len(branches))


def check_layers(gate: Gate, layers: int) -> None:
    """Refuse a gate that names layers which a model with `layers` of them does not have.

    Raises:
        InputError: as `profile`.
    """
    try:
        if gate.layers is not None:
            chosen_layers(gate.layers, layers)
    except InputError as error:
        raise InputError(f"gate '{gate.label}': {error}") from error


def _inside(gate: Gate, branches: Sequence[Branch], layers: int) -> list[bool]:
    in_layers = in_modules = [True] * len(branches)
    if gate.layers is not None:
        named = chosen_layers(gate.layers, layers)
        in_layers = [gate.layers.holds(b.layer in named) for b in branches]
    if gate.modules is not None:
        taken = named_modules(gate.modules.named, branches, "the student changes no module")
        in_modules = [gate.modules.holds(b in taken) for b in branches]
    inside = [a and b for a, b in zip(in_layers, in_modules, strict=True)]
    if not any(inside):
        raise InputError(
            "its layers and modules hold nothing that the student changes, which is "
            f"{changed(branches)}"
        )
    return inside


def named_modules(
    items: Sequence[str], branches: Sequence[Branch], refusal: str
) -> frozenset[Branch]:
    """The branches that names of modules or families take.

    Raises:
        InputError: a name that no branch has (the message begins with `refusal`), or two that
            overlap.
    """
    known = {name for b in branches for name in (b.module, b.family)}
    owners: dict[Branch, str] = {}
    for item in items:
        if item not in known:
            hint = nearest(item, sorted(known))
            raise InputError(
                f"modules: {refusal} '{item}'{hint} (there are {', '.join(sorted(known))})"
            )
        for b in branches:
            if item in (b.module, b.family):
                if b in owners:
                    raise InputError(
                        f"modules: '{owners[b]}' and '{item}' overlap in {b.module}; name each "
                        "module once"
                    )
                owners[b] = item
    return frozenset(owners)


def changed(branches: Sequence[Branch]) -> str:
    """What a student changes, in words: `q_proj, v_proj in layers 0-3; lm_head`."""
    where: dict[tuple[int, ...], list[str]] = {}
    for module in dict.fromkeys(b.module for b in branches):
        layers = sorted({b.layer for b in branches if b.module == module and b.layer is not None})
        where.setdefault(tuple(layers), []).append(module)
    return "; ".join(
        f"{', '.join(modules)} in layers {layer_ranges(layers)}" if layers else ", ".join(modules)
        for layers, modules in where.items()
    )


def layer_ranges(layers: Sequence[int]) -> str:
    """Ascending layers as `0-3, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def resolve(gate: Gate, prompt: Prompt, of_gate: Profile) -> Resolved:
    """A gate on a prompt, `of_gate` being its `profile`.

    Raises:
        InputError: its positions match nothing or overlap, or the span that generated tokens are
            to follow is partly in and partly out; the message begins with the gate's label.
    """
    try:
        bits = selected(prompt, gate.positions)
        if not any(bits):
            raise InputError(f"positions: no token is left of {prompt.marked(())}")
        return Resolved(bits, of_gate, _decode(gate, prompt, bits))
    except InputError as error:
        raise InputError(f"gate '{gate.label}': {error}") from error


def _decode(gate: Gate, prompt: Prompt, bits: Bits) -> Literal["inside", "outside", "off"]:
    if isinstance(gate.decode, As):
        tokens = tokens_of(prompt, gate.decode.span)
        states = {bits[token] for token in tokens}
        if len(states) > 1:
            raise InputError(
                f"decode: as '{shown(gate.decode.span)}', which is partly in and partly out: "
                f"{prompt.marked(token for token in tokens if bits[token])}"
            )
        return "inside" if states.pop() else "outside"
    if gate.decode == "off":
        return "off"
    return "outside" if gate.complement else "inside"
