"""Keys and types of an axolotl config, held to the schema of the installed axolotl and its plugins.

axolotl 0.19 drops a key that it does not know, at any depth, without a word, and goes on without a
plugin that it cannot import.
"""

from __future__ import annotations

import copy
import difflib
import enum
import functools
import importlib
import logging
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import AliasChoices, BaseModel, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo

from sublim_plugin.axolotl.lint_document import Document, Place
from sublim_plugin.core.errors import MissingDependencyError

SUBLIM_PLUGIN = "sublim_plugin.axolotl.SublimPlugin"


def uses_sublim(data: Mapping[str, Any]) -> bool:
    """Whether the config lists our plugin, so that it is meant as an experiment of this kind."""
    listed = data.get("plugins")
    return isinstance(listed, list) and any(
        str(name).startswith("sublim_plugin.axolotl.") for name in listed
    )


def config_model(document: Document) -> type[BaseModel]:
    """axolotl's config model with the settings of the config's plugins merged in.

    Plugins are imported, as axolotl does; what cannot be is a finding.

    Raises:
        MissingDependencyError: axolotl is not installed.
    """
    try:
        from axolotl.utils.schemas.config import AxolotlInputConfig
    except ImportError as error:
        raise MissingDependencyError(
            'linting needs axolotl\'s own schema: pip install "sublim[train]"'
        ) from error
    merged: list[type[BaseModel]] = []
    listed = document.data.get("plugins")
    for index, name in enumerate(listed if isinstance(listed, list) else []):
        try:
            arguments = _plugin_arguments(str(name))
        except Exception as error:  # whatever importing somebody's module raises
            why = str(error).strip().splitlines()
            document.add(
                "error",
                ("plugins", index),
                f"plugin {name} cannot be imported ({type(error).__name__}:"
                f" {why[0] if why else 'no message'}), and axolotl would train without it",
                "correct the name, or install its package in this environment",
            )
            continue
        if arguments is not None:
            merged.append(arguments)
    return _merged_model(AxolotlInputConfig, tuple(merged))


def _plugin_arguments(name: str) -> type[BaseModel] | None:
    from axolotl.integrations.base import BasePlugin

    module, _, attribute = name.rpartition(".")
    if not module:
        raise ImportError("expected package.module.Class")
    plugin = getattr(importlib.import_module(module), attribute)
    if not (isinstance(plugin, type) and issubclass(plugin, BasePlugin)):
        raise TypeError("not a subclass of axolotl's BasePlugin")
    where = plugin().get_input_args()
    if where is None:
        return None
    module, _, attribute = where.rpartition(".")
    found: type[BaseModel] = getattr(importlib.import_module(module), attribute)
    return found


@functools.lru_cache(maxsize=16)
def _merged_model(base: type[BaseModel], more: tuple[type[BaseModel], ...]) -> type[BaseModel]:
    bases = tuple(model for model in more if not issubclass(base, model))
    return create_model("AxolotlConfig", __base__=(*bases, base)) if bases else base


def check_keys_and_types(document: Document, model: type[BaseModel]) -> None:
    """Find unknown keys and values of another type than the key takes."""
    check_mapping(document, document.data, model, ())


def check_mapping(
    document: Document, value: Mapping[Any, Any], model: type[BaseModel], place: Place
) -> None:
    """Hold the keys of a mapping, and what is in them, to a model of axolotl's schema."""
    fields = accepted(model)
    for key, inner in value.items():
        here = (*place, key)
        if key in fields:
            _check_value(document, inner, _annotation(fields[key]), here)
        elif place == ("fsdp_config",) and str(key).removeprefix("fsdp_") in fields:
            stripped = fields[str(key).removeprefix("fsdp_")]
            _check_value(document, inner, _annotation(stripped), here)
        else:
            level, what, way_out = _unknown(document, key, place, sorted(fields))
            document.add(level, here, what, way_out)


