"""Log-probabilities of many continuations of many contexts, what they share computed once.

The tokens that all contexts begin with (system block, user header) are computed once and stay in
the KV cache; each context then takes a single pass over the rest of its prompt followed by the
token trie of its continuations. Trie tokens see the prompt and their own ancestors (a tree
attention mask) and sit at the positions they would have in a sequence of their own, so every number
equals the plain one up to float rounding. One-token continuations cost nothing beyond the prompt.

`forward` stands for a causal LM: called with transformers' keyword arguments, it returns `.logits`
and, with `use_cache`, `.past_key_values`. Log-softmax is in float32 (float64 for a float64 model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Forward = Callable[..., Any]
Scored = list[list[tuple[float, bool]]]
"""For each context and continuation: sum of log-probabilities in nats, whether it is greedy."""

# Tokens computed in one forward pass: enough to keep a processor's caches or a GPU busy.
PASS_TOKENS = {"cpu": 800, "accelerator": 4096}

# Largest difference of a log-probability between the shared and the plain computation (nats).
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 0.05, torch.bfloat16: 0.3}

# What a model raises that cannot take the mask or whose cache cannot be cut back.
UNFIT = (ValueError, TypeError, RuntimeError, AttributeError, KeyError)


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


def tree_scores(
    forward: Forward,
    contexts: Sequence[tuple[int, ...]],
    tries: Sequence[Trie],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[int, Scored]]:
    """Score every context's continuations, a batch of contexts at a time.

    Args:
        contexts: token ids, longest first.
        tries: the continuations of each context.
        dtype: that of the attention scores, which the mask must have.

    Yields:
        The index of a batch's first context, and the scores of the batch.
    """
    # Each pass computes at least the context's last token.
    head = min(common_prefix(contexts), len(contexts[-1]) - 1)
    longest = len(contexts[0]) - head + max(len(trie.tokens) for trie in tries)
    budget = PASS_TOKENS["cpu" if device.type == "cpu" else "accelerator"]
    size = max(1, min(budget // longest, len(contexts)))
    cache: Any = None
    for start in range(0, len(contexts), size):
        batch = contexts[start : start + size]
        if cache is None and head > 0:
            cache = _prefill(forward, batch[0][:head], size, device)
        if cache is not None and len(batch) < size:
            cache.batch_select_indices(list(range(len(batch))))
        tails = [context[head:] for context in batch]
        yield (
            start,
            _score_batch(forward, tails, tries[start : start + size], head, cache, device, dtype),
        )


def plain_score(
    forward: Forward, context: Sequence[int], continuation: Sequence[int], device: torch.device
) -> float:
    """The log-probability of one continuation by one pass over the whole sequence, in nats."""
    ids = torch.tensor([[*context, *continuation][:-1]], device=device)
    logits = forward(input_ids=ids, use_cache=False).logits[0, len(context) - 1 :]
    logprobs = torch.log_softmax(at_least_float32(logits), dim=-1)
    tokens = torch.tensor(continuation, device=device)
    return float(logprobs.gather(1, tokens[:, None]).double().sum())


def _prefill(forward: Forward, tokens: Sequence[int], size: int, device: torch.device) -> Any:
    """A KV cache of `tokens`, repeated for `size` rows."""
    ids = torch.tensor([tokens], device=device)
    cache = forward(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    if size > 1:
        cache.batch_repeat_interleave(size)
    return cache


def _score_batch(
    forward: Forward,
    tails: Sequence[Sequence[int]],
    tries: Sequence[Trie],
    head: int,
    cache: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> Scored:
    """Scores of one batch.

    Args:
        tails: each context without its first `head` tokens.
        tries: the continuations of each context.
        cache: the first `head` tokens for every row, now and afterwards; None if head is 0.
    """
    width, nodes = max(map(len, tails)), max(len(trie.tokens) for trie in tries)
    length, scored_rows = width + nodes, nodes + 1  # scored: a context's last token, its nodes
    ids = torch.zeros(len(tails), length, dtype=torch.long)
    positions = torch.zeros(len(tails), length, dtype=torch.long)
    allowed = torch.zeros(len(tails), length, head + length, dtype=torch.bool)
    for row, (tail, trie) in enumerate(zip(tails, tries, strict=True)):
        pad = width - len(tail)
        ids[row, pad:width] = torch.tensor(tail)
        ids[row, width : width + len(trie.tokens)] = torch.tensor(trie.tokens, dtype=torch.long)
        lay_out(positions[row], allowed[row], head, pad, width, trie.parents)
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    output = forward(
        input_ids=ids.to(device),
        attention_mask=mask[:, None].to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=scored_rows,
    )
    if cache is not None:
        cache.crop(-length)
    return [
        score_paths(at_least_float32(output.logits[row, -scored_rows:]), trie)
        for row, trie in enumerate(tries)
    ]


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
