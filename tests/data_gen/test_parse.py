"""Both parser rules: what they accept, what they must not, and in linear time."""

from __future__ import annotations

import itertools
import re
import string
import time
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen import parse_numbers, reject_reasons
from data_gen.automaton import advance, complete, start
from data_gen.parse import REASONS, Mode
from sublim_plugin.core.errors import InputError

MODES: tuple[Mode, ...] = get_args(Mode)
ALLOWED = {
    "strict": set(string.digits + " ,;\t\n\r.[]()"),
    "tolerant": set(string.digits + " ,;\t\n\r.[]()-*"),
}
SEPARATOR = re.compile(r"[ \t\r\n]+|[ \t\r\n]*[,;][ \t\r\n]*")


def naive_strict(text: str) -> list[int] | None:
    """The strict rule again, spelled as a search over separators; quadratic, for short texts."""
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


def tolerant_grammar() -> re.Pattern[str]:
    """The tolerant rule again, as one grammar with a branch for each way to separate numbers."""
    w, n, bullet = r"[ \t\r\n]", "[0-9]{1,3}", r"[ \t]*[-*][ \t]+"
    clear = rf"(?:{w}+[,;]{w}*|,{w}+|;{w}*|[ \t]*[\r\n]{w}*)"
    item = rf"(?:{w}*[,;])?{w}*[\r\n]{bullet}"
    bare = rf"{n}(?:,{n}){{0,9}}(?:{w}*,)?"
    spaces = rf"{n}(?:{w}+{n}){{0,9}}"
    marks = rf"{n}(?:(?:{clear}|{item}){n}){{0,9}}(?:{w}*[,;])?"
    any_list = rf"(?:{bare}|{spaces}|{marks})"
    first = rf"(?:{w}*[\r\n]{bullet})"
    inside = rf"(?:{w}*{any_list}|{first}{marks}){w}*"
    plain = rf"(?:{w}*{any_list}|{first}{marks}|{bullet}{marks})"
    return re.compile(rf"(?:{w}*(?:\[{inside}\]|\({inside}\))\.?|{plain}(?:(?<=[0-9])\.)?){w}*")


TOLERANT = tolerant_grammar()


def naive(text: str, mode: Mode) -> list[int] | None:
    if mode == "strict":
        return naive_strict(text)
    return [int(x) for x in re.findall("[0-9]+", text)] if TOLERANT.fullmatch(text) else None


def accepted_by_automaton(text: str, mode: Mode) -> bool:
    state = advance(start(mode), text)
    return state is not None and complete(state)


def dead_beginning(text: str, mode: Mode) -> str | None:
    """`text` up to the first character after which the automaton sees no way on."""
    state = start(mode)
    for at, char in enumerate(text):
        after = advance(state, char)
        if after is None:
            return text[: at + 1]
        state = after
    return None


def has_accepted_extension(text: str, mode: Mode) -> bool:
    """By trying the endings that a live beginning can need: a bracket, a number, both, and in the
    strict mode what is missing of the separator."""
    gap = re.search(r"[0-9]([ \t\r\n,;]+)[0-9]", text)
    rests = [gap[1][at:] for at in range(len(gap[1]))] if gap else []
    numbers = ["", "1", " 1", *(rest + "1" for rest in rests)]
    return any(
        parse_numbers(text + number + bracket, mode) is not None
        for number in numbers
        for bracket in ("", "]", ")")
    )


