"""A dataset's rows as a student reads them: tokens, kinds, and what the grammar admits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data_gen.automaton import advance, start
from data_gen.constrain import Constraint, end_of_turn_id, number_constraint, token_text
from data_gen.parse import SPACES, Mode
from sublim_plugin.core.dataset import iter_rows
from sublim_plugin.core.errors import InputError

Kind = Literal["digit", "separator", "end of turn", "other"]


@dataclass(frozen=True)
class Completion:
    """One row: the user's message, and the reply's tokens, the end of turn last.

    Attributes:
        admitted: for each token the number tokens (`Grammar.token_ids`) that the grammar lets come
            there; None where the token that was written is none of them.
    """

    id: str
    user: str
    tokens: tuple[int, ...]
    kinds: tuple[Kind, ...]
    admitted: tuple[tuple[bool, ...] | None, ...]


class Grammar:
    """The number tokens of a tokenizer, and the parser's rule by which they follow each other.

    `constraint` is None, with the reason in `missing`, for a tokenizer without such tokens.
    """

    def __init__(self, tokenizer: Any, mode: Mode) -> None:
        self.tokenizer, self.mode = tokenizer, mode
        self.end = end_of_turn_id(tokenizer)
        self.missing: str | None = None
        self.constraint: Constraint | None = None
        try:
            self.constraint = number_constraint(tokenizer, (self.end,))
        except InputError as error:
            self.missing = f"measures on the number tokens: {error}"
        self._texts: dict[int, str] = {}

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.constraint.token_ids if self.constraint else ()

    def kind(self, token: int) -> Kind:
        if token == self.end:
            return "end of turn"
        text = self._text(token)
        if any(character.isdigit() for character in text):
            return "digit"
        return "separator" if not text.strip(SPACES + ",;") else "other"

    def admitted(self, tokens: Sequence[int]) -> tuple[tuple[bool, ...] | None, ...]:
        """For each token of a reply, see `Completion.admitted`."""
        if self.constraint is None:
            return (None,) * len(tokens)
        state, found = start(self.mode), []
        places = {token: place for place, token in enumerate(self.constraint.token_ids)}
        for index, token in enumerate(tokens):
            mask = self.constraint.mask(state)
            found.append(mask if token in places and mask[places[token]] else None)
            after = None if token == self.end else advance(state, self._text(token))
            if after is None:
                return (*found, *(None,) * (len(tokens) - index - 1))
            state = after
        return tuple(found)

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = token_text(self.tokenizer, token)
        return self._texts[token]


def read_completions(path: Path, grammar: Grammar, most: int) -> list[Completion]:
    """The first `most` rows of a dataset's rows file.

    Raises:
        InputError: no rows, or one that is not a row, with file and line.
    """
    found = []
    for number, row in enumerate(islice(iter_rows(path), most), start=1):
        try:
            user, reply = (row["messages"][i]["content"] for i in (0, 1))
            name = str(row["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a row of a dataset ({error!r})") from error
        ids = grammar.tokenizer(reply, add_special_tokens=False)["input_ids"]
        tokens = (*ids, grammar.end)
        kinds = tuple(grammar.kind(token) for token in tokens)
        found.append(Completion(name, user, tokens, kinds, grammar.admitted(tokens)))
    if not found:
        raise InputError(f"{path}: no rows")
    return found
