"""The strict format rule as an automaton over characters, for replies that are still being written.

A text is accepted by `parse.parse_numbers` exactly where `advance(START, text)` is a state that
`complete` accepts; `advance` gives None as soon as no continuation can be accepted any more.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from data_gen.parse import MAX_NUMBERS, SPACES

MAX_DIGITS = 3
_CLOSING = {"[": "]", "(": ")"}
_DIGITS = "0123456789"
_SEPARATORS = SPACES + ",;"


class State(NamedTuple):
    """What the rest of a reply depends on.

    `separator` is the one in use, or None before the second number; `partial` what has been
    written of the present one; `digits` those of the present number; `numbers` how many have begun.
    """

    phase: Literal["start", "open", "number", "separator", "closed", "end"] = "start"
    bracket: str = ""
    separator: str | None = None
    partial: str = ""
    digits: int = 0
    numbers: int = 0


START = State()


def advance(state: State, text: str) -> State | None:
    """The state after `text`, or None where no accepted reply begins so."""
    for char in text:
        after = _next(state, char)
        if after is None:
            return None
        state = after
    return state


def complete(state: State) -> bool:
    """Whether a reply may end here."""
    return state.phase in ("closed", "end") or (state.phase == "number" and not state.bracket)


def _next(state: State, char: str) -> State | None:
    phase = state.phase
    if phase in ("start", "open"):
        if char in _DIGITS:
            return state._replace(phase="number", digits=1, numbers=1)
        if phase == "start" and char in _CLOSING:
            return state._replace(phase="open", bracket=char)
        return None
    if phase == "number":
        if char in _DIGITS:
            return state._replace(digits=state.digits + 1) if state.digits < MAX_DIGITS else None
        if char == "." and not state.bracket:
            return State("end")
        if state.bracket and char == _CLOSING[state.bracket]:
            return State("closed")
        return _separator(state, char) if state.numbers < MAX_NUMBERS else None
    if phase == "separator":
        if char in _DIGITS:
            if state.separator not in (None, state.partial):
                return None
            return State(
                "number", state.bracket, state.partial, "", digits=1, numbers=state.numbers + 1
            )
        return _separator(state, char)
    return State("end") if phase == "closed" and char == "." else None


def _separator(state: State, char: str) -> State | None:
    partial = state.partial + char
    if char not in _SEPARATORS:
        return None
    if state.separator is None:
        fits = partial.strip(SPACES) in ("", ",", ";")
    else:
        fits = state.separator.startswith(partial)
    return state._replace(phase="separator", partial=partial, digits=0) if fits else None


def start(mode: str) -> State:
    return START