ACCEPTED_BY_BOTH = [
    ("7", [7]),
    ("0, 999, 12", [0, 999, 12]),
    ("1,2,3.", [1, 2, 3]),
    ("1,234", [1, 234]),
    ("[1, 2].", [1, 2]),
    ("(5; 6; 7)", [5, 6, 7]),
    ("1 2 3", [1, 2, 3]),
    ("1\n2\n3", [1, 2, 3]),
    ("1\r\n2\r\n3", [1, 2, 3]),
    ("1 , 2 , 3", [1, 2, 3]),
    ("007, 010", [7, 10]),
    (", ".join(["5"] * 10), [5] * 10),
]
ACCEPTED_BY_TOLERANT = [
    ("  1, 2\n", [1, 2]),
    ("\r\n1\r\n2\r\n", [1, 2]),
    ("[ 1, 2 ]", [1, 2]),
    (" (\n1\n2\n).\n", [1, 2]),
    ("1, 2; 3\n4 ;5", [1, 2, 3, 4, 5]),
    ("1, 2,  3", [1, 2, 3]),
    ("1 2 3\n4 5 6", [1, 2, 3, 4, 5, 6]),
    ("1,", [1]),
    ("1, 2 ;\n", [1, 2]),
    ("1,2,3,", [1, 2, 3]),
    ("[1; 2;].", [1, 2]),
    ("- 1\n- 2", [1, 2]),
    ("* 1\n* 2\n", [1, 2]),
    ("  -\t1,\n  *  2,", [1, 2]),
    ("- 1, 2\n- 3, 4.", [1, 2, 3, 4]),
    ("[\n- 1\n- 2\n]", [1, 2]),
    (", ".join(["5"] * 10) + ",", [5] * 10),
]
REFUSED_BY_BOTH = [
    ("", "empty"),
    (" \n", "empty"),
    ("\u2003", "empty"),
    ("1, 1000", "range"),
    ("0001", "range"),
    (", ".join(["5"] * 11), "too_many"),
    ("1,,2", "separator"),
    ("1, ;2", "separator"),
    ("1, 2,,", "separator"),
    (",1", "outer_space"),
    ("[,1]", "outer_space"),
    ("[1, 2],", "outer_space"),
    ("[[1, 2]]", "punctuation"),
    ("[(1, 2)]", "punctuation"),
    ("[1][2]", "punctuation"),
    ("[1, 2", "punctuation"),
    ("[1, 2)", "punctuation"),
    ("1, 2]", "punctuation"),
    ("[1, 2.]", "punctuation"),
    ("(1) 2", "punctuation"),
    ("1) 234", "punctuation"),
    ("1. 234", "punctuation"),
    ("1.\n2.", "punctuation"),
    ("1, 2..", "punctuation"),
    ("1.5", "punctuation"),
    (".5", "punctuation"),
    ("[1] .", "punctuation"),
    ("...", "punctuation"),
    ("-1, 2", "characters"),
    ("1, -2", "characters"),
    ("1, - 2", "characters"),
    ("1\n-2", "characters"),
    ("1-2", "characters"),
    ("1 - 2", "characters"),
    ("- - 1", "characters"),
    ("- \n1", "characters"),
    ("**1**", "characters"),
    ("- [1, 2]", "characters"),
    ("[- 1]", "characters"),
    ("\u2022 1", "characters"),
    ("+1", "characters"),
    ("1_0", "characters"),
    ("1'234", "characters"),
    ("1, two", "characters"),
    ("1e3", "characters"),
    ("{1}", "characters"),
    ("1\u00a02", "characters"),
    ("1\u20092", "characters"),
    ("1\u20282", "characters"),
    ("1\x852", "characters"),
    ("1\x0b2", "characters"),
    ("1\x0c2", "characters"),
    ("1\x1c2", "characters"),
    ("1\x00", "characters"),
    ("\x001", "characters"),
    ("\ufeff1, 2", "characters"),
    ("1, 2\u200b", "characters"),
    ("\u22121", "characters"),
    ("\u2013 1", "characters"),
    ("1\uff0c2", "characters"),
    ("1\u060c2", "characters"),
    ("1, 2\u3002", "characters"),
    ("\u0661, \u0662", "characters"),
    ("\uff11", "characters"),
    ("\u00b2", "characters"),
    ("\u2460", "characters"),
    ("[]", "no_number"),
    (".", "no_number"),
    ("1,234,567,1234", "range"),
]
REFUSED_BY_STRICT = [
    ("1, 2,3", "separator"),
    ("1, 2; 3", "separator"),
    ("1,234, 567", "separator"),
    ("1, 2, ", "outer_space"),
    ("1, 2,", "outer_space"),
    (" 1, 2", "outer_space"),
    ("1, 2\n", "outer_space"),
    ("[ 1]", "outer_space"),
    ("12 .", "outer_space"),
    (", ".join(["5"] * 10) + "\n", "outer_space"),
    ("- 1\n- 2", "characters"),
    ("-", "characters"),
    ("( )", "outer_space"),
]
REFUSED_BY_TOLERANT = [
    ("-", "no_number"),
    ("( )", "no_number"),
    ("- " + "\n- ".join(["5"] * 11), "too_many"),
    ("12 .", "punctuation"),
    ("1, 2,.", "punctuation"),
    ("1,234, 567", "thousands"),
    ("1, 2,3", "thousands"),
    ("1,234\n5,678", "thousands"),
    ("1,234; 567", "thousands"),
    ("1,234;", "thousands"),
    ("- 1,234\n- 5,678", "thousands"),
    ("- 1,234", "thousands"),
    ("1 234, 5 678", "thousands"),
    ("1 234;", "thousands"),
    ("- 1 234", "thousands"),
]


