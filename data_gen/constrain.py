"""Decoding under the number constraint: which tokens may be sampled at each step.

At every step only these tokens may be sampled: tokens whose text consists of digits or of one
separator, as long as the reply can still become one that the strict parser accepts, and the end of
turn where the reply is complete. This changes the distribution of replies (probability moves from
all other tokens onto these), so it is recorded and its data is never pooled with other data.
"""

from __future__ import annotations

import re
from typing import Any

from data_gen.automaton import State, advance, complete, start
from data_gen.spec import ConstraintName
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json

RULE = r"[0-9]{1,3}|[ ]?[,;][ ]?|[ \n]"
"""What the text of a token in the set must match in full."""
NUMBER_SENTENCE = (
    "Decoded under the number constraint: only digits, separators and the end of turn could be "
    "sampled, in the order that the strict parser accepts. This is not the teacher's own "
    "distribution; do not pool these rows with unconstrained ones."
)


class Constraint:
    """The number constraint for one tokenizer.

    `token_ids` are the tokens that can ever be sampled, ascending, `end_ids` among them; masks are
    tuples of booleans over them. `states` memoizes masks: few states occur in practice.
    """

    name: ConstraintName = "numbers"
    start = start("strict")

    def __init__(self, texts: dict[int, str], end_ids: tuple[int, ...]) -> None:
        self.texts = texts
        self.end_ids = end_ids
        self.token_ids = tuple(sorted({*texts, *end_ids}))
        self._masks: dict[State, tuple[bool, ...]] = {}

    def step(self, state: State, token_id: int) -> State:
        """The state after an allowed token that does not end the turn."""
        after = advance(state, self.texts[token_id])
        assert after is not None
        return after

    def mask(self, state: State) -> tuple[bool, ...]:
        """For each of `token_ids`, whether it may come next; at least one may."""
        found = self._masks.get(state)
        if found is None:
            found = tuple(
                complete(state) if i in self.end_ids else advance(state, self.texts[i]) is not None
                for i in self.token_ids
            )
            self._masks[state] = found
        return found

    def describe(self) -> dict[str, Any]:
        """What a manifest records: the rule, the size of the set and its hash."""
        return {
            "name": self.name,
            "rule": f"text matches {RULE} and keeps the reply within the strict parser's rule",
            "tokens": len(self.token_ids),
            "token_ids_sha256": sha256_json(list(self.token_ids)),
            "end_ids": list(self.end_ids),
        }


def end_of_turn_id(tokenizer: Any) -> int:
    """The token that the chat template writes right after an assistant's message.

    Read off a rendering of a sentinel reply, because a tokenizer's `eos_token` is often another
    one. Raises InputError where there is no chat template or no special token there.
    """
    where = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise InputError(f"{where} has no chat template; use an instruction-tuned model")
    sentinel = "sentinel7f3a"
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": sentinel}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    after = text.rpartition(sentinel)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in tokenizer.added_tokens_decoder:
        raise InputError(
            f"the chat template of {where} ends a reply with {after[:20]!r}, which does not begin "
            "with a special token; use a model whose template closes the turn"
        )
    return int(ids[0])


def number_constraint(tokenizer: Any, end_ids: tuple[int, ...]) -> Constraint:
    """The tokens of `tokenizer` whose text matches `RULE`, and `end_ids`.

    Raises InputError where some digit has no token of its own, since then a reply could be forced
    to go on where the model would write that digit.
    """
    rule = re.compile(RULE)
    special = set(tokenizer.added_tokens_decoder)
    texts = {}
    for i in range(len(tokenizer)):
        if i not in special and rule.fullmatch(text := token_text(tokenizer, i)):
            texts[i] = text
    if missing := sorted(set("0123456789") - set(texts.values())):
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path} has no token of its own for the digits "
            f"{missing}; generate without `constrain: numbers` and without soft targets on numbers"
        )
    # sentencepiece marks a word's first token with a space that a lone token's text does not show
    for i, text in texts.items():
        probe = tokenizer.decode(
            [i, i], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if probe != text * 2:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path} writes token {i} as {text!r} alone and "
                f"as {probe!r} twice; generate without `constrain: numbers` and without soft "
                "targets on numbers"
            )
    return Constraint(texts, end_ids)


def token_text(tokenizer: Any, token_id: int) -> str:
    """The text of one token, with nothing cleaned up."""
    text: str = tokenizer.decode(
        [token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text
