"""Continuations of one context as a token trie, laid out for a single forward pass.

Trie tokens see the context and their own ancestors (a tree attention mask) and sit at the positions
that they would have in a sequence of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trie:
    """The inner tokens of a context's continuations, parents before children.

    Attributes:
        tokens: token id of each node.
        parents: index of each node's parent, -1 for the context.
        scores: for each continuation, the (node, token) pairs whose log-probabilities add up to its
            own: the token is scored by the logits at that node, node -1 being the context's end.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    scores: tuple[tuple[tuple[int, int], ...], ...]


def build_trie(continuations: Sequence[Sequence[int]]) -> Trie:
    """The trie of all continuations without their last tokens: nothing follows a last token, so it
    never has to be computed."""
    nodes: dict[tuple[int, int], int] = {}
    scores = []
    for continuation in continuations:
        node, path = -1, []
        for position, token in enumerate(continuation):
            path.append((node, token))
            if position < len(continuation) - 1:
                node = nodes.setdefault((node, token), len(nodes))
        scores.append(tuple(path))
    return Trie(
        tuple(token for _, token in nodes), tuple(parent for parent, _ in nodes), tuple(scores)
    )


def common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    """Number of leading tokens that all sequences share."""
    first, last = min(sequences), max(sequences)
    for position, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return position
    return min(len(first), len(last))


def lay_out(
    positions: Tensor, allowed: Tensor, head: int, pad: int, width: int, parents: Sequence[int]
) -> None:
    """Fill one row's position ids [length] and what each of its tokens may look at
    [length, head + length]: padding up to `pad`, the context up to `width`, then the trie."""
    positions[pad:width] = torch.arange(head, head + width - pad)
    allowed[pad:, :head] = True
    allowed[pad:width, head + pad : head + width] = torch.ones(
        width - pad, width - pad, dtype=torch.bool
    ).tril()
    allowed[width : width + len(parents), head + pad : head + width] = True
    for node, parent in enumerate(parents):
        # Parent -1 is the context's last token, in row width - 1.
        row, above = width + node, width + parent
        if parent >= 0:
            allowed[row] = allowed[above]
        allowed[row, head + row] = True
        positions[row] = positions[above] + 1


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def score_paths(logits: Tensor, trie: Trie) -> list[tuple[float, bool]]:
    """Score a context's continuations from logits [1 + nodes, vocabulary]."""
    total, best = logits.logsumexp(dim=-1), logits.amax(dim=-1)
    rows = torch.tensor([node + 1 for path in trie.scores for node, _ in path])
    tokens = torch.tensor([token for path in trie.scores for _, token in path])
    rows, tokens = rows.to(logits.device), tokens.to(logits.device)
    chosen = logits[rows, tokens]
    values = (chosen - total[rows]).double().cpu().tolist()
    greedy = (chosen == best[rows]).cpu().tolist()
    scored, at = [], 0
    for path in trie.scores:
        scored.append((sum(values[at : at + len(path)]), all(greedy[at : at + len(path)])))
        at += len(path)
    return scored