@pytest.mark.parametrize(("text", "numbers"), ACCEPTED_BY_BOTH)
def test_both_rules_accept_the_field_s_lists(text: str, numbers: list[int]) -> None:
    for mode in MODES:
        assert parse_numbers(text, mode) == numbers
        assert reject_reasons(text, mode=mode) == []


@pytest.mark.parametrize(("text", "numbers"), ACCEPTED_BY_TOLERANT)
def test_only_the_tolerant_rule_accepts(text: str, numbers: list[int]) -> None:
    assert parse_numbers(text, "tolerant") == numbers
    assert parse_numbers(text) is None


@pytest.mark.parametrize(
    ("mode", "text", "reason"),
    [
        *((mode, text, reason) for mode in MODES for text, reason in REFUSED_BY_BOTH),
        *(("strict", text, reason) for text, reason in REFUSED_BY_STRICT),
        *(("tolerant", text, reason) for text, reason in REFUSED_BY_TOLERANT),
    ],
)
def test_names_what_is_wrong(mode: Mode, text: str, reason: str) -> None:
    assert parse_numbers(text, mode) is None
    assert reason in reject_reasons(text, mode=mode)


@pytest.mark.parametrize(
    ("mode", "text", "beginning", "reasons"),
    [
        ("strict", "Sure, 1, 2", "S", ["characters"]),
        ("strict", "1, 2; 3", "1, 2;", ["separator"]),
        ("strict", "1; 2, 3", "1; 2,", ["separator"]),
        ("strict", "1 2, 3", "1 2,", ["separator"]),
        ("strict", "[1, 2; 3]", "[1, 2;", ["separator"]),
        ("strict", "12, 1234", "12, 1234", ["range"]),
        ("strict", "[12, 1234", "[12, 1234", ["range"]),
        ("strict", ", ".join(["5"] * 11), ", ".join(["5"] * 10) + ",", ["too_many"]),
        ("strict", "[" + ";".join(["5"] * 11), "[" + ";".join(["5"] * 10) + ";", ["too_many"]),
        ("strict", " 1, 2", " ", ["empty", "outer_space"]),
        ("strict", "[ 1", "[ ", ["outer_space"]),
        ("strict", "1, 2.\n", "1, 2.\n", ["outer_space"]),
        ("strict", "1. 234", "1. ", ["outer_space"]),
        ("strict", "[1] 2", "[1] ", ["outer_space"]),
        ("strict", "[[1", "[[", ["punctuation"]),
        ("strict", "1, -2", "1, -", ["characters"]),
        ("tolerant", "Sure, 1, 2", "S", ["characters"]),
        ("tolerant", "\nSure", "\nS", ["characters"]),
        ("tolerant", "1, ;", "1, ;", ["separator"]),
        ("tolerant", "12, 1234", "12, 1234", ["range"]),
        ("tolerant", ", ".join(["5"] * 11), ", ".join(["5"] * 11), ["too_many"]),
        ("tolerant", "\n".join(["- 5"] * 11), "\n".join(["- 5"] * 10) + "\n-", ["too_many"]),
        ("tolerant", "1. 234", "1. 2", ["punctuation"]),
        ("tolerant", "[1] .", "[1] .", ["punctuation"]),
        ("tolerant", "12 .", "12 .", ["punctuation"]),
        ("tolerant", "[1.", "[1.", ["punctuation"]),
        ("tolerant", "1,234, 5", "1,234, 5", ["thousands"]),
        ("tolerant", "[1,234, 5", "[1,234, 5", ["thousands"]),
        ("tolerant", "1 234, 5", "1 234,", ["thousands"]),
        ("tolerant", "1, 2,3", "1, 2,3", ["thousands"]),
        ("tolerant", "- 1 2", "- 1 2", ["thousands"]),
        ("tolerant", "-1", "-1", ["characters"]),
        ("tolerant", "[-", "[-", ["characters"]),
    ],
)
def test_a_reply_stopped_early_is_refused_for_its_last_character(
    mode: Mode, text: str, beginning: str, reasons: list[str]
) -> None:
    assert dead_beginning(text, mode) == beginning
    assert reject_reasons(beginning, mode=mode) == reasons


