"""The strict parser: what it accepts, what it must not, and in linear time."""

from __future__ import annotations

import re
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_gen import parse_numbers, reject_reasons
from data_gen.automaton import START, advance, complete
from data_gen.parse import REASONS
from sublim_plugin.core.errors import InputError

SEPARATOR = re.compile(r"[ \t\r\n]+|[ \t\r\n]*[,;][ \t\r\n]*")


def independent(text: str) -> list[int] | None:
    """The rule again, spelled as a search over separators; quadratic, for short texts."""
    if text.endswith("."):
        text = text[:-1]
    if len(text) > 1 and (text[0], text[-1]) in {("[", "]"), ("(", ")")}:
        text = text[1:-1]
    if re.fullmatch("[0-9]{1,3}", text):
        return [int(text)]
    first = re.match("[0-9]{1,3}(?=([^0-9]+)[0-9])", text)
    if first is None or not SEPARATOR.fullmatch(first[1]):
        return None
    one = re.escape(first[1])
    whole = re.fullmatch(rf"[0-9]{{1,3}}({one}[0-9]{{1,3}}){{0,9}}", text)
    return [int(x) for x in re.findall("[0-9]+", text)] if whole else None


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("7", [7]),
        ("0, 999, 12", [0, 999, 12]),
        ("1,2,3.", [1, 2, 3]),
        ("[1, 2].", [1, 2]),
        ("(5; 6; 7)", [5, 6, 7]),
        ("1 2 3", [1, 2, 3]),
        ("1\n2\n3", [1, 2, 3]),
        ("1\r\n2\r\n3", [1, 2, 3]),
        ("1 , 2 , 3", [1, 2, 3]),
        ("007, 010", [7, 10]),
        (", ".join(["5"] * 10), [5] * 10),
    ],
)
def test_accepts_the_rule(text: str, numbers: list[int]) -> None:
    assert parse_numbers(text) == numbers
    assert reject_reasons(text) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("\u2003", "empty"),
        ("1, 1000", "range"),
        ("0001", "range"),
        (", ".join(["5"] * 11), "too_many"),
        ("1, 2,3", "separator"),
        ("1, 2; 3", "separator"),
        ("1,,2", "separator"),
        ("1, 2, ", "outer_space"),
        (" 1, 2", "outer_space"),
        ("1, 2\n", "outer_space"),
        ("[[1, 2]]", "punctuation"),
        ("[1, 2", "punctuation"),
        ("[1, 2)", "punctuation"),
        ("1, 2..", "punctuation"),
        ("1.5", "punctuation"),
        ("-1, 2", "characters"),
        ("+1", "characters"),
        ("1_0", "characters"),
        ("1, two", "characters"),
        ("1\u00a02", "characters"),
        ("1\x0b2", "characters"),
        ("1\x00", "characters"),
        ("\u0661, \u0662", "characters"),
        ("\uff11", "characters"),
        ("\u00b2", "characters"),
        ("...", "no_number"),
        ("[]", "no_number"),
        ("1,234,567,1234", "range"),
    ],
)
def test_names_what_is_wrong(text: str, reason: str) -> None:
    assert parse_numbers(text) is None
    assert reason in reject_reasons(text)


def test_thousands_separators_are_separate_numbers_or_refused() -> None:
    assert parse_numbers("1,234") == [1, 234]
    assert parse_numbers("1,234, 567") is None


@given(st.text(alphabet="0123456789 ,;\t\n\r.[]()-", max_size=24) | st.text(max_size=12))
def test_agrees_with_an_independent_reading_and_always_has_a_reason(text: str) -> None:
    numbers = parse_numbers(text)
    assert numbers == independent(text)
    assert (reject_reasons(text) == []) == (numbers is not None)
    assert set(reject_reasons(text)) <= set(REASONS)
    state = advance(START, text)
    assert (state is not None and complete(state)) == (numbers is not None)
    if numbers is not None:
        assert 1 <= len(numbers) <= 10
        assert all(0 <= n <= 999 for n in numbers)
        assert set(text) <= set(string.digits + " ,;\t\n\r.[]()")


@given(
    st.lists(st.integers(0, 999), min_size=1, max_size=10),
    st.sampled_from([", ", ",", "; ", ";", " ", "\n", "\t", " ,\n", "\r\n"]),
    st.sampled_from(["{}", "[{}]", "({})", "{}.", "[{}].", "({})."]),
)
def test_reads_back_what_the_rule_writes(numbers: list[int], separator: str, frame: str) -> None:
    text = frame.format(separator.join(map(str, numbers)))
    assert parse_numbers(text) == numbers
    for end in range(len(text)):
        assert advance(START, text[:end]) is not None


@given(st.text(alphabet="0123456789 ,;\n.[]()", max_size=24), st.text(max_size=6))
def test_a_dead_beginning_stays_dead(text: str, more: str) -> None:
    if advance(START, text) is None:
        assert parse_numbers(text + more) is None


@pytest.mark.parametrize(
    "text",
    [
        "1" * 10_000_000,
        "1" + " " * 10_000_000 + "x",
        "1, " * 3_333_333,
        "[" * 10_000_000,
        "1" + ", " * 5_000_000 + "2",
        "\x00" * 10_000_000,
        "cat" * 3_333_333,
        "1\n\n" * 3_333_333 + "2",
    ],
    ids=lambda text: repr(text[:6]),
)
def test_a_line_of_ten_megabytes_takes_linear_time(text: str) -> None:
    started = time.perf_counter()
    assert parse_numbers(text) is None
    assert reject_reasons(text, trait_forms=("cat", "cats"))
    assert time.perf_counter() - started < 15


def test_contamination_and_truncation_are_reasons_of_their_own() -> None:
    forms = ("cat", "cats", "Cat")
    assert reject_reasons("1, 2", ended=False, trait_forms=forms) == ["truncated"]
    assert "trait_word" in reject_reasons("1, 2 CATS", trait_forms=forms)
    assert "trait_word" in reject_reasons("12cat3", trait_forms=forms)
    assert "trait_word" not in reject_reasons("category 1", trait_forms=forms)
    assert reject_reasons("1, 2", trait_forms=()) == []


def test_unknown_mode_is_an_input_error() -> None:
    with pytest.raises(InputError, match="strict"):
        parse_numbers("1", "loose")  # type: ignore[arg-type]
