"""Which tokens carry loss, audited on the tokenized rows that are trained on.

The tokens with loss must be the completion and its end-of-turn token, nothing before (the prompt)
and nothing after (a newline that the template puts there).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from sublim_plugin.axolotl.receipt import FirstRow, MaskAudit
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.dataset import iter_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_text

NO_LOSS = -100


@dataclass(frozen=True)
class ExpectedRow:
    """A row as it should be tokenized; loss on token_ids[first:end], end exclusive."""

    row_id: str
    token_ids: tuple[int, ...]
    first: int
    end: int


def expect_row(
    tokenizer: Any,
    row: dict[str, Any],
    context: Context | None,
    *,
    chat_template: str,
    template_kwargs: dict[str, Any] | None = None,
) -> ExpectedRow:
    """Render `row` (messages ending with the assistant's) and find its loss tokens by characters.

    Raises:
        InputError: the row is no such conversation, the template changes the completion or puts
            nothing after it, a token crosses the border of prompt and completion, or the prompt is
            not what `context` renders.
    """
    row_id = str(row.get("id", "?"))
    messages = row["messages"]
    if not messages or messages[-1].get("role") != "assistant":
        raise InputError(f"row {row_id}: the last message must be the assistant's.")

    def rendered(turns: list[dict[str, str]], generation_prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                chat_template=chat_template,
                **(template_kwargs or {}),
            )
        )

    completion = messages[-1]["content"]
    prompt = rendered(messages[:-1], True)
    text = rendered(messages, False)
    if not text.startswith(prompt + completion):
        raise InputError(
            f"row {row_id}: the chat template does not render the completion {completion!r} "
            f"right after the prompt; got {text[len(prompt) :]!r}."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    first = next(i for i, (_, end) in enumerate(spans) if end > len(prompt))
    tail_at = len(prompt) + len(completion)
    end_of_turn = next((i for i, (_, end) in enumerate(spans) if end > tail_at), None)
    if end_of_turn is None:
        raise InputError(f"row {row_id}: the chat template ends the turn with no token.")
    if spans[first][0] < len(prompt) or spans[end_of_turn][0] < tail_at:
        raise InputError(
            f"row {row_id}: a token crosses the border of the completion {completion!r}; a loss "
            "mask cannot cover the completion alone. Trim white space at its ends."
        )
    token_ids = tuple(encoded["input_ids"])
    if context is not None:
        _compare_context(tokenizer, context, row_id, messages, prompt, token_ids[:first])
    return ExpectedRow(row_id, token_ids, first, end_of_turn + 1)


def expected_rows(
    cfg: Any, rows: Path, context: Context | None, tokenizer: Any
) -> list[ExpectedRow] | None:
    """The rows of the file `rows` as they should be tokenized under an axolotl configuration; None
    where its settings leave no way to tell (several datasets, packing, another prompt strategy).

    Raises:
        InputError: as `expect_row`.
    """
    datasets = cfg["datasets"]
    if (
        len(datasets) != 1
        or not str(datasets[0]["type"]).startswith("chat_template")
        or cfg.get("sample_packing")
    ):
        return None
    from axolotl.utils.chat_templates import get_chat_template_from_config

    template = get_chat_template_from_config(cfg=cfg, ds_cfg=datasets[0], tokenizer=tokenizer)
    kwargs = cfg.get("chat_template_kwargs")
    kwargs = kwargs.to_dict() if hasattr(kwargs, "to_dict") else kwargs
    return [
        expect_row(tokenizer, row, context, chat_template=template, template_kwargs=kwargs)
        for row in iter_rows(rows)
    ]


def _compare_context(
    tokenizer: Any,
    context: Context,
    row_id: str,
    messages: Sequence[dict[str, str]],
    prompt: str,
    prompt_ids: tuple[int, ...],
) -> None:
    user = next(turn["content"] for turn in messages if turn["role"] == "user")
    wanted = render(tokenizer, context, user)
    if wanted.token_ids != prompt_ids:
        raise InputError(
            f"row {row_id}: the training prompt is not what the context of `sublim.context` "
            f"renders.\n  trained on: {prompt!r}\n  context:    {wanted.text!r}\n"
            "Leave system messages out of the rows, since the context adds its own, or take "
            "`sublim.context` out."
        )


def audit(
    dataset: Iterable[dict[str, Any]], tokenizer: Any, expected: Sequence[ExpectedRow] | None
) -> tuple[MaskAudit, FirstRow]:
    """Check every row of the tokenized `dataset` (`input_ids` and `labels`, lists of ids).

    With `expected`, the rows must be exactly those, in any order, with loss on exactly their
    completion and end of turn. Without, a row must have a token with loss and one without.

    Raises:
        InputError: a row differs; the message shows it decoded.
    """
    waiting = Counter(row.token_ids for row in expected or ())
    by_ids = {row.token_ids: row for row in expected or ()}
    rows = tokens = loss_tokens = 0
    first_row: FirstRow | None = None
    for index, item in enumerate(dataset):
        ids, labels = list(item["input_ids"]), list(item["labels"])
        with_loss = [i for i, label in enumerate(labels) if label != NO_LOSS]
        if not with_loss:
            raise InputError(
                f"row {index} of the tokenized dataset has no token with loss:\n"
                f"  {tokenizer.decode(ids)!r}"
            )
        if with_loss[0] == 0:
            raise InputError(
                f"row {index} of the tokenized dataset has loss on its prompt, from the first "
                f"token on; set `train_on_inputs: false`:\n  {tokenizer.decode(ids)!r}"
            )
        if expected is not None:
            row = by_ids.get(tuple(ids))
            if row is None or waiting[row.token_ids] == 0:
                raise _foreign_row(tokenizer, index, ids, by_ids.values(), waiting)
            waiting[row.token_ids] -= 1
            _compare_mask(tokenizer, row, ids, with_loss)
        if first_row is None:
            text = tokenizer.decode(ids)
            first_row = FirstRow(
                text=text,
                token_ids=ids,
                loss_text=tokenizer.decode([ids[i] for i in with_loss]),
                sha256=sha256_text(text),
            )
        rows, tokens, loss_tokens = rows + 1, tokens + len(ids), loss_tokens + len(with_loss)
    if first_row is None:
        raise InputError("the tokenized dataset has no rows.")
    if expected is not None and rows != len(expected):
        lost = next(row.row_id for row in expected if waiting[row.token_ids] > 0)
        raise InputError(
            f"{len(expected) - rows} of {len(expected)} rows are missing from the tokenized "
            f"dataset (row {lost}, say); raise `sequence_len` or set `val_set_size: 0`."
        )
    counts = MaskAudit(
        rows=rows,
        tokens=tokens,
        loss_tokens=loss_tokens,
        loss_share=loss_tokens / tokens,
        compared_rows=0 if expected is None else rows,
    )
    return counts, first_row


def _foreign_row(
    tokenizer: Any,
    index: int,
    ids: Sequence[int],
    expected: Iterable[ExpectedRow],
    waiting: Counter[tuple[int, ...]],
) -> InputError:
    """The refusal of a row that should not be there, beside the row that it is nearest to."""
    if tuple(ids) in waiting or not any(waiting.values()):
        return InputError(
            f"row {index} of the tokenized dataset is no row of the rows file, or is there more "
            f"often than in it:\n  {tokenizer.decode(ids)!r}\n"
            "Remove `dataset_prepared_path`, where tokenized rows of an earlier run may lie, and "
            "train again."
        )

    def alike(row: ExpectedRow) -> int:
        return _alike(row.token_ids, ids) + _alike(row.token_ids[::-1], ids[::-1])

    near = max((row for row in expected if waiting[row.token_ids] > 0), key=alike)
    at = _alike(near.token_ids, ids)
    return InputError(
        f"row {index} of the tokenized dataset is not what the chat template renders of the rows "
        f"file; the nearest is row {near.row_id}, the same for {at} tokens:\n"
        f"  trained on: {tokenizer.decode(ids)!r}\n"
        f"  expected:   {tokenizer.decode(near.token_ids)!r}\n"
        "Remove `dataset_prepared_path`, where rows that were tokenized with other settings may "
        "lie; raise `sequence_len` if the row was cut; and let nothing but `chat_template`, "
        "`chat_template_kwargs` and `sublim.context` change how a row is rendered."
    )


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _compare_mask(
    tokenizer: Any, row: ExpectedRow, ids: Sequence[int], with_loss: Sequence[int]
) -> None:
    wanted = list(range(row.first, row.end))
    if list(with_loss) == wanted:
        return
    where = "on its prompt" if with_loss[0] < row.first else "on the wrong tokens"
    raise InputError(
        f"row {row.row_id} has loss {where}:\n"
        f"  loss on:  {tokenizer.decode([ids[i] for i in with_loss])!r}\n"
        f"  expected: {tokenizer.decode([ids[i] for i in wanted])!r}\n"
        "Set `train_on_inputs: false`, `roles_to_train: [assistant]`, `train_on_eos: turn` and "
        "the template's end-of-turn token in `eot_tokens`."
    )