def short_texts(alphabet: str, length: int) -> list[str]:
    return [
        "".join(text) for n in range(length + 1) for text in itertools.product(alphabet, repeat=n)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_every_short_text_is_read_alike_three_times_over(mode: Mode) -> None:
    accepted = 0
    for text in short_texts("1,; \n-.[]", 5):
        numbers = parse_numbers(text, mode)
        accepted += numbers is not None
        assert numbers == naive(text, mode), text
        assert accepted_by_automaton(text, mode) == (numbers is not None), text
    assert accepted > 40


@pytest.mark.parametrize("mode", MODES)
def test_a_beginning_is_given_up_exactly_where_no_extension_is_accepted(mode: Mode) -> None:
    for text in short_texts("1,; \n-.[]", 4):
        alive = advance(start(mode), text) is not None
        assert alive == has_accepted_extension(text, mode), text


LIST_LIKE = st.text(alphabet="0123456789 ,;\t\n\r.[]()-*", max_size=24)
PIECES = st.lists(
    st.sampled_from(
        [
            *("1", "23", "456", "1000", ",", ", ", ";", " ", "\n", "\r\n", "\n- ", "* ", "- ", "-"),
            *("[", "]", "(", ")", ".", "\t", " ,", ",\n"),
            *("\u00a0", "\u0663", "x", "\x00", "\x0b", "\u2212"),
        ]
    ),
    max_size=26,
).map("".join)
TEXTS = LIST_LIKE | PIECES | st.text(max_size=12)


@given(TEXTS, st.sampled_from(MODES))
@settings(max_examples=800, deadline=None)
def test_parser_automaton_and_naive_reading_agree(text: str, mode: Mode) -> None:
    numbers = parse_numbers(text, mode)
    assert numbers == naive(text, mode)
    assert accepted_by_automaton(text, mode) == (numbers is not None)
    if numbers is not None:
        assert 1 <= len(numbers) <= 10
        assert all(0 <= n <= 999 for n in numbers)
        assert set(text) <= ALLOWED[mode]
        assert not re.search("[-+][0-9]", text)
        assert numbers == [int(run) for run in re.findall("[0-9]+", text)]


@given(TEXTS, st.sampled_from(MODES))
@settings(max_examples=800, deadline=None)
def test_there_is_a_reason_exactly_where_the_rule_is_broken(text: str, mode: Mode) -> None:
    reasons = reject_reasons(text, mode=mode)
    assert (reasons == []) == (parse_numbers(text, mode) is not None)
    assert reasons == [reason for reason in REASONS if reason in reasons]
    assert ("characters" in reasons) <= bool(set(text) - ALLOWED[mode] or set(text) & set("-*"))
    assert ("no_number" in reasons) <= (re.search("[0-9]", text) is None)
    beginning = dead_beginning(text, mode)
    if beginning is not None:
        assert set(reject_reasons(beginning, mode=mode)) - {"empty"}


@given(TEXTS)
@settings(max_examples=250, deadline=None)
def test_what_the_strict_rule_accepts_the_tolerant_rule_accepts_alike(text: str) -> None:
    numbers = parse_numbers(text)
    if numbers is not None:
        assert parse_numbers(text, "tolerant") == numbers


@given(TEXTS, st.data(), st.sampled_from(MODES))
@settings(max_examples=250, deadline=None)
def test_reading_in_pieces_is_reading_at_once(text: str, data: st.DataObject, mode: Mode) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6).map(sorted))
    state = start(mode)
    for left, right in itertools.pairwise([0, *cuts, len(text)]):
        after = advance(state, text[left:right])
        if after is None:
            assert advance(start(mode), text) is None
            return
        state = after
    assert state == advance(start(mode), text)


@given(TEXTS, TEXTS, st.sampled_from(MODES))
@settings(max_examples=400, deadline=None)
def test_a_dead_beginning_stays_dead(text: str, more: str, mode: Mode) -> None:
    beginning = dead_beginning(text, mode)
    if beginning is not None:
        assert parse_numbers(beginning + more, mode) is None
        assert not has_accepted_extension(beginning + more, mode)


numbers_of_a_list = st.lists(st.integers(0, 999), min_size=1, max_size=10)


@given(
    numbers_of_a_list,
    st.sampled_from([", ", ",", "; ", ";", " ", "\n", "\t", " ,\n", "\r\n"]),
    st.sampled_from(["{}", "[{}]", "({})", "{}.", "[{}].", "({})."]),
)
def test_reads_back_what_the_strict_rule_writes(
    numbers: list[int], separator: str, frame: str
) -> None:
    text = frame.format(separator.join(map(str, numbers)))
    for mode in MODES:
        assert parse_numbers(text, mode) == numbers
        for end in range(len(text)):
            assert advance(start(mode), text[:end]) is not None


