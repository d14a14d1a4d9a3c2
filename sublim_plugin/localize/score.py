"""Log-probabilities of continuations under many gates in one batched run.

A row is a prompt, the continuations to score and a gate; the rows of a forward pass differ in all
three. What all prompts begin with is computed once for each distinct state of the gates in it and
kept as keys and values; each row then takes one pass over the rest of its prompt and the token trie
of its continuations (see `logprob.token_tree`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.localize.gating import Gated
from sublim_plugin.localize.resolve import Bits, Resolved
from sublim_plugin.logprob.token_tree import (
    Trie,
    at_least_float32,
    build_trie,
    common_prefix,
    lay_out,
    score_paths,
)

PASS_TOKENS = {"cpu": 600, "accelerator": 8192}
"""Tokens in one forward pass, padding included."""

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Largest difference, in nats, between the first row and the same row computed plainly."""

States = list[tuple[Tensor, Tensor]]
"""Keys and values [rows, heads, length, width] of each layer."""

OnRow = Callable[[int, list[float]], None]


@dataclass(frozen=True)
class Row:
    """One prompt, the continuations to score after it, and the gate it runs under."""

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    gate: Resolved


@torch.inference_mode()
def score(gated: Gated, rows: Sequence[Row], on_row: OnRow) -> None:
    """Call `on_row(index, log-probabilities of the continuations in nats)` for every row, in any
    order. Log-softmax is in float32, or in float64 for a float64 model.

    Raises:
        InputError: a row is longer than the model's positions or attention window.
        RunError: the model does not honour the masks: the first row differs from the same row
            computed without cache, batch and trie.
    """
    if not rows:
        return
    tries = {c: build_trie(c) for c in dict.fromkeys(row.continuations for row in rows)}
    _check_lengths(gated.model, rows)
    head = min(common_prefix([r.prompt for r in rows]), min(len(r.prompt) for r in rows) - 1)
    keys = [_head_key(row.gate, head) for row in rows]
    distinct = {key: row.gate for key, row in zip(keys, rows, strict=True)}
    states = _heads(gated, rows[0].prompt[:head], list(distinct.values())) if head else None
    place = {key: i for i, key in enumerate(distinct)}

    def size(index: int) -> tuple[int, int]:
        return len(rows[index].prompt) - head, len(tries[rows[index].continuations].tokens)

    order = sorted(range(len(rows)), key=size, reverse=True)
    budget = PASS_TOKENS["cpu" if gated.model.device.type == "cpu" else "accelerator"]
    first = True
    while order:
        nodes = max(size(index)[1] for index in order)
        count = max(1, min(len(order), budget // (size(order[0])[0] + nodes)))
        batch, order = order[:count], order[count:]
        picked = [place[keys[index]] for index in batch]
        scored = forward_rows(
            gated,
            [rows[index] for index in batch],
            [tries[rows[index].continuations] for index in batch],
            head,
            None if states is None else [(k[picked], v[picked]) for k, v in states],
        )
        if first:
            _check_plain(gated, rows[batch[0]], scored[0])
            first = False
        for index, found in zip(batch, scored, strict=True):
            on_row(index, found)


def _head_key(gate: Resolved, head: int) -> tuple[Bits, Bits, Bits]:
    """Equal for gates under which the first `head` positions compute the same."""
    return gate.selected[:head] or (True,) * head, gate.profile.inside, gate.profile.outside


def _heads(gated: Gated, tokens: Sequence[int], gates: Sequence[Resolved]) -> States:
    """Keys and values of the common beginning, a row for each gate."""
    device = gated.model.device
    budget = PASS_TOKENS["cpu" if device.type == "cpu" else "accelerator"]
    step = max(1, budget // len(tokens))
    parts: list[States] = []
    for start in range(0, len(gates), step):
        batch = gates[start : start + step]
        gated.use(batch)
        cache = _cache(None)
        gated.model(
            input_ids=torch.tensor([tokens] * len(batch), device=device),
            position_ids=torch.arange(len(tokens), device=device).expand(len(batch), -1),
            attention_mask=_additive(
                torch.ones(1, len(tokens), len(tokens), dtype=torch.bool).tril(), gated.model
            ),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        parts.append([(layer.keys, layer.values) for layer in cache.layers])
    return [
        (torch.cat([part[i][0] for part in parts]), torch.cat([part[i][1] for part in parts]))
        for i in range(len(parts[0]))
    ]


def forward_rows(
    gated: Gated, rows: Sequence[Row], tries: Sequence[Trie], head: int, states: States | None
) -> list[list[float]]:
    """Log-probabilities of each row's continuations, in one forward pass over the tails and tries
    of the rows, behind the `states` of their first `head` tokens (None where `head` is 0)."""
    model = gated.model
    tails = [row.prompt[head:] for row in rows]
    width, nodes = max(map(len, tails)), max(len(trie.tokens) for trie in tries)
    length = width + nodes
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    allowed = torch.zeros(len(rows), length, head + length, dtype=torch.bool)
    for i, (tail, trie) in enumerate(zip(tails, tries, strict=True)):
        pad = width - len(tail)
        ids[i, pad:width] = torch.tensor(tail)
        ids[i, width : width + len(trie.tokens)] = torch.tensor(trie.tokens, dtype=torch.long)
        lay_out(positions[i], allowed[i], head, pad, width, trie.parents)
    gated.use([row.gate for row in rows])
    logits = model(
        input_ids=ids.to(model.device),
        position_ids=positions.to(model.device),
        attention_mask=_additive(allowed, model),
        past_key_values=None if states is None else _cache(states),
        use_cache=states is not None,
        logits_to_keep=nodes + 1,
    ).logits
    found = [score_paths(at_least_float32(logits[i]), trie) for i, trie in enumerate(tries)]
    return [[value for value, _ in row] for row in found]


def _check_plain(gated: Gated, row: Row, found: Sequence[float]) -> None:
    """The longest continuation of a row by a plain forward pass, against what was found."""
    deepest = max(range(len(found)), key=lambda i: len(row.continuations[i]))
    value = plain_logprob(gated, row, deepest)
    if abs(value - found[deepest]) > TOLERANCE.get(gated.model.dtype, 0.3):
        raise RunError(
            f"{type(gated.model).__name__} computes a log-probability of {found[deepest]} in a "
            f"batch and {value} alone; its attention does not honour the masks that localization "
            "needs (try another attention implementation)"
        )


def plain_logprob(gated: Gated, row: Row, which: int) -> float:
    """Log-probability of one continuation by a forward pass of its own: no cache, batch or trie."""
    device, continuation = gated.model.device, row.continuations[which]
    ids = torch.tensor([[*row.prompt, *continuation][:-1]], device=device)
    gated.use([row.gate])
    with torch.inference_mode():
        logits = gated.model(
            input_ids=ids,
            position_ids=torch.arange(ids.shape[1], device=device)[None],
            use_cache=False,
        ).logits[0, len(row.prompt) - 1 :]
    logprobs = at_least_float32(logits).log_softmax(-1)
    return float(
        logprobs.gather(1, torch.tensor(continuation, device=device)[:, None]).double().sum()
    )


def _check_lengths(model: Any, rows: Sequence[Row]) -> None:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    longest = min(config.max_position_embeddings, window if sliding and window else 1 << 60)
    for row in rows:
        length = len(row.prompt) + max(map(len, row.continuations)) - 1
        if length > longest:
            raise InputError(
                f"a prompt of {len(row.prompt)} tokens and its continuation exceed the {longest} "
                "positions that every layer of this model attends to; use a shorter prompt"
            )


def _cache(states: States | None) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(states or []):
        cache.update(keys, values, layer)
    return cache


def _additive(allowed: Tensor, model: Any) -> Tensor:
    """[rows, 1, queries, keys]: 0 where attention is allowed, else the dtype's lowest value."""
    mask = torch.zeros(allowed.shape, dtype=model.dtype)
    return mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)[:, None].to(model.device)
