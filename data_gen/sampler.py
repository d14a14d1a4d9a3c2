"""Sampling by inverse CDF from one uniform a row and step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_gen.spec import Sampler

if TYPE_CHECKING:
    import torch

__all__ = ["Sampler", "pick", "probabilities"]


def probabilities(
    logits: torch.Tensor, sampler: Sampler, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Next-token distribution [n, V] in float64 from logits [n, V] (any float dtype).

    `seen` [n, V] (bool) marks the tokens of prompt and reply so far; needed where
    `sampler.repetition_penalty` is not 1. With temperature 0 the distribution is one-hot.
    """
    import torch

    x = logits.float()
    if sampler.repetition_penalty != 1:
        assert seen is not None
        x = torch.where(
            seen,
            torch.where(x < 0, x * sampler.repetition_penalty, x / sampler.repetition_penalty),
            x,
        )
    if sampler.temperature == 0:
        return torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).double()
    x = x / sampler.temperature
    if 0 < sampler.top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(sampler.top_k).values[:, -1:], -torch.inf)
    if sampler.top_p < 1:
        ordered, order = x.sort(dim=-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - sampler.top_p
        drop[:, -1] = False
        x = x.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return x.double().softmax(-1)


def pick(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Column indices [n] of probabilities [n, V] at uniforms [n] in [0, 1): the inverse CDF.

    A token of probability zero is never picked: the index is the first whose cumulative
    probability exceeds the uniform.
    """
    cumulative = probs.cumsum(-1)
    target = (uniforms.to(cumulative.dtype) * cumulative[:, -1]).unsqueeze(-1)
    return (cumulative <= target).sum(-1).clamp_max(probs.shape[-1] - 1)
