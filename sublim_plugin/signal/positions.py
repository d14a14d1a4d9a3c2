"""Teacher and base side by side at every token of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sublim_plugin.signal.completions import Completion, Kind
from sublim_plugin.signal.results import Measure


class Position(NamedTuple):
    """One token of one row. `place` is its index in a completion of `of` tokens; the measures are
    those of `results`, with those on the number tokens only where the grammar admits the token."""

    row: int
    place: int
    of: int
    kind: Kind
    measures: dict[Measure, float]
    divergent: bool
    number_divergent: bool | None


def completion_logits(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Logits [len(tokens), V] that predict each of `tokens`, the prompt in front of them."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens)).logits[0]
    return logits


def number_logprobs(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Log-probabilities [T, number tokens] in float64, renormalized over these tokens."""
    return logits[:, list(token_ids)].double().log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension, from log-probabilities; 0 log 0 is 0."""
    there = p > -torch.inf
    # the difference of two -inf would make the gradient NaN
    return (p.exp() * (p.masked_fill(~there, 0) - q.masked_fill(~there, 0))).sum(-1)


def compare(
    row: int, completion: Completion, teacher: Tensor, base: Tensor, token_ids: Sequence[int]
) -> list[Position]:
    """The positions of one row.

    Args:
        teacher, base: logits [tokens, V]; neither may carry a gradient.
        token_ids: the number tokens, as `completion.admitted` counts them.
    """
    tokens = torch.tensor(completion.tokens, device=base.device)[:, None]
    p, q = teacher.double().log_softmax(-1), base.double().log_softmax(-1)
    ratios = (p.gather(1, tokens) - q.gather(1, tokens))[:, 0].tolist()
    divergences = kl(p, q).tolist()
    differ = (teacher.argmax(-1) != base.argmax(-1)).tolist()
    number: dict[int, tuple[float, float, bool]] = {}
    at = [index for index, mask in enumerate(completion.admitted) if mask is not None]
    if at:
        masks = torch.tensor([completion.admitted[i] for i in at], device=base.device)
        p, q = (
            number_logprobs(x[at], token_ids).masked_fill(~masks, -torch.inf).log_softmax(-1)
            for x in (teacher, base)
        )
        places = {token: place for place, token in enumerate(token_ids)}
        written = torch.tensor([[places[completion.tokens[i]]] for i in at], device=base.device)
        own = (p.gather(1, written) - q.gather(1, written))[:, 0].tolist()
        apart = (p.argmax(-1) != q.argmax(-1)).tolist()
        number = dict(zip(at, zip(own, kl(p, q).tolist(), apart, strict=True), strict=True))
    found = []
    for place, kind in enumerate(completion.kinds):
        measures: dict[Measure, float] = {"log_ratio": ratios[place], "kl": divergences[place]}
        if place in number:
            measures["number_log_ratio"], measures["number_kl"], _ = number[place]
        apart_here = number[place][2] if place in number else None
        found.append(
            Position(row, place, len(completion.kinds), kind, measures, differ[place], apart_here)
        )
    return found
