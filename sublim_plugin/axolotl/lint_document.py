"""An axolotl YAML as axolotl reads it (PyYAML's `safe_load`), with the line of every key.

PyYAML follows YAML 1.1: `2e-4` is text, `010` is eight, `no` is false, and of two equal keys the
last one counts. `sublim_plugin.core.strict_yaml` would refuse or read otherwise what axolotl takes,
so it is of no use here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.strict_yaml import read_text

Level = Literal["error", "warning", "note"]
Place = tuple[Any, ...]

_MOST_NODES = 100_000
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
# What other readers (YAML 1.2, JSON, Python) take for a number, and PyYAML for text.
_NUMBER = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+")


class Finding(BaseModel):
    """One thing that is wrong (`error`), probably not meant (`warning`) or good to know (`note`).

    `key` is dotted from the top of the file; `line` counts from 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: Level
    file: str
    line: int
    key: str
    what: str
    way_out: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: {self.level}: "
        return where + (f"{self.key}: " if self.key else "") + f"{self.what}; {self.way_out}"


@dataclass
class Document:
    """A parsed YAML: `data` as axolotl gets it, and where its keys and plain scalars stand."""

    path: Path
    data: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    written: dict[Place, str] = field(default_factory=dict)
    """Text of each unquoted scalar."""
    findings: list[Finding] = field(default_factory=list)

    def line(self, place: Place) -> int:
        """Line of a key or item, or of the nearest one above it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)

    def finding(self, level: Level, place: Place, what: str, way_out: str) -> Finding:
        """A finding at a place of this file."""
        return Finding(
            level=level,
            file=str(self.path),
            line=self.line(place),
            key=".".join(str(part) for part in place),
            what=what,
            way_out=way_out,
        )

    def add(self, level: Level, place: Place, what: str, way_out: str) -> None:
        """Keep a finding at a place of this file."""
        self.findings.append(self.finding(level, place, what, way_out))

    def text_number(self, place: Place) -> str | None:
        """The scalar at `place`, if it is a number to everyone but PyYAML."""
        text = self.written.get(place)
        return text if text is not None and _NUMBER.fullmatch(text) else None

    def reading(self, place: Place, value: Any) -> str:
        """' (YAML reads `no` as false)', where what was read is not what was written."""
        text = self.written.get(place)
        if text is None:
            return ""
        if isinstance(value, bool):
            plain = text.lower() in ("true", "false")
            return "" if plain else f" (YAML reads `{text}` as {str(value).lower()})"
        if isinstance(value, str | int | float | None):
            return ""
        return f" (YAML reads `{text}` as a {type(value).__name__})"


def read_document(path: Path) -> Document:
    """Parse `path`. What YAML itself makes of it is in the findings; `data` is None if nothing.

    Raises:
        InputError: the file cannot be read.
    """
    document = Document(path)
    text = read_text(path)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _walk(document, node, (), [0]):
            document.data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document.lines[()] = mark.line + 1 if mark else 1
        document.add("error", (), f"not valid YAML: {error.problem or error.context}", _RULES)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        document.add("error", (), f"not valid YAML: {error}", _RULES)
    if not document.findings and not isinstance(document.data, dict):
        document.add("error", (), "no mapping of keys and values", "write `key: value` lines")
    return document


_RULES = "axolotl reads plain YAML: spaces for indentation, a space after each colon, no tags"


def _walk(document: Document, node: yaml.Node, place: Place, count: list[int]) -> bool:
    """Note every key's line; False where the aliases of a file expand without end."""
    count[0] += 1
    if count[0] > _MOST_NODES or len(place) > 64:
        document.add("error", (), "too many aliases or too deeply nested", "write it out")
        return False
    document.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return all(
            _walk(document, value, (*place, key), count)
            for key, value in _pairs(document, node, place)
        )
    if isinstance(node, yaml.SequenceNode):
        return all(
            _walk(document, item, (*place, index), count) for index, item in enumerate(node.value)
        )
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        document.written.setdefault(place, node.value)
        _check_scalar(document, place, node.value, node.tag)
    return True


def _pairs(
    document: Document, node: yaml.MappingNode, place: Place
) -> Iterator[tuple[Any, yaml.Node]]:
    """Keys and values of a mapping, its own first, then those merged in by `<<`."""
    seen: dict[Any, int] = {}
    merged: list[yaml.Node] = []
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == "tag:yaml.org,2002:merge":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            continue
        key = _key(key_node)
        document.lines[(*place, key)] = line
        if key in seen:
            what = f"stands twice, first on line {seen[key]}, and the last one counts"
            document.add("error", (*place, key), what, "remove one")
        else:
            seen[key] = line
            yield key, value
    for mapping in merged:
        if isinstance(mapping, yaml.MappingNode):
            for key_node, value in mapping.value:
                if (key := _key(key_node)) not in seen:
                    seen[key] = 0
                    document.lines[(*place, key)] = key_node.start_mark.line + 1
                    yield key, value


def _key(node: yaml.Node) -> Any:
    """A key as PyYAML constructs it: `on` is True."""
    if not isinstance(node, yaml.ScalarNode):
        return str(node.value)
    return yaml.safe_load(yaml.serialize(node, Dumper=yaml.SafeDumper))


def _check_scalar(document: Document, place: Place, text: str, tag: str) -> None:
    if _LEADING_ZERO.fullmatch(text):
        value = yaml.safe_load(text)
        document.add(
            "error",
            place,
            f"`{text}` has a leading zero, which YAML reads as {value!r}",
            f'write {text.lstrip("+-0_") or "0"}, or "{text}" for text',
        )
    elif tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and _BASE_60.fullmatch(text):
        document.add(
            "error",
            place,
            f"`{text}` is a number to base 60 in YAML, {yaml.safe_load(text)}",
            f'write "{text}" for text',
        )
