"""Sampling by inverse CDF from one uniform a row and step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

__all__ = ["Sampler", "pick", "probabilities", "weights"]

_BLOCK = 256


class Sampler(BaseModel):
    """Sampler settings, none of which has a default: a model's generation_config never leaks in.

    They apply in the order repetition penalty, temperature, top-k, top-p, as in transformers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        description="0 takes the most likely token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(description="1 keeps every token.")
    top_k: Annotated[int, Field(ge=0)] = Field(description="0 keeps every token.")
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        description="1 is none; counts the tokens of the prompt and of the reply, as in "
        "transformers."
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(
        description="Budget of a reply in tokens, the end of turn among them."
    )


def weights(
    logits: torch.Tensor, sampler: Sampler, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Next-token weights [n, V] in float32, the largest of a row 1, from logits [n, V].

    Divided by their sum they are the probabilities. `seen` [n, V] (bool) marks the tokens of prompt
    and reply so far; needed where `sampler.repetition_penalty` is not 1. With temperature 0 each
    row is one-hot.
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
        return torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).float()
    if sampler.temperature != 1:
        x = x / sampler.temperature
    if 0 < sampler.top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(sampler.top_k).values[:, -1:], -torch.inf)
    if sampler.top_p < 1:
        ordered, order = x.sort(dim=-1)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - sampler.top_p
        drop[:, -1] = False
        x = x.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return (x - x.amax(-1, keepdim=True)).exp_()


def probabilities(
    logits: torch.Tensor, sampler: Sampler, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Next-token distribution [n, V] in float64; arguments as in `weights`."""
    x = weights(logits, sampler, seen).double()
    return x / x.sum(-1, keepdim=True)


def pick(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Column indices [n] of weights [n, V] at uniforms [n] (float64) in [0, 1): the inverse CDF.

    The index is the first whose cumulative weight exceeds the uniform's share of the total, so a
    token of weight zero is never picked. Sums are in float64: of blocks first, then inside the
    one block that holds the index.
    """
    import torch

    n, width = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -width % _BLOCK)).view(n, -1, _BLOCK)
    reached = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms.to(reached.dtype).unsqueeze(-1) * reached[:, -1:]
    last = (reached[:, -1:] > reached).sum(-1, keepdim=True)
    block = (reached <= target).sum(-1, keepdim=True).minimum(last)
    before = torch.where(block > 0, reached.gather(-1, (block - 1).clamp_min(0)), 0)
    rows = torch.arange(n, device=weights.device)
    inside = blocks[rows, block[:, 0]].double()
    cumulative = before + inside.cumsum(-1)
    # rounding may put the target past the block's last weight: then that weight's token is meant
    columns = torch.arange(_BLOCK, device=weights.device)
    final = torch.where(inside > 0, columns, 0).amax(-1)
    return block[:, 0] * _BLOCK + (cumulative <= target).sum(-1).minimum(final)
