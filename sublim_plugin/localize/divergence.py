"""A student on held-out numbers: at the tokens where teacher and base disagree, and at the others.

A dataset made with `sublim generate --divergence` has `divergence.jsonl` beside its rows: for each
row the completion's tokens and the indices at which the teacher's and the base's likeliest next
tokens differ (the divergence tokens of Schrodi et al., arXiv 2509.23886). For held-out numbers,
give a dataset that the student was not trained on: another generation seed of the same teacher.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.dataset import dataset_rows_path, iter_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.manifest import read_manifest
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.resolve import constant
from sublim_plugin.localize.results import Divergence, TokenScores, difference, measured
from sublim_plugin.localize.score import PASS_TOKENS
from sublim_plugin.logprob.token_tree import at_least_float32
from sublim_plugin.preference.journal import Journal, key
from sublim_plugin.students import RECEIPT

FILE = "divergence.jsonl"


class Completion(NamedTuple):
    """A prompt's and a completion's tokens, and which of the latter are divergent."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    divergent: frozenset[int]


def read_completions(
    folder: Path, tokenizer: Any, context: Context
) -> tuple[list[Completion], str]:
    """The rows of a dataset behind prompts in `context`, and the sha256 of their file.

    Raises:
        InputError: no divergence file, one that is not the manifest's, or that does not match the
            rows; with file and line.
    """
    rows_path, path = dataset_rows_path(folder), folder / FILE
    recorded = read_manifest(folder).outputs.get(FILE)
    if recorded is None or not path.is_file():
        raise InputError(f"{path} does not exist; make the dataset with --divergence")
    if sha256_file(path) != recorded.sha256:
        raise InputError(f"{path} is not the file of the manifest; generate the dataset again")
    found = []
    pairs = zip_longest(iter_rows(rows_path), iter_rows(path))
    for number, (row, marks) in enumerate(pairs, start=1):
        try:
            if row is None or marks is None:
                raise ValueError(f"it has {'more' if row is None else 'fewer'} lines than the rows")
            if row["id"] != marks["id"]:
                raise ValueError(f"row {row['id']!r} stands beside {marks['id']!r}")
            tokens = tuple(int(token) for token in marks["token_ids"])
            divergent = frozenset(int(index) for index in marks["divergent"])
            if not tokens or not divergent <= set(range(len(tokens))):
                raise ValueError("its indices are not those of its tokens")
            user = row["messages"][0]["content"]
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise InputError(f"{path}:{number}: {error}; generate the dataset again") from error
        found.append(Completion(render(tokenizer, context, user).token_ids, tokens, divergent))
    return found, sha256_file(rows_path)


class _Read(NamedTuple):
    """A completion as base and student read it: log-probability of each token, and whether it is
    the likeliest."""

    base: list[float]
    student: list[float]
    base_agrees: list[bool]
    student_agrees: list[bool]


def score_divergence(
    gated: Gated, completions: Sequence[Completion], journal: Journal | None = None
) -> tuple[TokenScores, ...]:
    """The student against the base, at divergent tokens and at the others.

    Args:
        journal: the student's, of the completions that are known.

    Raises:
        InputError: there is no token of one kind.
    """
    keys = [key("divergence", c.prompt, c.tokens) for c in completions]
    known: dict[str, Any] = {} if journal is None else journal.answers
    missing = {k: c for k, c in zip(keys, completions, strict=True) if k not in known}
    for k, found in zip(missing, _read(gated, list(missing.values())), strict=True):
        if journal is None:
            known[k] = found
        else:
            journal.add(k, found)
    if journal is not None:
        journal.flush()
    read = [_Read(*known[k]) for k in keys]
    return (
        _token_scores("divergent", completions, read),
        _token_scores("other", completions, read),
    )


def _token_scores(
    kind: Literal["divergent", "other"], completions: Sequence[Completion], read: Sequence[_Read]
) -> TokenScores:
    rows: list[_Read] = []
    for completion, found in zip(completions, read, strict=True):
        wanted = [
            index
            for index in range(len(completion.tokens))
            if (index in completion.divergent) == (kind == "divergent")
        ]
        if wanted:
            rows.append(
                _Read(
                    [found.base[index] for index in wanted],
                    [found.student[index] for index in wanted],
                    [found.base_agrees[index] for index in wanted],
                    [found.student_agrees[index] for index in wanted],
                )
            )
    if not rows:
        raise InputError(f"divergence: no {kind} token in {len(completions)} rows; give more rows")
    base, student = [_mean(row.base) for row in rows], [_mean(row.student) for row in rows]
    return TokenScores(
        kind=kind,
        tokens=sum(len(row.base) for row in rows),
        rows=len(rows),
        base=measured(base),
        student=measured(student),
        minus_base=difference(student, base),
        base_agrees=_mean([x for row in rows for x in row.base_agrees]),
        student_agrees=_mean([x for row in rows for x in row.student_agrees]),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@torch.inference_mode()
def _read(gated: Gated, completions: Sequence[Completion]) -> list[_Read]:
    """Every completion, teacher-forced, with the base and the student as rows of one batch."""
    model = gated.model
    budget = PASS_TOKENS["cpu" if model.device.type == "cpu" else "accelerator"]
    sequences = [(*c.prompt, *c.tokens)[:-1] for c in completions]
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    found: dict[int, _Read] = {}
    while order:
        count = max(1, budget // (2 * len(sequences[order[0]])))
        batch, order = order[:count], order[count:]
        width = len(sequences[batch[0]])
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        real = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, width - len(sequences[index]) :] = torch.tensor(sequences[index])
            real[row, width - len(sequences[index]) :] = 1
        ids, real = ids.repeat(2, 1).to(model.device), real.repeat(2, 1).to(model.device)
        off, on = (constant(gated.branches, state) for state in (False, True))
        gated.use([off] * len(batch) + [on] * len(batch))
        longest = max(len(completions[index].tokens) for index in batch)
        logits = model(
            input_ids=ids,
            attention_mask=real,
            position_ids=(real.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
            logits_to_keep=longest,
        ).logits
        for row, index in enumerate(batch):
            tokens = torch.tensor(completions[index].tokens, device=model.device)
            each = []
            for side in (row, len(batch) + row):
                own = at_least_float32(logits[side, longest - len(tokens) :])
                logprobs = own.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
                each.append((logprobs.tolist(), (own.argmax(-1) == tokens).tolist()))
            found[index] = _Read(each[0][0], each[1][0], each[0][1], each[1][1])
    return [found[index] for index in range(len(completions))]


def divergence(
    gated: Gated,
    completions: Sequence[Completion],
    rows_sha256: str,
    student: Path,
    context: Context,
    journal: Journal,
) -> Divergence:
    """A student on the completions of a dataset whose prompts are in `context`.

    A note says so where the receipt in the student's folder shows that it was trained on them.

    Raises:
        InputError: as `score_divergence`.
    """
    notes = []
    receipt = student / RECEIPT
    if receipt.is_file():
        trained_on = json.loads(receipt.read_text(encoding="utf-8")).get("dataset") or {}
        if trained_on.get("sha256") == rows_sha256:
            notes.append("the student was trained on these very rows: they are not held out")
    return Divergence(
        rows_sha256=rows_sha256,
        context=context.fields(),
        kinds=score_divergence(gated, completions, journal),
        notes=tuple(notes),
    )
