"""Which replies count as numbers, and why the others do not. Pure functions over text.

White space is space, tab, line feed and carriage return; the last two break lines. Both rules
accept 1 to 10 integers of 0 to 999 in ASCII digits, at most three each, and no letter or sign.

The strict rule is the field's (DESIGN.md, "Data"): one separator that is the same string
throughout (white space, or a comma or semicolon with optional white space around it), all of it
optionally in one pair of [] or (), and optionally a final full stop. Nothing is stripped first: a
space before the first number is outside the rule.

The tolerant rule accepts all of that, and:
- white space around the whole reply and just inside the brackets;
- separators that differ from gap to gap, each of them as above;
- one comma or semicolon after the last number, with optional white space before it;
- a bullet before a number: `-` or `*`, first on its line but for spaces and tabs, with at least one
  space or tab between it and the number. A `-` anywhere else is a sign or a range and is refused.

The final full stop must touch the last number or the closing bracket ("12 ." and "1, 2,." are
refused), and nothing but white space may follow it or the bracket. What could be a thousands
separator is refused: a bare comma ("1,234") where any separator is another than a bare comma or
there is a bullet, and spaces or tabs alone ("1 234") where there is also a comma, a semicolon or a
bullet. The comma or semicolon after the last number counts here, a comma after bare commas as one
of them; line breaks go with everything but bare commas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from typing import Literal, get_args

from sublim_plugin.core.errors import InputError

Mode = Literal["strict", "tolerant"]

MAX_NUMBERS = 10
SPACES = " \t\r\n"
REASONS = {
    "truncated": "no end of turn within the token budget",
    "trait_word": "a surface form of the trait is in the reply",
    "empty": "nothing but white space",
    "characters": "characters other than digits, separators, brackets, full stop and, where the "
    "rule is tolerant, bullets",
    "no_number": "no digit at all",
    "punctuation": "brackets or full stops that are unbalanced, nested or misplaced",
    "outer_space": "a separator or bullet (strict: or white space) before the first or after the "
    "last number",
    "separator": "separators that differ (strict), or more than one comma or semicolon in a row",
    "thousands": "a separator that could group thousands beside another kind (tolerant)",
    "too_many": "more than ten numbers, or a separator after the tenth where none may follow",
    "range": "a number above 999 or of more than three digits",
}
"""Every reason that `reject_reasons` can give, with its meaning."""

_NUMBER = re.compile(r"[0-9]{1,3}(?![0-9])")
_DIGITS = re.compile(r"[0-9]+")
_BETWEEN = re.compile(r"[ \t\r\n,;]+")
_BREAK = re.compile(r"[\r\n]")
# before the mark, the mark, after it, a bullet
_GAP = re.compile(r"([ \t\r\n]*+)([,;]?)([ \t\r\n]*+)([-*][ \t]++)?")


def _check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise InputError(f"unknown parser mode {mode!r}; use 'strict' or 'tolerant'")


def parse_numbers(text: str, mode: Mode = "strict") -> list[int] | None:
    """The numbers of a reply (1 to 10, each 0 to 999), or None where it breaks the rule.

    Linear in the length of `text`. Raises InputError for an unknown `mode`.
    """
    _check_mode(mode)
    return _strict(text) if mode == "strict" else _tolerant(text)


def _strict(text: str) -> list[int] | None:
    if text.endswith("."):
        text = text[:-1]
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    first = _DIGITS.match(text)
    if first is None:
        return None
    between = _BETWEEN.match(text, first.end())
    if between is None:
        parts = [text]
    else:
        separator = between.group()
        if separator.strip(SPACES) not in ("", ",", ";"):
            return None
        parts = text.split(separator, MAX_NUMBERS)
    if len(parts) > MAX_NUMBERS or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    return [int(part) for part in parts]


def _tolerant(text: str) -> list[int] | None:
    text = text.strip(SPACES)
    if text.endswith("."):
        text = text[:-1]
        if text[-1:] not in tuple("0123456789])"):
            return None
    # the text begins a line, what is behind a bracket does not
    text = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else "\n" + text
    numbers: list[int] = []
    kinds = set()
    at = 0
    while len(numbers) <= MAX_NUMBERS:
        gap = _GAP.match(text, at)
        assert gap is not None  # it matches the empty string too
        before, mark, after, bullet = gap.groups()
        number = _NUMBER.match(text, gap.end())
        if mark and not numbers:
            return None
        if bullet and (number is None or not _BREAK.search(after if mark else before)):
            return None
        if bullet:
            kinds.add("mark")
        elif number is None:
            if mark:
                kinds.add("bare" if mark == "," and "bare" in kinds else "mark")
        elif numbers:
            kinds.add(_kind(before, mark, after))
        if number is None:
            whole = numbers and gap.end() == len(text)
            return numbers if whole and not _could_group(kinds) else None
        numbers.append(int(number.group()))
        at = number.end()
    return None


def _kind(before: str, mark: str, after: str) -> str:
    """The kind of a gap without a bullet, as far as it matters for thousands separators."""
    if mark:
        return "mark" if mark == ";" or before or after else "bare"
    return "line" if _BREAK.search(before) else "blank"


def _could_group(kinds: set[str]) -> bool:
    """Whether a separator among those of a reply may be one of thousands."""
    return ("bare" in kinds and len(kinds) > 1) or kinds >= {"blank", "mark"}


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
    returns numbers. `text` may also be the beginning of a reply after which nothing could have been
    accepted any more (`automaton.advance`): the reasons are then those of its last character, as
    far as a beginning shows them.
    """
    numbers = parse_numbers(text, mode)
    found = set() if ended else {"truncated"}
    pattern = _any_form(tuple(trait_forms))
    if pattern is not None and pattern.search(text.casefold()):
        found.add("trait_word")
    if numbers is None:
        found |= _format_reasons(text, mode)
    return [reason for reason in REASONS if reason in found]


