"""Gates: at which positions, in which layers and modules a student's change of its base is on.

Pure data, the same in YAML and in Python:

    gates:
      - name: only the names
        positions: {only: [entity]}
        decode: off
      - name: all but the MLPs of the early layers
        layers: {only: [0-13]}
        modules: {only: [mlp]}
        complement: true
        decode: {as: last_token}

A gate is the product of three choices, each `only` these or all `except` these; a choice that is
left out is everything. `complement` turns the product around. What holds for generated tokens is
never implied: `decode` has no default.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import canonical_json, sha256_json
from sublim_plugin.core.strict_yaml import load_model

Item = TypeVar("Item")

_RANGE = re.compile(r"(\d+)-(\d+)")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Text(_Frozen):
    """The tokens that overlap a substring of the prompt: every occurrence, or the n-th (from 1)."""

    text: Annotated[str, Field(min_length=1)]
    occurrence: Annotated[int, Field(ge=1)] | None = None


class Tokens(_Frozen):
    """Tokens by index; -1 is the prompt's last one."""

    tokens: Annotated[tuple[int, ...], Field(min_length=1)]


Selector = str | Text | Tokens
"""A span's name (`entity`, or `entity:2` for the second), a substring, or indices."""


class Choice(_Frozen, Generic[Item]):
    """`only` these or all `except` these."""

    only: tuple[Item, ...] | None = None
    except_: Annotated[tuple[Item, ...] | None, Field(alias="except")] = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.only is None) == (self.except_ is None) or not self.named:
            raise ValueError("expected either `only` or `except`, with at least one item")
        return self

    @property
    def named(self) -> tuple[Item, ...]:
        return self.only or self.except_ or ()

    def holds(self, is_named: bool) -> bool:
        """Whether something is chosen that is, or is not, among the named."""
        return is_named == (self.only is not None)


def _layers(item: int | str) -> int | str:
    found = _RANGE.fullmatch(item) if isinstance(item, str) else None
    if found and int(found[1]) > int(found[2]):
        raise ValueError("expected the lower layer first, as in 0-13")
    if isinstance(item, str) and item not in ("early", "late") and not found:
        raise ValueError("expected a layer such as 3, a range such as 0-13, early or late")
    return item


LayerItem = Annotated[int | str, AfterValidator(_layers)]
"""A layer counted from 0, an inclusive range `0-13`, or `early` / `late`, the halves."""


class As(_Frozen):
    """Generated tokens are treated as a span of the prompt is."""

    span: Annotated[Selector, Field(alias="as")]


class Gate(_Frozen):
    """Where the student's change is on.

    Attributes:
        name: a label, which never enters a hash.
        positions, layers, modules: choices; None is everything. Modules are names such as `q_proj`
            or families: `attention`, `mlp`, `norms`. A module outside the layers (`lm_head`) is in
            no layer: `only` leaves it out, `except` keeps it.
        complement: on outside the product of the choices instead of inside it.
        decode: at generated tokens, `on`: the student in the chosen layers and modules (with
            `complement`: everywhere); `off`: the base; or as at a span of the prompt.
    """

    name: Annotated[str, Field(min_length=1)] | None = None
    positions: Choice[Selector] | None = None
    layers: Choice[LayerItem] | None = None
    modules: Choice[str] | None = None
    complement: bool = False
    decode: Literal["on", "off"] | As

    @property
    def sha256(self) -> str:
        """Hash of what the gate says, without its name and the order of its items.

        `early` and `0-14` are two gates here, as `entity` and the tokens that it stands for are:
        what they mean is the model's and the prompt's (see `resolve.Resolved.key`).
        """
        return sha256_json(self.canonical())

    def canonical(self) -> dict[str, Any]:
        """The gate without its name; ranges of layers written out, items sorted."""
        fields: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        fields.pop("name", None)
        for key in ("positions", "layers", "modules"):
            for way, items in fields.get(key, {}).items():
                if key == "layers":
                    items = [layer for item in items for layer in _written_out(item)]
                for item in items:
                    if isinstance(item, dict) and "tokens" in item:
                        item["tokens"] = sorted(set(item["tokens"]))
                unique = {canonical_json(item): item for item in items}
                fields[key][way] = [unique[text] for text in sorted(unique)]
        return fields

    @property
    def label(self) -> str:
        """The name, or what the gate says in words."""
        return self.name or self.words

    @property
    def words(self) -> str:
        """Where the gate is on, without generated tokens."""
        parts = []
        for kind in ("positions", "layers", "modules"):
            choice: Choice[Any] | None = getattr(self, kind)
            if choice is not None:
                way = "only" if choice.only is not None else "all but"
                parts.append(f"{way} {kind} {', '.join(map(shown, choice.named))}")
        text = "; ".join(parts) or "everything"
        return f"all but ({text})" if self.complement else text

    @property
    def decode_label(self) -> str:
        return f"as {shown(self.decode.span)}" if isinstance(self.decode, As) else self.decode


