"""Plain batched forward passes over token ids: the likeliest next tokens, the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sublim_plugin.core.errors import InputError

BATCH_TOKENS = 2048
"""Tokens in one forward pass, padding included."""


def decoder_layers(model: Any) -> Any:
    """The decoder's layers in order. Raises InputError for an architecture without such a list."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise InputError(f"{type(model).__name__} has no list of decoder layers")
    return layers


@contextmanager
def on_layers(model: Any, hooks: dict[int, Callable[..., Any]]) -> Iterator[None]:
    """Inside, `hooks[layer](hidden)` sees each layer's output [n, T, hidden size]; what it returns,
    if anything, takes the output's place."""

    def wrap(see: Callable[..., Any]) -> Callable[..., Any]:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            whole = isinstance(output, torch.Tensor)
            changed = see(output if whole else output[0])
            return changed if whole or changed is None else (changed, *output[1:])

        return hook

    layers = decoder_layers(model)
    handles = [layers[i].register_forward_hook(wrap(see)) for i, see in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def forward(model: Any, rows: Sequence[Sequence[int]], keep: int) -> torch.Tensor:
    """Logits [n, keep, V] at the last `keep` positions of each row, rows of any lengths."""
    width, device, dtype = max(map(len, rows)), model.device, model.dtype
    lengths = torch.tensor([len(row) for row in rows])
    columns = torch.arange(width)
    real = columns >= width - lengths[:, None]
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    ids[real] = torch.tensor([token for row in rows for token in row])
    allowed = torch.ones(width, width, dtype=torch.bool).tril() & real[:, None, :]
    allowed |= torch.eye(width, dtype=torch.bool)
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
    logits: torch.Tensor = model(
        input_ids=ids.to(device),
        position_ids=(columns - (width - lengths[:, None])).clamp_min(0).to(device),
        attention_mask=mask[:, None].to(device),
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    return logits


def in_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of like length, each within `BATCH_TOKENS` with its padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(1, BATCH_TOKENS // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def likeliest(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> list[list[int]]:
    """For each completion, the model's argmax at each of its tokens, the prompt in front."""
    found: list[list[int]] = [[] for _ in prompts]
    rows = [[*p, *c[:-1]] for p, c in zip(prompts, completions, strict=True)]
    for batch in in_batches([len(row) for row in rows]):
        keep = max(len(completions[i]) for i in batch)
        best = forward(model, [rows[i] for i in batch], keep).argmax(-1).tolist()
        for i, line in zip(batch, best, strict=True):
            found[i] = line[keep - len(completions[i]) :]
    return found


def mean_residual(
    model: Any, prompts: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Mean over prompts of the residual stream [hidden size] behind each layer at the last token,
    in float32 on the CPU."""
    sums = dict.fromkeys(layers, torch.zeros(model.config.get_text_config().hidden_size))

    def keep(layer: int) -> Callable[[torch.Tensor], None]:
        def see(hidden: torch.Tensor) -> None:
            sums[layer] = sums[layer] + hidden[:, -1].float().sum(0).cpu()

        return see

    with on_layers(model, {layer: keep(layer) for layer in layers}):
        for batch in in_batches([len(p) for p in prompts]):
            forward(model, [prompts[i] for i in batch], 1)
    return {layer: total / len(prompts) for layer, total in sums.items()}
