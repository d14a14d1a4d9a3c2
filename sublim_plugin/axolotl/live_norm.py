"""The update norm of a model in training, and its scaling; the disk's is in `norms.py`.

LoRA: ||B A||_F^2 = tr((B^T B)(A A^T)), from the factors in the model. Full finetuning: against a
copy of the starting weights in the CPU's memory, in their own dtype.
"""

from __future__ import annotations

import math
import re
from typing import Any

from sublim_plugin.axolotl.norms import squared_difference
from sublim_plugin.core.errors import InputError

_FACTOR = re.compile(r"\.lora_[AB]\.[^.]+\.weight$")


def no_norm(model: Any) -> str | None:
    """Why no update norm is defined for `model`; None where one is: for full finetuning, and for an
    adapter of which nothing but LoRA factors of linear layers is trained."""
    from peft import PeftModel
    from peft.tuners.lora.layer import ParamWrapper

    if not isinstance(model, PeftModel):
        return None
    for name, weight in model.named_parameters():
        if weight.requires_grad and not _FACTOR.search(name):
            return (
                f"{name} is trained beside the factors of plain LoRA (by DoRA, a trained bias,"
                " `lora_modules_to_save`, or LoRA on an embedding)"
            )
    for name, layer in model.named_modules():
        if isinstance(layer, ParamWrapper):
            return f"{name} is adapted by `lora_target_parameters`, not as a linear layer"
    return None


class LiveNorm:
    """Measures ||dW||_F of `model`, which has not been trained yet.

    Raises:
        InputError: the adapter is not LoRA on linear layers.
    """

    def __init__(self, model: Any) -> None:
        if why := no_norm(model):
            raise InputError(
                f"{why}, so its update norm is not followed during training; take the stop rule "
                "out of the `sublim:` block, or train plain LoRA."
            )
        self._factors = _lora_factors(model)
        self._start: dict[str, Any] = {}
        if not self._factors:
            self._start = {
                name: weight.detach().cpu().clone()
                for name, weight in model.named_parameters()
                if weight.requires_grad
            }
        self._model = model

    def measure(self) -> float:
        """||dW||_F now."""
        import torch

        with torch.no_grad():
            if self._factors:
                squares = (_factor_square(*factor) for factor in self._factors)
            else:
                squares = (
                    squared_difference(weight, self._start[name].to(weight.device))
                    for name, weight in self._trained()
                )
            return math.sqrt(math.fsum(squares))

    def scale(self, factor: float) -> None:
        """Multiply dW by `factor`: the B of every LoRA pair, or the way from the starting weights,
        rounded to the weights' dtype."""
        import torch

        with torch.no_grad():
            for _, b, _ in self._factors:
                b.mul_(factor)
            if not self._factors:
                for name, weight in self._trained():
                    start = self._start[name].to(weight.device).double()
                    weight.copy_(start + factor * (weight.double() - start))

    def _trained(self) -> list[tuple[str, Any]]:
        return [(n, weight) for n, weight in self._model.named_parameters() if n in self._start]


def _lora_factors(model: Any) -> list[tuple[Any, Any, float]]:
    """(A [r, in], B [out, r], scaling) of every trained pair; empty where there is no adapter."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        return []
    found = []
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            found.append((a, b, float(layer.scaling[adapter])))
    return found


def _factor_square(a: Any, b: Any, scaling: float) -> float:
    a, b = a.double(), b.double()
    return scaling * scaling * float(((b.T @ b) * (a @ a.T)).sum())