_FOREIGN = re.compile(r"[^0-9 \t\r\n,;.()\[\]]")
_TOO_LONG = re.compile(r"[0-9]{4}")
_PUNCTUATION = re.compile(r"[.()\[\]]")
# one that the text ends after may still get its number
_BULLET = re.compile(r"(?:\A|(?<=[\r\n]))[ \t]*+[-*](?=[ \t]++[0-9]|[ \t]*+\Z)")
_OUTER = " \t\r\n,;*"
_RUN = re.compile(r"[ \t\r\n,;*]+")


def _gaps(core: str) -> set[str]:
    """What separates the first numbers of `core`."""
    return {gap.group() for gap in islice(_RUN.finditer(core), MAX_NUMBERS)}


def _format_reasons(text: str, mode: Mode) -> set[str]:
    """At least one format reason for a `text` that `parse_numbers` refused.

    That a bracket is not closed or a number missing is a reason only where there is no other: a
    reply that is stopped early has not come so far.
    """
    found = set()
    if not text.strip():
        found.add("empty")
        if mode == "strict" and text:
            found.add("outer_space")
    if _FOREIGN.search(_BULLET.sub("", text) if mode == "tolerant" else text):
        found.add("characters")
    elif mode == "tolerant":
        text = _BULLET.sub("*", text)
    numbers = sum(1 for _ in islice(_DIGITS.finditer(text), MAX_NUMBERS + 1))
    if numbers > MAX_NUMBERS:
        found.add("too_many")
    if _TOO_LONG.search(text):
        found.add("range")
    if "characters" in found or "empty" in found:
        return found

    left, middle, right = _trim(text)
    stop = middle.endswith(".")
    content = middle[:-1] if stop else middle
    opened = content[:1] in ("[", "(")
    closed = content[:1] + content[-1:] in ("[]", "()")
    if opened:
        content = content[1 : len(content) - closed]
    head, core, tail = _trim(content)
    if not opened:
        head = left + head
    if not stop and not closed:
        tail += right
        right = ""
    if _PUNCTUATION.search(core):
        found.add("punctuation")
    if mode == "strict":
        if head or (opened and left) or right:
            found.add("outer_space")
        if "punctuation" not in found:
            found |= _strict_separators(core, tail, numbers)
    else:
        if stop and not closed and tail:
            found.add("punctuation")
        if any(mark in head + (left if opened else "") + right for mark in ",;"):
            found.add("outer_space")
        if "punctuation" not in found:
            found |= _tolerant_separators(head, core, tail, numbers)
    if not found:
        rest = "outer_space" if numbers else "no_number"  # what is left is a bullet at the end
        found = {"punctuation" if opened and not closed else rest}
    return found


def _trim(text: str) -> tuple[str, str, str]:
    """Separators, white space and bullets before `text`, what is between, and those after."""
    core = text.lstrip(_OUTER)
    head = text[: len(text) - len(core)]
    inner = core.rstrip(_OUTER)
    return head, inner, core[len(inner) :]


def _strict_separators(core: str, tail: str, numbers: int) -> set[str]:
    gaps = _gaps(core)
    if len(gaps) > 1 or any(gap.strip(SPACES) not in ("", ",", ";") for gap in gaps):
        return {"separator"}
    if not tail or not numbers:
        return {"outer_space"} if tail else set()
    used = gaps.pop() if gaps else None
    mark = tail.strip(SPACES)
    if numbers == MAX_NUMBERS and (mark or (used or "").strip(SPACES) == ""):
        return {"too_many"} if mark else {"too_many", "outer_space"}
    fits = used.startswith(tail) if used else mark in (",", ";")
    return {"separator"} if mark and not fits else {"outer_space"}


def _tolerant_separators(head: str, core: str, tail: str, numbers: int) -> set[str]:
    found = set()
    kinds = {"mark"} if "*" in head + tail else set()
    gaps = _gaps(core)
    if any(gap.count(",") + gap.count(";") > 1 for gap in (*gaps, tail)):
        found.add("separator")
    for gap in gaps:
        before, mark, after = gap.partition("," if "," in gap else ";")
        kinds.add("mark" if "*" in gap else _kind(before, mark, after))
    if "," in tail or ";" in tail:
        kinds.add("bare" if "," in tail and "bare" in kinds else "mark")
    if "*" in tail and numbers == MAX_NUMBERS:
        found.add("too_many")
    return found | ({"thousands"} if _could_group(kinds) else set())
