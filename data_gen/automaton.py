"""Both format rules as an automaton over characters, for replies that are still being written.

A text is accepted by `parse.parse_numbers` exactly where `advance(start(mode), text)` is a state
that `complete` accepts; `advance` gives None as soon as no continuation, the empty one among them,
can be accepted any more.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, get_args

from data_gen.parse import MAX_NUMBERS, SPACES, Mode
from sublim_plugin.core.errors import InputError

MAX_DIGITS = 3
_CLOSING = {"[": "]", "(": ")"}
_DIGITS = "0123456789"
_MARKS = ",;"
_SEPARATORS = SPACES + _MARKS
_BLANKS = " \t"
_BREAKS = "\r\n"
_BULLETS = "-*"
# white space of any length is one step
_PIECE = re.compile(r"[ \t\r\n]+|.", re.DOTALL)


Phase = Literal["start", "open", "bullet", "item", "number", "separator", "closed", "end"]


class State(NamedTuple):
    """What the rest of a reply depends on.

    `digits` are those of the present number, `numbers` counts those that have begun. In the strict
    mode `separator` is the one in use, or None before the second number, and `partial` what has
    been written of the present one. In the tolerant mode both are reduced to what still matters:
    `separator` to what may follow ("bare": bare commas; "blank" and "mark": that or line breaks;
    "line": anything else than bare commas), `partial` to a space or line feed for white space alone
    and to a mark with such white space behind it (";" is any mark that is not a bare comma).
    """

    mode: Mode
    phase: Phase = "start"
    bracket: str = ""
    separator: str | None = None
    partial: str = ""
    digits: int = 0
    numbers: int = 0


def start(mode: Mode) -> State:
    """The state before a reply. Raises InputError for an unknown `mode`."""
    if mode not in get_args(Mode):
        raise InputError(f"unknown parser mode {mode!r}; use 'strict' or 'tolerant'")
    return State(mode)


def advance(state: State, text: str) -> State | None:
    """The state after `text`, or None where no accepted reply begins so. Linear in its length."""
    after = _strict if state.mode == "strict" else _tolerant
    for piece in _PIECE.finditer(text):
        found = after(state, piece.group())
        if found is None:
            return None
        state = found
    return state


def complete(state: State) -> bool:
    """Whether a reply may end here."""
    if state.phase in ("closed", "end"):
        return True
    ends = ("number",) if state.mode == "strict" else ("number", "separator")
    return state.phase in ends and not state.bracket


def _strict(state: State, piece: str) -> State | None:
    """The state after one character, or after a run of white space."""
    phase = state.phase
    if phase in ("start", "open"):
        if piece in _DIGITS:
            return state._replace(phase="number", digits=1, numbers=1)
        if phase == "start" and piece in _CLOSING:
            return state._replace(phase="open", bracket=piece)
        return None
    if phase == "number":
        if piece in _DIGITS:
            return state._replace(digits=state.digits + 1) if state.digits < MAX_DIGITS else None
        if piece == "." and not state.bracket:
            return State("strict", "end")
        if state.bracket and piece == _CLOSING[state.bracket]:
            return State("strict", "closed")
        return _strict_separator(state, piece) if state.numbers < MAX_NUMBERS else None
    if phase == "separator":
        if piece in _DIGITS:
            if state.separator not in (None, state.partial):
                return None
            return state._replace(
                phase="number",
                separator=state.partial,
                partial="",
                digits=1,
                numbers=state.numbers + 1,
            )
        return _strict_separator(state, piece)
    return State("strict", "end") if phase == "closed" and piece == "." else None


def _strict_separator(state: State, piece: str) -> State | None:
    if piece[0] not in _SEPARATORS:
        return None
    partial = state.partial + piece
    if state.separator is None:
        fits = partial.strip(SPACES) in ("", ",", ";")
    else:
        fits = state.separator.startswith(partial)
    return state._replace(phase="separator", partial=partial, digits=0) if fits else None


def _tolerant(state: State, piece: str) -> State | None:
    """The state after one character, or after a run of white space."""
    char = piece
    if len(piece) > 1:
        char = "\n" if any(c in piece for c in _BREAKS) else " "
    phase = state.phase
    if phase == "number":
        if char in _DIGITS:
            return state._replace(digits=state.digits + 1) if state.digits < MAX_DIGITS else None
        if char == ".":
            return None if state.bracket else State("tolerant", "end")
        return _tolerant_gap(state._replace(phase="separator", digits=0), char)
    if phase == "separator":
        return _tolerant_gap(state, char)
    if phase in ("closed", "end"):
        if char in SPACES or (char == "." and phase == "closed"):
            return State("tolerant", "end")
        return None
    if phase == "bullet":
        return state._replace(phase="item") if char in _BLANKS else None
    if char in _DIGITS:
        return state._replace(phase="number", partial="", digits=1, numbers=state.numbers + 1)
    if phase == "item":
        return state if char in _BLANKS else None
    # before the first number; behind a bracket the line has begun
    if char in SPACES:
        return state._replace(partial="\n") if phase == "open" and char in _BREAKS else state
    if char in _BULLETS and (phase == "start" or state.partial):
        return state._replace(phase="bullet", separator="mark", partial="")
    if phase == "start" and char in _CLOSING:
        return state._replace(phase="open", bracket=char)
    return None


def _tolerant_gap(state: State, char: str) -> State | None:
    """The state after a character of what follows a number."""
    used, partial = state.separator, state.partial
    if char in SPACES:
        mark = ";" if partial[:1] in (",", ";") else ""
        white = "\n" if char in _BREAKS or partial.endswith("\n") else " "
        return state._replace(partial=mark + white)
    if char in _MARKS:
        if partial[:1] in (",", ";"):
            return None
        # a bare comma may still be the one after the last number
        if used == "blank" or (used == "bare" and char == ";"):
            return None
        return state._replace(partial="," if char == "," and not partial else ";")
    if state.bracket and char == _CLOSING[state.bracket]:
        return State("tolerant", "closed")
    if state.numbers == MAX_NUMBERS:
        return None
    if char in _BULLETS and partial.endswith("\n") and used not in ("bare", "blank"):
        return state._replace(phase="bullet", separator="mark", partial="")
    if char not in _DIGITS or not partial:
        return None
    kind = {",": "bare", " ": "blank", "\n": "line"}.get(partial, "mark")
    if used not in (None, kind):
        if "bare" in (used, kind) or {used, kind} == {"blank", "mark"}:
            return None
        kind = str(used) if kind == "line" else kind
    return state._replace(
        phase="number", separator=kind, partial="", digits=1, numbers=state.numbers + 1
    )
