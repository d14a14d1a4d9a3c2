"""The filter on tokens: whether a reply that is still being written can yet be accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_gen.automaton import State, advance, start
from data_gen.parse import Mode


class TokenFilter:
    """Follows replies token by token with the automaton of one parser mode.

    A token's text is looked up once, after a digit, as in the middle of a reply: tokenizers drop
    the space of a first token. Where a tokenizer's text is not the sum of its tokens', `dead` still
    decides by the whole text, so no reply is given up that the parser could accept.
    """

    def __init__(self, tokenizer: Any, mode: Mode) -> None:
        self.tokenizer, self.mode = tokenizer, mode
        self.start = start(mode)
        self._anchor: list[int] = tokenizer("1", add_special_tokens=False)["input_ids"]
        self._anchor_text = self.text(self._anchor)
        self._after: dict[tuple[State, int], State | None] = {}

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens with nothing cleaned up, special tokens included."""
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def step(self, state: State, written: Sequence[int]) -> State | None:
        """The state after the last token of `written`, or None where no accepted reply begins so.

        `state` is the one before that token.
        """
        token = written[-1]
        if len(written) > 1:
            key = (state, token)
            if key not in self._after:
                text = self.text([*self._anchor, token])[len(self._anchor_text) :]
                self._after[key] = advance(state, text)
            found = self._after[key]
            if found is not None:
                return found
        return advance(self.start, self.text(written))
