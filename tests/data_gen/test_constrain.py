"""The number constraint on the real tokenizer."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.automaton import start
from data_gen.constrain import RULE, Constraint, end_of_turn_id, number_constraint
from data_gen.parse import parse_numbers


@functools.cache
def constraint_of(tokenizer: Any) -> Constraint:
    return number_constraint(tokenizer, (end_of_turn_id(tokenizer),))


def test_the_end_of_turn_comes_from_the_template_not_from_eos(tokenizer: Any) -> None:
    assert tokenizer.decode([end_of_turn_id(tokenizer)]) == "<|im_end|>"
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|im_start|>"
    assert end_of_turn_id(other) == end_of_turn_id(tokenizer)


def test_the_set_is_every_token_of_digits_or_one_separator(tokenizer: Any) -> None:
    found = constraint_of(tokenizer)
    by_vocabulary = {
        i
        for token, i in tokenizer.get_vocab().items()
        if re.fullmatch(RULE, tokenizer.convert_tokens_to_string([token]))
    }
    end = set(found.end_ids)
    assert set(found.token_ids) - end == by_vocabulary - end
    assert {tokenizer.decode([i]) for i in found.token_ids} >= {*"0123456789", ",", ";", " ", "\n"}
    assert end <= set(found.token_ids)
    assert len(found.token_ids) < 100
    assert found.describe()["tokens"] == len(found.token_ids)


def test_whatever_the_masks_allow_is_accepted(tokenizer: Any) -> None:
    found = constraint_of(tokenizer)

    @given(st.data())
    @settings(max_examples=200)
    def walk(data: st.DataObject) -> None:
        state, ids = start("strict"), []
        for _ in range(200):
            allowed = [i for i, ok in zip(found.token_ids, found.mask(state), strict=True) if ok]
            assert allowed
            token = data.draw(st.sampled_from(allowed))
            if token in found.end_ids:
                break
            ids.append(token)
            state = found.step(state, token)
        else:
            return
        assert parse_numbers(tokenizer.decode(ids)) is not None

    walk()


@given(
    st.lists(st.integers(0, 999), min_size=1, max_size=10), st.sampled_from([", ", ";", " ", "\n"])
)
def test_every_plain_list_can_be_written(
    tokenizer: Any, numbers: list[int], separator: str
) -> None:
    found = constraint_of(tokenizer)
    state = start("strict")
    for token in tokenizer(separator.join(map(str, numbers)), add_special_tokens=False)[
        "input_ids"
    ]:
        assert found.mask(state)[found.token_ids.index(token)]
        state = found.step(state, token)
    assert found.mask(state)[found.token_ids.index(found.end_ids[0])]
