"""Strict YAML: numbers are numbers, doubled keys are errors, and errors say where."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.strict_yaml import load_model, parse_yaml


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    learning_rate: float
    ranks: tuple[int, ...] = ()


class Outer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    training: Inner


def load(tmp_path: Path, text: str) -> Outer:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return load_model(path, Outer)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("10", 10),
        ("-3", -3),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("2026-01-02", "2026-01-02"),
        ("1_000", "1_000"),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: Any) -> None:
    found = parse_yaml(f"x: {text}")[0]["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"f:3:1: key 'a' stands twice \(first on line 1\)"),
        ("a:\n  b: 1\n  b: 2\n", r"f:3:3: key 'b' stands twice"),
        ("a: 010\n", r"f:1:4: 010 has a leading zero"),
        ("a: !!python/object/apply:os.system ['true']\n", r"f:1:4: not valid YAML"),
        ("a: [1, 2\nb: 3\n", r"f:2:\d+: not valid YAML"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", r"f:3:3: not valid YAML: merge keys"),
        ("? [1, 2]\n: 3\n", r"a key must be a plain word"),
        ("a: 1\n--- \nb: 2\n", r"not valid YAML"),
        ("a: \x00\n", r"not valid YAML"),
    ],
)
def test_what_is_refused_names_its_place(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_yaml(text, "f")


def test_an_alias_bomb_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 12):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    with pytest.raises(InputError, match="too deeply nested or too many aliases"):
        parse_yaml("\n".join(lines))


def test_an_unknown_key_names_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, "name: x\ntraining:\n  learning_rat: 2e-4\n  learning_rate: 1\n")
    assert str(caught.value) == (
        f"{tmp_path}/study.yaml:3:3: unknown key 'training.learning_rat'; did you mean"
        " 'learning_rate'?"
    )


def test_all_problems_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, "name: 3\ntraining:\n  learning_rate: fast\n  ranks: [1, x]\n")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in lines] == [
        "study.yaml:1:1",
        "study.yaml:3:3",
        "study.yaml:4:14",
    ]


def test_a_missing_key_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="key 'training' is missing"):
        load(tmp_path, "name: x\n")
    with pytest.raises(InputError, match="expected a mapping of keys, found list"):
        load(tmp_path, "- x\n")
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "other.yaml", Outer)


@given(st.text(max_size=200))
def test_any_text_parses_or_is_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        parse_yaml(text)


@given(st.one_of(st.integers(-(10**9), 10**9), st.floats(allow_nan=False, allow_infinity=False)))
def test_numbers_survive(number: float) -> None:
    text = repr(number)
    assert parse_yaml(f"x: {text}")[0]["x"] == number