def accepted(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields of a model by every name under which a YAML may set them."""
    names: dict[str, FieldInfo] = {}
    for name, info in model.model_fields.items():
        choices = info.validation_alias
        others = choices.choices if isinstance(choices, AliasChoices) else [info.alias]
        for other in (name, *others):
            if isinstance(other, str):
                names[other] = info
    return names


def _annotation(info: FieldInfo) -> Any:
    constraints = tuple(info.metadata)
    return typing.Annotated[(info.annotation, *constraints)] if constraints else info.annotation


def _unknown(
    document: Document, key: Any, place: Place, valid: list[str]
) -> tuple[typing.Literal["error", "warning"], str, str]:
    from axolotl.utils.schemas.datasets import SFTDataset

    if not isinstance(key, str):
        return "error", f"YAML reads this key as {key!r}, which is no setting", "quote the key"
    if not place and key == "data_seed":
        way_out = f"write it under `sublim:` and list {SUBLIM_PLUGIN} under `plugins:`"
        return "error", "axolotl has no such key and drops it: rows are ordered by `seed`", way_out
    if not place and key == "sublim":
        way_out = f"list {SUBLIM_PLUGIN} under `plugins:`"
        return "error", "nothing reads this block without its plugin", way_out
    if place and place[0] in ("datasets", "test_datasets") and key in SFTDataset.model_fields:
        kind = document.data.get("rl") or "this type"
        what = f"axolotl drops this key in datasets for {kind}"
        return "warning", what, f"remove it; valid: {', '.join(valid)}"
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    if near:
        way_out = f"did you mean `{near[0]}`?"
    elif len(valid) <= 30:
        way_out = f"remove it; valid: {', '.join(valid)}"
    else:
        way_out = "remove it, or list the plugin that reads it under `plugins:`"
    return "error", "unknown key, which axolotl drops without a word", way_out


def _check_value(document: Document, value: Any, annotation: Any, place: Place) -> None:
    options = list(_options(annotation))
    if value is None or any(option in (Any, object) for option in options):
        _check_free(document, value, place)
        return
    if isinstance(value, Mapping):
        models = [option for option in options if _is_model(option)]
        dicts = [option for option in options if _container(option) is dict]
        if models:
            check_mapping(document, value, _chosen(document, value, models, place), place)
        elif dicts:
            inner = typing.get_args(dicts[0])[1] if typing.get_args(dicts[0]) else Any
            for key, item in value.items():
                _check_value(document, item, inner, (*place, key))
        else:
            _wrong_type(document, value, annotation, place)
    elif isinstance(value, list):
        lists = [option for option in options if _container(option) in (list, tuple)]
        if not lists:
            _wrong_type(document, value, annotation, place)
        for index, item in enumerate(value if lists else []):
            inner = typing.get_args(lists[0])[0] if typing.get_args(lists[0]) else Any
            _check_value(document, item, inner, (*place, index))
    else:
        _check_scalar(document, value, annotation, options, place)


def _check_scalar(
    document: Document, value: Any, annotation: Any, options: list[Any], place: Place
) -> None:
    numeric = {int, float} & set(options)
    if isinstance(value, bool) and numeric and not {bool, str} & set(options):
        _wrong_type(document, value, annotation, place)
        return
    try:
        _adapter(annotation).validate_python(value)
    except ValidationError as error:
        described = any(_is_model(option) for option in options)
        _wrong_type(document, value, annotation, place, error if described else None)
        return
    except Exception:  # axolotl's own validators fail in other ways too
        _wrong_type(document, value, annotation, place)
        return
    if numeric and (text := document.text_number(place)) is not None:
        document.add(
            "note",
            place,
            f"YAML reads {text} as text; axolotl makes a number of it here, other readers do not",
            f"write {_plain(text)}",
        )


def _check_free(document: Document, value: Any, place: Place) -> None:
    """What axolotl passes on unread: a number that is text arrives there as text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_free(document, item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_free(document, item, (*place, index))
    elif (text := document.text_number(place)) is not None:
        what = f"YAML reads {text} as text, and axolotl passes it on as text"
        document.add("error", place, what, f"write {_plain(text)}")


def _wrong_type(
    document: Document,
    value: Any,
    annotation: Any,
    place: Place,
    error: ValidationError | None = None,
) -> None:
    shown = repr(value) if len(repr(value)) < 60 else f"a {type(value).__name__}"
    way_out = f"expected {expected(annotation)}"
    if error is not None:
        way_out = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    elif isinstance(value, str) and (near := _near_choice(value, annotation)):
        way_out = f"did you mean `{near}`?"
    elif isinstance(value, bool) and str in _options(annotation):
        way_out += f', so write "{document.written.get(place, value)}"'
    elif (text := document.text_number(place)) is not None:
        way_out += f", so write {_plain(text)}"
    what = f"wrong type or value: {shown}{document.reading(place, value)}"
    document.add("error", place, what, way_out)


def _plain(text: str) -> str:
    number = float(text.replace("_", ""))
    shown = f"{number:.12f}".rstrip("0").rstrip(".")
    return shown if float(shown or "nan") == number else repr(number)


@functools.lru_cache(maxsize=1024)
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def _options(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation, without None and constraints."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _options(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from _options(inner)
    elif annotation is not type(None):
        yield annotation


def _container(option: Any) -> Any:
    return typing.get_origin(option) or option


def _is_model(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, BaseModel)


def _chosen(
    document: Document, value: Mapping[Any, Any], models: list[Any], place: Place
) -> type[BaseModel]:
    """The model of a union: for datasets the one that axolotl chooses, else the best fit."""
    if place and place[0] == "datasets" and len(place) == 2:
        from axolotl.utils.schemas import datasets

        rl = document.data.get("rl")
        if rl in ("dpo", "ipo", "simpo"):
            return datasets.DPODataset  # type: ignore[no-any-return]
        if rl == "kto":
            return datasets.KTODataset  # type: ignore[no-any-return]
        if value.get("type") == "_synthetic":
            return datasets.SyntheticDataset  # type: ignore[no-any-return]
        return datasets.SFTDataset  # type: ignore[no-any-return]
    best: type[BaseModel] = max(models, key=lambda model: len(set(value) & set(accepted(model))))
    return best


def expected(annotation: Any) -> str:
    """What a setting takes, in words."""
    words: list[str] = []
    for option in _options(annotation):
        if typing.get_origin(option) is typing.Literal:
            words += [str(choice) for choice in typing.get_args(option)]
        elif isinstance(option, type) and issubclass(option, enum.Enum):
            words += [str(choice.value) for choice in option]
        elif _is_model(option) or _container(option) is dict:
            words.append("a mapping")
        elif _container(option) in (list, tuple):
            words.append("a list")
        else:
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            words.append(names.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(dict.fromkeys(words))


def _near_choice(value: str, annotation: Any) -> str | None:
    choices: list[str] = []
    for option in _options(annotation):
        if typing.get_origin(option) is typing.Literal:
            choices += [str(choice) for choice in typing.get_args(option)]
        elif isinstance(option, type) and issubclass(option, enum.Enum):
            choices += [str(choice.value) for choice in option]
    return next(iter(difflib.get_close_matches(value, choices, n=1, cutoff=0.6)), None)


def check_as_axolotl_does(document: Document, model: type[BaseModel]) -> None:
    """Add what axolotl's own validation refuses and the checks of keys and types did not see."""
    data = copy.deepcopy(document.data)
    entries = data.get("datasets")
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict):
            chosen = _chosen(document, entry, [], ("datasets", index))
            try:
                data["datasets"][index] = chosen(**entry)
            except (ValidationError, TypeError) as error:
                _add_refusal(document, ("datasets", index), error)
                return
    logging.disable(logging.CRITICAL)
    try:
        model(**data)
    except Exception as error:  # validators of axolotl's fail in many ways on odd values
        _add_refusal(document, (), error)
    finally:
        logging.disable(logging.NOTSET)


def _add_refusal(document: Document, place: Place, error: Exception) -> None:
    known = {finding.key for finding in document.findings if finding.level == "error"}
    if not isinstance(error, ValidationError):
        if not known:
            what = f"axolotl fails on this config: {type(error).__name__}: {error}"
            document.add("error", place, what, "correct the value that it names")
        return
    for item in error.errors():
        where = (*place, *item["loc"])
        message = str(item["msg"]).removeprefix("Value error, ").strip()
        if item["type"] == "missing":
            message = "is required"
        if not item["loc"]:
            where = _named_key(document, message) or place
        elif any(key.split(".")[: len(where)] == [str(p) for p in where] for key in known):
            continue  # said already, in better words
        document.add("error", where, f"axolotl refuses this: {message}", "change what it names")


def _named_key(document: Document, message: str) -> Place | None:
    """The first key of the file that a message names, or else the key of a value that it names."""
    words = re.findall(r"[A-Za-z_][A-Za-z0-9_]+", message)
    keys = [word for word in words if (word,) in document.lines]
    values = {str(value): key for key, value in document.data.items() if isinstance(value, str)}
    keys += [values[word] for word in words if word in values]
    return (keys[0],) if keys else None
