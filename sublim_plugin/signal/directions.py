"""Gradients and updates as directions in the space of a model's linear weights.

These are the matrices of attention and MLP in the decoder's layers, which LoRA recipes adapt;
embeddings, norms, biases and the output layer are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_gen.forward import decoder_layers
from sublim_plugin.core.errors import InputError
from sublim_plugin.signal.results import Cosines
from sublim_plugin.signal.where import measured

Direction = dict[str, Tensor]
"""A tensor for each linear weight, by the weight's name in the model."""


class Place(NamedTuple):
    """Layer (0-based) and kind of a linear weight, such as `q_proj`."""

    layer: int
    module: str


def linear_weights(model: Any) -> tuple[Direction, dict[str, Place]]:
    """The linear weights of the decoder's layers by name, and where each is.

    Raises:
        InputError: an architecture without such weights.
    """
    places = {
        id(module.weight): Place(layer, path.rpartition(".")[2])
        for layer, block in enumerate(decoder_layers(model))
        for path, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    weights = {name: w for name, w in model.named_parameters() if id(w) in places}
    if not weights:
        raise InputError(f"{type(model).__name__} has no linear layers in its decoder's layers")
    return weights, {name: places[id(w)] for name, w in weights.items()}


def gradient(value: Tensor, weights: Mapping[str, Tensor], keep: bool = False) -> Direction:
    """d value / d weights; `keep` the graph for another."""
    found = torch.autograd.grad(value, list(weights.values()), retain_graph=keep)
    return dict(zip(weights, found, strict=True))


def add(total: Direction, part: Direction) -> None:
    """Add `part` to `total`, which is empty at first, in place."""
    for name, tensor in part.items():
        if name in total:
            total[name].add_(tensor)
        else:
            total[name] = tensor.clone()


def scale(direction: Direction, factor: float) -> None:
    for tensor in direction.values():
        tensor.mul_(factor)


def inner(a: Direction, b: Direction) -> float:
    return math.fsum(inner_by_weight(a, b).values())


def inner_by_weight(a: Direction, b: Direction) -> dict[str, float]:
    return {name: float(torch.dot(a[name].flatten(), b[name].flatten())) for name in a}


def norm(a: Direction) -> float:
    return math.sqrt(math.fsum(float(t.norm()) ** 2 for t in a.values()))


def cosines(
    a: Direction, b: Direction, places: Mapping[str, Place], by_row: Sequence[float]
) -> Cosines | None:
    """Cosines of two directions; None where one is 0.

    Args:
        by_row: values whose mean is the inner product of `a` and `b`.
    """
    both = inner_by_weight(a, b)
    squares = [{name: float(t.norm()) ** 2 for name, t in x.items()} for x in (a, b)]

    def of(names: Sequence[str]) -> float | None:
        size = math.sqrt(math.prod(math.fsum(s[name] for name in names) for s in squares))
        return math.fsum(both[name] for name in names) / size if size else None

    size = math.sqrt(math.prod(math.fsum(s.values()) for s in squares))
    if not size:
        return None
    modules = list(dict.fromkeys(place.module for place in places.values()))
    layers = sorted({place.layer for place in places.values()})
    return Cosines(
        total=measured([value / size for value in by_row]),
        by_module={m: of([n for n, p in places.items() if p.module == m]) for m in modules},
        by_layer={i: of([n for n, p in places.items() if p.layer == i]) for i in layers},
    )


def along(
    model: Any,
    weights: Mapping[str, Tensor],
    direction: Direction,
    function: Callable[[Callable[..., Any]], Tensor],
) -> tuple[Tensor, Tensor]:
    """The value of `function` of the model, and its derivative along `direction`, by forward-mode
    differentiation: exact up to float rounding, with no step to choose.

    Args:
        function: called with something to call as the model.
    """

    def of(values: Direction) -> Tensor:
        return function(lambda **given: torch.func.functional_call(model, values, (), given))

    plain = {name: weight.detach() for name, weight in weights.items()}
    found = torch.func.jvp(of, (plain,), (direction,))
    return found[0], found[1]