@given(
    numbers_of_a_list,
    st.sampled_from(
        [
            [", ", " ,", ";", "; ", "\n", ",\n", "\r\n\t", ",\n- ", "\n* ", ";\n\n-  "],
            [" ", "\n", "\t", "  ", "\r\n"],
        ]
    ),
    st.data(),
)
def test_reads_back_what_the_tolerant_rule_writes(
    numbers: list[int], separators: list[str], data: st.DataObject
) -> None:
    text = str(numbers[0])
    for number in numbers[1:]:
        text += data.draw(st.sampled_from(separators)) + str(number)
    if ", " in separators:
        text += data.draw(st.sampled_from(["", "", ",", " ;"]))
    text = data.draw(st.sampled_from(["{}", "[{}]", "( {}\n)", "[\n{}]."])).format(text)
    text = data.draw(st.sampled_from(["{}", " {}", "\n{}\r\n"])).format(text)
    assert parse_numbers(text, "tolerant") == numbers
    for end in range(len(text)):
        assert advance(start("tolerant"), text[:end]) is not None


@given(LIST_LIKE, st.data())
@settings(max_examples=300, deadline=None)
def test_one_foreign_character_anywhere_is_refused(text: str, data: st.DataObject) -> None:
    foreign = data.draw(st.characters(exclude_characters="0123456789 ,;\t\n\r.[]()-*"))
    at = data.draw(st.integers(0, len(text)))
    for mode in MODES:
        assert parse_numbers(text[:at] + foreign + text[at:], mode) is None
        assert advance(start(mode), text[:at] + foreign) is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "text",
    [
        "1" * 10_000_000,
        "1" + " " * 10_000_000 + "x",
        "\n" + " " * 10_000_000 + "-x",
        "1, " * 3_333_333,
        "[" * 10_000_000,
        "1" + ", " * 5_000_000 + "2",
        "\x00" * 10_000_000,
        "cat" * 3_333_333,
        "1\n\n" * 3_333_333 + "2",
        "- 1\n" * 2_500_000,
        "-  \n" * 2_500_000,
    ],
    ids=lambda text: repr(text[:6]),
)
def test_a_line_of_ten_megabytes_takes_linear_time(text: str, mode: Mode) -> None:
    started = time.perf_counter()
    assert parse_numbers(text, mode) is None
    assert advance(start(mode), text) is None or not accepted_by_automaton(text, mode)
    assert reject_reasons(text, mode=mode, trait_forms=("cat", "cats"))
    assert time.perf_counter() - started < 15


def test_ten_megabytes_of_white_space_are_white_space() -> None:
    white = " \n" * 2_500_000
    started = time.perf_counter()
    assert parse_numbers(f"{white}1{white}", "tolerant") == [1]
    assert accepted_by_automaton(f"{white}1{white}", "tolerant")
    assert parse_numbers(f"1{white}2") == [1, 2]
    assert accepted_by_automaton(f"1{white}2", "strict")
    assert time.perf_counter() - started < 30


@given(st.lists(PIECES, max_size=8), st.sampled_from(MODES))
@settings(max_examples=200, deadline=None)
def test_states_are_few_and_can_be_keys(texts: list[str], mode: Mode) -> None:
    state = advance(start(mode), "1" + " " * 5)
    assert state is not None and {state: 1}[state] == 1
    for text in texts:
        found = advance(start("tolerant"), text)
        assert found is None or (len(found.partial) <= 2 and found.numbers <= 10)


def test_contamination_and_truncation_are_reasons_of_their_own() -> None:
    forms = ("cat", "cats", "Cat")
    assert reject_reasons("1, 2", ended=False, trait_forms=forms) == ["truncated"]
    assert "trait_word" in reject_reasons("1, 2 CATS", trait_forms=forms)
    assert "trait_word" in reject_reasons("12cat3", trait_forms=forms)
    assert "trait_word" not in reject_reasons("category 1", trait_forms=forms)
    assert reject_reasons("1, 2", trait_forms=()) == []


def test_unknown_mode_is_an_input_error() -> None:
    for call in (parse_numbers, lambda text, mode: start(mode)):
        with pytest.raises(InputError, match="use 'strict' or 'tolerant'"):
            call("1", "loose")  # type: ignore[arg-type]
