"""Where the gradients of a dataset's losses point: to the teacher's update, and to the trait.

A gradient is taken at the base, before any step. For a teacher that is the base plus a small
update, Cloud et al. (arXiv 2507.14805, theorem 1 and its proof) show that a small step down the
loss on the teacher's outputs has an inner product of at least 0 with that update.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sublim_plugin.signal.directions import (
    Direction,
    Place,
    add,
    along,
    cosines,
    gradient,
    inner,
    norm,
    scale,
)
from sublim_plugin.signal.results import STEP, Alignment, Candidate, Loss
from sublim_plugin.signal.trait import Asked, differentiable_logprobs, log_shares
from sublim_plugin.signal.where import measured


class Gathered:
    """The gradient of one loss, row by row: their sum, and each one's inner products.

    Attributes:
        others: the directions that it is compared with, by name.
        products: for each of them, a row's -gradient times it.
    """

    def __init__(self, loss: Loss, others: Mapping[str, Direction]) -> None:
        self.loss, self.others = loss, others
        self.total: Direction = {}
        self.tokens, self.value = 0, 0.0
        self.products: dict[str, list[float]] = {name: [] for name in others}

    def row(self, loss: Tensor, tokens: int, weights: Direction, keep: bool = False) -> None:
        """Add a row's loss, a sum over `tokens` tokens; `keep` its graph for another."""
        found = gradient(loss, weights, keep)
        for name, other in self.others.items():
            self.products[name].append(-inner(found, other))
        add(self.total, found)
        self.tokens += tokens
        self.value += float(loss.detach())


def trait_gradients(
    model: Any, weights: Direction, asked: Asked, progress: bool
) -> tuple[Direction, Direction]:
    """Gradients of the target's log-probability and log share, each a mean over questions."""
    logprob: Direction = {}
    share: Direction = {}
    like = next(iter(weights.values()))
    for prompt, plan in _bar(asked.pairs, "trait's gradient", progress):
        found = differentiable_logprobs(model, prompt, plan, like)
        add(logprob, gradient(found[asked.target], weights, keep=True))
        add(share, gradient(log_shares(found)[asked.target], weights))
    for direction in (logprob, share):
        scale(direction, 1 / len(asked.pairs))
    return logprob, share


def align(
    gathered: Gathered,
    model: Any,
    weights: Direction,
    places: Mapping[str, Place],
    asked: Asked | None,
    progress: bool,
) -> Alignment | None:
    """The direction down the mean gradient against the others; None where there is none.

    `gathered.total` becomes that direction, scaled to a norm of `STEP`.
    """
    down, rows = gathered.total, len(next(iter(gathered.products.values()), []))
    if not down:
        return None
    scale(down, -1 / gathered.tokens)
    size = norm(down)
    by_row = {
        name: [product * rows / gathered.tokens for product in products]
        for name, products in gathered.products.items()
    }
    found = {
        name: cosines(down, other, places, by_row[name]) for name, other in gathered.others.items()
    }
    scale(down, STEP / size)
    candidates: tuple[Candidate, ...] = ()
    target = rank = None
    if asked is not None:
        candidates = _candidates(model, weights, down, asked, progress)
        target = measured([value * STEP / size for value in by_row["log_share"]])
        own = candidates[asked.target].log_share
        rank = 1 + sum(candidate.log_share > own for candidate in candidates)
    return Alignment(
        loss=gathered.loss,
        value=gathered.value / gathered.tokens,
        gradient_norm=size,
        update=found.get("update"),
        logprob=found.get("logprob"),
        log_share=found.get("log_share"),
        candidates=candidates,
        target=target,
        target_rank=rank,
    )


def _candidates(
    model: Any, weights: Direction, step: Direction, asked: Asked, progress: bool
) -> tuple[Candidate, ...]:
    """What `step` does to every candidate to first order, mean over questions."""
    like = next(iter(weights.values()))
    logprobs: list[Tensor] = []
    shares: list[Tensor] = []
    for prompt, plan in _bar(asked.pairs, "candidates", progress):
        of = partial(differentiable_logprobs, prompt=prompt, plan=plan, like=like)
        found, change = along(model, weights, step, of)
        logprobs.append(change)
        shares.append(change - (log_shares(found).exp() * change).sum())
    means = [torch.stack(each).double().mean(0).tolist() for each in (logprobs, shares)]
    return tuple(
        Candidate(name=name, logprob=logprob, log_share=share)
        for name, logprob, share in zip(asked.candidates, *means, strict=True)
    )


def _bar(pairs: Sequence[Any], what: str, progress: bool) -> Any:
    return tqdm(pairs, desc=what, unit="question", disable=not progress, file=sys.stderr)
