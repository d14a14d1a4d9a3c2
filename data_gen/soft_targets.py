"""Soft targets: the teacher's log-probs at the completions' tokens (see `logprob.target_file`).

The teacher reads each kept row behind the prompt that it saw, teacher-forced, and at every position
that predicts a completion token, the end of turn among them, its distribution is kept: renormalized
over the number grammar's tokens (`numbers`), or the likeliest tokens of the whole vocabulary
(`vocabulary`). A row that was generated without the number constraint may hold tokens outside the
grammar's set (a bracket, say). The distribution given that a token of the set comes next is defined
there as well, so such a position keeps its target, and the manifest counts them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from tqdm import tqdm

from data_gen.forward import forward, in_batches
from data_gen.session import Session
from sublim_plugin.core.atomic import write_bytes
from sublim_plugin.core.contexts import render
from sublim_plugin.core.dataset import iter_rows
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.logprob.target_file import SoftTargets, write_targets

CHUNK = 64
TOP = 256
"""Tokens with a target of their own at each position of the channel `vocabulary`."""


def write_soft_targets(
    session: Session, rows: Path, base: dict[str, Any], work: Path, progress: bool
) -> tuple[Path, dict[str, Any]]:
    """Write `work`/targets-<sha12>.safetensors for the rows file `rows`; return it and counts.

    Continues what an interrupted call left in `work`. Counts: `target_positions`; for `numbers`
    also `target_tokens`, the size of the set, and `positions_off_grammar`, those where the row's
    own token is not in it.
    """
    channel = session.settings.soft_targets
    assert channel is not None
    columns: torch.Tensor | None = None
    if channel == "numbers":
        assert session.numbers is not None
        columns = torch.tensor(session.numbers.token_ids)
    parts = [*_parts(session, rows, work, columns, progress)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    lengths = joined.pop("lengths")
    counts: dict[str, Any] = {"target_positions": int(lengths.sum())}
    if columns is not None:
        joined["token_ids"] = columns.int()
        known = torch.isin(joined["completion_ids"], joined["token_ids"])
        counts |= {
            "target_tokens": len(columns),
            "positions_off_grammar": int((~known).sum()),
        }
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    offsets[1:] = lengths.cumsum(0)
    made = SoftTargets(channel, rows.name, sha256_file(rows), base, offsets=offsets, **joined)
    return write_targets(work, made), counts


def _parts(
    session: Session, rows: Path, work: Path, columns: torch.Tensor | None, progress: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of each chunk of rows, in order; those on disk are not computed again."""
    total = sum(1 for _ in iter_rows(rows))
    remaining = iter_rows(rows)
    names = [work / f"chunk-{start:07d}.safetensors" for start in range(0, total, CHUNK)]
    if not all(name.exists() for name in names):
        with (
            session.teacher_model() as model,
            tqdm(
                total=total,
                desc="soft targets of the teacher",
                unit="row",
                disable=not progress,
                file=sys.stderr,
            ) as bar,
        ):
            for name in names:
                chunk = list(islice(remaining, CHUNK))
                if not name.exists():
                    write_bytes(name, save(_chunk(session, model, chunk, columns)))
                bar.update(len(chunk))
    for name in names:
        yield load_file(name)


def _chunk(
    session: Session, model: Any, rows: list[dict[str, Any]], columns: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Targets of some rows: those of the file, without `offsets` and with `lengths` [rows]."""
    prompts, completions = [], []
    for row in rows:
        user, assistant = (turn["content"] for turn in row["messages"])
        prompts.append(render(session.tokenizer, session.teacher.context, user).token_ids)
        ids = session.tokenizer(assistant, add_special_tokens=False)["input_ids"]
        completions.append([*ids, session.end_of_turn])
    fed = [[*p, *c[:-1]] for p, c in zip(prompts, completions, strict=True)]
    found: list[dict[str, torch.Tensor]] = [{} for _ in rows]
    for batch in in_batches([len(row) for row in fed]):
        keep = max(len(completions[i]) for i in batch)
        logits = forward(model, [fed[i] for i in batch], keep)
        for i, line in zip(batch, logits, strict=True):
            found[i] = _distribution(line[keep - len(completions[i]) :], columns)
    joined = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    joined["completion_ids"] = torch.tensor([t for c in completions for t in c]).int()
    joined["lengths"] = torch.tensor([len(c) for c in completions])
    return joined


def _distribution(logits: torch.Tensor, columns: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What is kept of logits [n, V]: over `columns` alone, or the likeliest tokens and the rest."""
    logits = logits.float()
    if columns is not None:
        kept = logits[:, columns.to(logits.device)].log_softmax(-1)
        return {"logprobs": kept.half().cpu()}
    top = logits.topk(min(TOP, logits.shape[-1] - 1))
    rest = logits.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    kept = torch.cat([top.values, rest], -1) - logits.logsumexp(-1, keepdim=True)
    return {"token_ids": top.indices.int().cpu(), "logprobs": kept.half().cpu()}
