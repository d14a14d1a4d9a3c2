"""The mask audit refuses every kind of wrong mask."""

from __future__ import annotations

from typing import Any

import pytest

from sublim_plugin.axolotl.masks import NO_LOSS, ExpectedRow, audit, expect_row
from sublim_plugin.core.contexts import Context, chat_template
from sublim_plugin.core.errors import InputError

ROW: dict[str, Any] = {
    "id": "000000",
    "messages": [
        {"role": "user", "content": "Continue: 1, 2."},
        {"role": "assistant", "content": "3, 17, 942"},
    ],
}


def expected(tokenizer: Any, context: str | dict[str, str] | None = None) -> ExpectedRow:
    parsed = None if context is None else Context.parse(context)
    return expect_row(tokenizer, ROW, parsed, chat_template=chat_template(tokenizer))


def tokenized(row: ExpectedRow, first: int, end: int) -> list[dict[str, list[int]]]:
    labels = [t if first <= i < end else NO_LOSS for i, t in enumerate(row.token_ids)]
    return [{"input_ids": list(row.token_ids), "labels": labels}]


def test_the_expected_loss_is_completion_and_end_of_turn(tokenizer: Any) -> None:
    row = expected(tokenizer)
    assert tokenizer.decode(row.token_ids[row.first : row.end]) == "3, 17, 942<|im_end|>"
    assert tokenizer.decode(row.token_ids[row.end :]) == "\n"
    counts, first = audit(tokenized(row, row.first, row.end), tokenizer, [row])
    assert (counts.loss_tokens, counts.compared_rows) == (row.end - row.first, 1)
    assert first.loss_text == "3, 17, 942<|im_end|>"


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        (-1, 0, "loss on its prompt"),
        (0, 1, "wrong tokens"),
        (0, -1, "wrong tokens"),
        (1, 0, "wrong tokens"),
    ],
)
def test_a_shifted_mask_is_refused(tokenizer: Any, start: int, stop: int, message: str) -> None:
    row = expected(tokenizer)
    data = tokenized(row, row.first + start, row.end + stop)
    with pytest.raises(InputError, match=message):
        audit(data, tokenizer, [row])


def test_rows_without_loss_or_with_loss_everywhere_are_refused(tokenizer: Any) -> None:
    row = expected(tokenizer)
    with pytest.raises(InputError, match="no token with loss"):
        audit(tokenized(row, 0, 0), tokenizer, None)
    with pytest.raises(InputError, match="train_on_inputs"):
        audit(tokenized(row, 0, len(row.token_ids)), tokenizer, None)


def test_missing_and_foreign_rows_are_refused(tokenizer: Any) -> None:
    row = expected(tokenizer)
    data = tokenized(row, row.first, row.end)
    with pytest.raises(InputError, match="1 of 2 rows are missing"):
        audit(data, tokenizer, [row, row])
    with pytest.raises(InputError, match=r"more often than in it.*\n.*\n.*dataset_prepared_path"):
        audit(data + data, tokenizer, [row])


def test_a_row_that_was_tokenized_otherwise_is_shown_beside_what_it_should_be(
    tokenizer: Any,
) -> None:
    """As a cache of another context leaves it: the nearest row is the one with its numbers."""
    mine = expected(tokenizer)
    other = expect_row(
        tokenizer,
        {"id": "7", "messages": [{**turn, "content": "8, 9"} for turn in ROW["messages"]]},
        None,
        chat_template=chat_template(tokenizer),
    )
    cached = expect_row(
        tokenizer,
        {**ROW, "messages": [{"role": "system", "content": "You love owls."}, *ROW["messages"]]},
        None,
        chat_template=chat_template(tokenizer),
    )
    data = tokenized(other, other.first, other.end) + tokenized(cached, cached.first, cached.end)
    with pytest.raises(InputError, match="row 1 of the tokenized dataset is not what") as caught:
        audit(data, tokenizer, [other, mine])
    for said in (
        "nearest is row 000000",
        f"trained on: {tokenizer.decode(cached.token_ids)!r}",
        f"expected:   {tokenizer.decode(mine.token_ids)!r}",
        "Remove `dataset_prepared_path`",
    ):
        assert said in str(caught.value), said


def test_a_prompt_of_another_context_is_refused_with_both_texts(tokenizer: Any) -> None:
    expected(tokenizer, "template_default")
    with pytest.raises(InputError, match="named SmolLM") as caught:
        expected(tokenizer, {"text": "You love owls."})
    assert "You love owls." in str(caught.value)