def shown(item: Any) -> str:
    """A selector or layer item in a message."""
    if isinstance(item, Text):
        which = f" ({item.occurrence})" if item.occurrence else ""
        return f"text {item.text!r}{which}"
    if isinstance(item, Tokens):
        return f"tokens {', '.join(map(str, item.tokens))}"
    return str(item)


def _written_out(item: int | str) -> list[int | str]:
    found = _RANGE.fullmatch(item) if isinstance(item, str) else None
    return list(range(int(found[1]), int(found[2]) + 1)) if found else [item]


def chosen_layers(choice: Choice[LayerItem], count: int) -> frozenset[int]:
    """The named layers of a model with `count` of them.

    Raises:
        InputError: a layer that the model does not have, or that two items name.
    """
    owners: dict[int, LayerItem] = {}
    for item in choice.named:
        if item == "early":
            layers = list(range(count // 2))
        elif item == "late":
            layers = list(range(count // 2, count))
        else:
            layers = [int(layer) for layer in _written_out(item)]
            if not 0 <= layers[0] <= layers[-1] < count:
                raise InputError(
                    f"layers: {item} is not in the model, whose layers are 0-{count - 1}"
                )
        for layer in layers:
            if layer in owners:
                raise InputError(
                    f"layers: '{owners[layer]}' and '{item}' overlap in layer {layer}; name each "
                    "layer once"
                )
            owners[layer] = item
    return frozenset(owners)


class PatchSpec(_Frozen):
    """What is taken from where.

    Attributes:
        recipient: the base's context; the donor's is that of the localization.
        donor_at: its last token is where activations are taken.
        modules, layers: whose outputs, by name (`down_proj`) or family (`attention`, `mlp`,
            `norms`: each of its modules); the paper's are `down_proj` of the early half. They need
            not be among those that the student changes.
        recipient_at: where they are put, each at its last token; None is the first entity and the
            paper's controls: the second entity, the first token of the system text and of the
            question, and the prompt's last.
    """

    recipient: Context
    donor_at: Selector = "entity:1"
    modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("down_proj",)
    layers: Choice[LayerItem] | None = Choice[LayerItem](only=("early",))
    recipient_at: Annotated[tuple[Selector, ...], Field(min_length=1)] | None = None


def load_patch(path: Path) -> PatchSpec:
    """The patch of a YAML file.

    Raises:
        InputError: with file, line and key.
    """
    return load_model(path, PatchSpec)


class _GateFile(_Frozen):
    gates: Annotated[tuple[Gate, ...], Field(min_length=1)]


def load_gates(path: Path) -> tuple[Gate, ...]:
    """The gates of a YAML file.

    Raises:
        InputError: with file, line and key; or two gates of one name, or that say the same.
    """
    gates = load_model(path, _GateFile).gates
    labels: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for gate in gates:
        if gate.label in labels:
            raise InputError(f"{path}: two gates are called '{gate.label}'; rename one")
        if gate.sha256 in hashes:
            raise InputError(
                f"{path}: '{hashes[gate.sha256]}' and '{gate.label}' are the same gate; remove one"
            )
        labels[gate.label] = hashes[gate.sha256] = gate.label
    return gates
