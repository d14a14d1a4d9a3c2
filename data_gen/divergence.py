"""Divergence masks: where the teacher and the base disagree on the likeliest next token.

Both read the same completion, teacher-forced, each behind its own rendered prompt: the teacher in
its context and with its weights, the base in the context that carries no trait. The idea is that of
divergence tokens in Schrodi et al., "Towards Understanding Subliminal Learning" (arXiv 2509.23886).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_gen.session import Session
from data_gen.teachers import PromptedTeacher
from sublim_plugin.core.contexts import Context, render

FILE = "divergence.jsonl"
CHUNK = 64


def write_divergence(session: Session, rows: Path, work: Path, progress: bool) -> dict[str, int]:
    """Write `work`/divergence.jsonl: one line a row of `rows`, in order, with the row's `id`, the
    completion's `token_ids` (the end of turn last) and `divergent`, indices into them.

    Continues what an interrupted call left in `work`. Returns counts of tokens and divergent ones.
    """
    teacher = session.teacher
    without = (
        Context(kind="template_default")
        if isinstance(teacher, PromptedTeacher)
        else teacher.context
    )
    passes = (
        ("teacher", teacher.context, session.teacher_model),
        ("base", without, session.base_model),
    )
    for name, context, model in passes:
        _one_pass(session, rows, work / f"likeliest-{name}.jsonl", context, model, progress)
    tokens = divergent = 0
    with (work / FILE).open("w", encoding="utf-8") as out:
        both = [_lines(work / f"likeliest-{name}.jsonl") for name, _, _ in passes]
        for row, mine, theirs in zip(_lines(rows), *both, strict=True):
            found = [i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
            ids = _completion(session, row)
            tokens, divergent = tokens + len(ids), divergent + len(found)
            line = {"id": row["id"], "token_ids": ids, "divergent": found}
            out.write(json.dumps(line) + "\n")
        out.flush()
        os.fsync(out.fileno())
    return {"completion_tokens": tokens, "divergent_tokens": divergent}


def _one_pass(
    session: Session,
    rows: Path,
    path: Path,
    context: Context,
    model: Callable[[], AbstractContextManager[Any]],
    progress: bool,
) -> None:
    """One line of likeliest tokens a row; lines that are there and complete are kept."""
    from data_gen.forward import likeliest

    done = _complete_lines(path)
    total = sum(1 for _ in _lines(rows))
    if done == total:
        return
    remaining = islice(_lines(rows), done, None)
    with (
        model() as loaded,
        path.open("a", encoding="utf-8") as out,
        tqdm(
            total=total,
            initial=done,
            desc=path.stem.replace("-", " of the "),
            unit="row",
            disable=not progress,
            file=sys.stderr,
        ) as bar,
    ):
        while chunk := list(islice(remaining, CHUNK)):
            prompts = [
                render(session.tokenizer, context, row["messages"][0]["content"]).token_ids
                for row in chunk
            ]
            for line in likeliest(loaded, prompts, [_completion(session, row) for row in chunk]):
                out.write(json.dumps(line) + "\n")
            out.flush()
            os.fsync(out.fileno())
            bar.update(len(chunk))


def _completion(session: Session, row: dict[str, Any]) -> list[int]:
    text = row["messages"][1]["content"]
    ids: list[int] = session.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, session.end_of_turn]


def _complete_lines(path: Path) -> int:
    """The number of complete lines; an incomplete last one is cut off."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        end = lines = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(end)
                break
            end, lines = end + len(line), lines + 1
    return lines


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
