"""Strict YAML: safe loading, no doubled keys, `2e-4` is a number, errors with line and column."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from sublim_plugin.core.errors import InputError

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses doubled keys and reads YAML 1.2 numbers and booleans.

    PyYAML follows YAML 1.1, where `2e-4` is a string, `010` is eight and `on` is true.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.positions: dict[Location, tuple[int, int]] = {}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys (<<) are not supported", key.start_mark
                )


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag
        not in (
            "tag:yaml.org,2002:bool",
            "tag:yaml.org,2002:float",
            "tag:yaml.org,2002:int",
            "tag:yaml.org,2002:timestamp",
        )
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
_LEADING_ZERO = re.compile(r"^[-+]?0[0-9_]+$")


def parse_yaml(text: str, source: str = "<text>") -> tuple[Any, dict[Location, tuple[int, int]]]:
    """Parse one document.

    Returns:
        The value, and for each key or item its 1-based (line, column).

    Raises:
        InputError: not YAML, a doubled key, a tag, an alias bomb, or a number with a leading zero.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _check(node, (), loader.positions, source, depth=0)
        return loader.construct_document(node), loader.positions
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise InputError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check(
    node: yaml.Node,
    path: Location,
    positions: dict[Location, tuple[int, int]],
    source: str,
    depth: int,
) -> None:
    where = f"{source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
    if depth > 64 or len(positions) > 100_000:
        raise InputError(f"{where}: too deeply nested or too many aliases")
    positions.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line, column = key.start_mark.line + 1, key.start_mark.column + 1
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{source}:{line}:{column}: a key must be a plain word")
            if key.value in seen:
                raise InputError(
                    f"{source}:{line}:{column}: key '{key.value}' stands twice"
                    f" (first on line {seen[key.value]}); remove one"
                )
            seen[key.value] = line
            positions[(*path, key.value)] = (line, column)
            _check(value, (*path, key.value), positions, source, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check(item, (*path, index), positions, source, depth + 1)
    elif (
        isinstance(node, yaml.ScalarNode) and node.style is None and _LEADING_ZERO.match(node.value)
    ):
        raise InputError(
            f"{where}: {node.value} has a leading zero, which readers take for octal or text;"
            f' write {node.value.lstrip("+-0_") or "0"} or "{node.value}"'
        )


def load_yaml(path: Path) -> Any:
    """Load a YAML file strictly; see `parse_yaml` for what is refused."""
    return parse_yaml(read_text(path), str(path))[0]


def read_text(path: Path) -> str:
    """Read a UTF-8 file, or raise InputError with the path and the reason."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def load_model(path: Path, model: type[Model]) -> Model:
    """Load a YAML file into a pydantic model.

    Raises:
        InputError: one line per problem, each with file, line, column, the key, what was
            expected and, for an unknown key, the nearest valid one.
    """
    value, positions = parse_yaml(read_text(path), str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}:1:1: expected a mapping of keys, found {type(value).__name__}")
    return validate(value, model, source=str(path), positions=positions)


def validate(
    value: Any,
    model: type[Model],
    *,
    source: str,
    positions: dict[Location, tuple[int, int]] | None = None,
) -> Model:
    """Validate a plain value against a model, with errors as in `load_model`."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = [_describe(item, model, source, positions or {}) for item in error.errors()]
        raise InputError("\n".join(dict.fromkeys(lines))) from error


def nearest(word: str, choices: list[str]) -> str:
    """' (did you mean 'x'?)' or the list of valid names, to end an error message with."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid: {', '.join(sorted(choices))}" if choices else ""


def _describe(
    item: Any, model: type[BaseModel], source: str, positions: dict[Location, tuple[int, int]]
) -> str:
    location: Location = tuple(item["loc"])
    known = location
    while known and known not in positions:
        known = known[:-1]
    line, column = positions.get(known, (1, 1))
    where = f"{source}:{line}:{column}" if positions else source
    key = ".".join(str(part) for part in location) or "document"
    if item["type"] == "extra_forbidden":
        valid = _fields_at(model, location[:-1])
        return f"{where}: unknown key '{key}'{nearest(str(location[-1]), valid)}"
    if item["type"] == "missing":
        return f"{where}: key '{key}' is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    shown = repr(item["input"])
    got = f" (got {shown if len(shown) < 80 else shown[:77] + '...'})"
    return f"{where}: {key}: {message}{'' if isinstance(item['input'], dict | list) else got}"


def _fields_at(model: type[BaseModel], location: Location) -> list[str]:
    """Names of the fields of the model at a location inside `model` (all, where unions meet)."""
    models: list[type[BaseModel]] = [model]
    for part in location:
        if isinstance(part, int):
            continue
        found = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if found:
            models = [inner for annotation in found for inner in _models_in(annotation)]
    return sorted({(f.alias or name) for m in models for name, f in m.model_fields.items()})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, list, tuple, dict, set) or get_args(annotation):
        return [model for inner in get_args(annotation) for model in _models_in(inner)]
    return []
