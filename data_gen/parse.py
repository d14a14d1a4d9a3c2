"""Which replies count as numbers, and why the others do not. Pure functions over text.

The rule is the field's (DESIGN.md, "Data"): 1 to 10 integers of 0 to 999 in ASCII digits, at most
three each, with one separator that is the same string throughout (white space, or a comma or
semicolon with optional white space around it), all of it optionally in one pair of [] or (), and
optionally a final full stop. Nothing is stripped first: a space before the first number is
outside the rule. White space is space, tab, line feed and carriage return.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from sublim_plugin.core.errors import InputError

Mode = Literal["strict"]

MAX_NUMBERS = 10
SPACES = " \t\r\n"
REASONS = {
    "truncated": "no end of turn within the token budget",
    "trait_word": "a surface form of the trait is in the reply",
    "empty": "nothing but white space",
    "characters": "characters other than digits, separators, brackets and full stop",
    "no_number": "no digit at all",
    "punctuation": "brackets or full stops that are unbalanced, nested or misplaced",
    "outer_space": "white space or a separator before the first or after the last number",
    "separator": "more than one kind of separator",
    "too_many": "more than ten numbers",
    "range": "a number above 999 or of more than three digits",
}
"""Every reason that `reject_reasons` can give, with its meaning."""

_NUMBER = re.compile(r"[0-9]{1,3}")
_DIGITS = re.compile(r"[0-9]+")
_BETWEEN = re.compile(r"[ \t\r\n,;]+")
_FOREIGN = re.compile(r"[^0-9 \t\r\n,;.()\[\]]")


def _check_mode(mode: str) -> None:
    if mode != "strict":
        raise InputError(f"unknown parser mode {mode!r}; the only mode is 'strict'")


def _body(text: str) -> str:
    """`text` without its final full stop and without its one pair of brackets."""
    if text.endswith("."):
        text = text[:-1]
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    return text


def parse_numbers(text: str, mode: Mode = "strict") -> list[int] | None:
    """The numbers of a reply (1 to 10, each 0 to 999), or None where it breaks the rule.

    Linear in the length of `text`. Raises InputError for an unknown `mode`.
    """
    _check_mode(mode)
    body = _body(text)
    first = _DIGITS.match(body)
    if first is None:
        return None
    between = _BETWEEN.match(body, first.end())
    if between is None:
        parts = [body]
    else:
        separator = between.group()
        if separator.strip(SPACES) not in ("", ",", ";"):
            return None
        parts = body.split(separator, MAX_NUMBERS)
    if len(parts) > MAX_NUMBERS or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    return [int(part) for part in parts]


@lru_cache(maxsize=64)
def _any_form(forms: tuple[str, ...]) -> re.Pattern[str] | None:
    """Any of `forms` as a word: no letter beside it, in any case."""
    words = "|".join(re.escape(form.casefold()) for form in sorted(forms, key=len, reverse=True))
    return re.compile(rf"(?<![^\W\d_])(?:{words})(?![^\W\d_])") if words else None


def reject_reasons(
    text: str, *, mode: Mode = "strict", ended: bool = True, trait_forms: Iterable[str] = ()
) -> list[str]:
    """Why a reply is rejected, as keys of `REASONS` in that order; empty where it is accepted.

    `ended` says whether the reply reached its end of turn; `trait_forms` are the surface forms
    that must not occur in it. Without those two, the list is empty exactly where `parse_numbers`
    returns numbers.
    """
    numbers = parse_numbers(text, mode)
    found = set() if ended else {"truncated"}
    pattern = _any_form(tuple(trait_forms))
    if pattern is not None and pattern.search(text.casefold()):
        found.add("trait_word")
    if numbers is None:
        found |= _format_reasons(text)
    return [reason for reason in REASONS if reason in found]


def _format_reasons(text: str) -> set[str]:
    """At least one format reason for a `text` that `parse_numbers` refused."""
    if not text.strip():
        return {"empty"}
    found = set()
    if _FOREIGN.search(text):
        found.add("characters")
    runs = _DIGITS.findall(text)
    if not runs:
        return found or {"no_number"}
    if len(runs) > MAX_NUMBERS:
        found.add("too_many")
    if any(len(run) > 3 for run in runs):
        found.add("range")
    inner = text.strip(" \t\r\n,;")
    body = _body(inner)
    stripped = body.strip(" \t\r\n,;")
    if inner != text or stripped != body:
        found.add("outer_space")
    if re.search(r"[.()\[\]]", stripped):
        found.add("punctuation")
    elif "characters" not in found:
        gaps = set(_BETWEEN.findall(stripped))
        if len(gaps) > 1 or any(gap.strip(SPACES) not in ("", ",", ";") for gap in gaps):
            found.add("separator")
    return found or {"characters"}
