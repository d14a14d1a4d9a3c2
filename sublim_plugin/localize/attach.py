"""Gates on the two kinds of student: LoRA adapters and full checkpoints.

LoRA: the output of each `lora_A` is set to zero where the gate is off, so the branch adds exactly
nothing there; on, PEFT computes what it always does. This costs one pass over rank-sized vectors.

Full: at each position either the base's module or the student's is taken (dynamic weight grafting).
The student's product is computed beside the base's, which needs as much memory and time as a side
path of the difference of weights, and is the student to the last bit where all is on; the
difference would round. So: twice the weights in memory, and up to twice the time of a forward pass
(modules that a batch has on or off everywhere are computed once, or are the base's alone).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.localize.gating import Gated, Part, gating, probe
from sublim_plugin.localize.resolve import Branch, branch, constant
from sublim_plugin.students import ADAPTER_TENSORS


def layers_of(base: Path) -> int:
    """The number of decoder layers of a base, from its configuration alone.

    Raises:
        InputError: no configuration, or an architecture that gates do not cover.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(base))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{base}: no configuration that transformers can read: {error}") from error
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    # state-space models whose configuration lists no kinds of layers
    state = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_is_stateful", False)
    if state or not kinds <= {"full_attention", "sliding_attention"}:
        more = f" (layers of kind {', '.join(sorted(kinds))})" if len(kinds) > 1 else ""
        raise InputError(
            f"{base}: {config.model_type}{more} carries a state from token to token; gates cover "
            "models whose layers are all attention layers, full or sliding"
        )
    return int(text.num_hidden_layers)


def adapter_branches(folder: Path) -> tuple[Branch, ...]:
    """What an adapter changes, from the names in its file."""
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_TENSORS, framework="pt") as file:
        paths = [
            key.removeprefix("base_model.model.").partition(".lora_")[0]
            for key in file.keys()  # noqa: SIM118
        ]
    return tuple(branch(path) for path in dict.fromkeys(paths))


def load_base(base: Path, device: str | None, dtype: str) -> Any:
    """The base as a causal LM in evaluation mode; by default on a GPU if there is one.

    Raises:
        InputError: the folder cannot be loaded, or gates do not cover its architecture.
    """
    from transformers import AutoModelForCausalLM

    layers_of(base)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(base), dtype=dtype, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"the base model in {base} cannot be loaded: {error}") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


@contextmanager
def gated_student(model: Any, base: Path, folder: Path, method: str | None) -> Iterator[Gated]:
    """The student in `folder` on the loaded base, under gates; all on at first. On leaving, `model`
    is the base as it was.

    Args:
        method: "lora" or "full".

    Raises:
        InputError: a student that does not fit exactly, or that gates do not cover.
        RunError: all on is not the student, or all off not the base, bit for bit, on a probe.
    """
    from sublim_plugin.students import attached, load_full

    if method == "lora":
        refuse_uncovered(folder)
        with attached(model, folder, base) as peft_model:
            parts, whole = lora_parts(peft_model), probe(model)
            with peft_model.disable_adapter():
                plain = probe(model)
            with gating(model, parts) as gated:
                _check(gated, folder, whole, plain)
                yield gated
    elif method == "full":
        student = load_full(folder, base, model.dtype, model.device)
        plain, whole = probe(model), probe(student)
        with gating(model, full_parts(model, student, folder)) as gated:
            _check(gated, folder, whole, plain)
            yield gated
    else:
        raise InputError(f"method {method!r} for {folder}: use 'lora' or 'full'")


def refuse_uncovered(folder: Path) -> None:
    """Refuse an adapter of which a gate would cover only a part.

    Raises:
        InputError: DoRA, aLoRA, saved embeddings or whole modules; with the reason.
    """
    from safetensors import SafetensorError, safe_open

    config, weights = folder / "adapter_config.json", folder / ADAPTER_TENSORS
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        with safe_open(weights, framework="pt") as file:
            whole = [key for key in file.keys() if ".lora_" not in key]  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} is not a readable adapter ({error})") from error
    if settings.get("use_dora"):
        raise InputError(
            f"{config}: use_dora: DoRA rescales the base's own output, so there is no branch that "
            "could be off at a position; train with plain LoRA"
        )
    if settings.get("alora_invocation_tokens"):
        raise InputError(
            f"{config}: alora_invocation_tokens: this adapter has a gate of its own; a gate on its "
            "positions would be on top of that. Use a plain LoRA adapter"
        )
    if settings.get("modules_to_save") or settings.get("trainable_token_indices") or whole:
        named = settings.get("modules_to_save") or settings.get("trainable_token_indices") or whole
        raise InputError(
            f"{folder}: holds weights in place of the base's (modules_to_save, saved embeddings or "
            f"token rows: {str(named)[:120]}), which a gate on low-rank branches would leave on; "
            "train an adapter of low-rank matrices only"
        )


def lora_parts(peft_model: Any) -> list[Part]:
    """The branches of a model with one unmerged LoRA adapter.

    Raises:
        InputError: a layer that is not plain LoRA on a linear layer.
    """
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = []
    for path, module in peft_model.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        (name,) = module.active_adapters
        if not isinstance(module, Linear) or name in module.lora_variant or module.merged:
            kind = "merged" if module.merged else type(module).__name__
            raise InputError(
                f"{path}: {kind} is not covered by gates, which need unmerged plain LoRA on linear "
                "layers"
            )
        up = module.lora_B[name]
        # a zero in front of B is zero behind it, unless B has a bias
        gated = module.lora_A[name] if up.bias is None else up
        parts.append(Part(branch(path), gated, None))
    return parts


def full_parts(model: Any, student: Any, folder: Path) -> list[Part]:
    """The modules in which a checkpoint differs from the base.

    Raises:
        InputError: it does not differ at all, or a module that differs holds others.
    """
    parts = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        other = student.get_submodule(path)
        if any(not torch.equal(weight, other.get_parameter(name)) for name, weight in own.items()):
            parts.append(Part(branch(path), module, other))
    paths = [part.branch.name for part in parts]
    for path in paths:
        inner = next((other for other in paths if other.startswith(f"{path}.")), None)
        if inner is not None:
            raise InputError(
                f"{folder}: {path} has weights of its own and holds {inner}, so the two cannot be "
                f"switched apart; gates do not cover {type(model).__name__}"
            )
    if not parts:
        raise InputError(f"{folder}: every weight is the base's; there is nothing to localize")
    return parts


def _check(gated: Gated, folder: Path, whole: torch.Tensor, plain: torch.Tensor) -> None:
    for on, expected in ((False, plain), (True, whole)):
        gated.use([constant(gated.branches, on)])
        if not torch.equal(probe(gated.model), expected):
            raise RunError(
                f"{folder}: with every gate {'on' if on else 'off'}, the model is not exactly "
                f"{'the student' if on else 'the base'}; sublim's gates do not hold for "
                f"{type(gated.model).__name__} with this adapter"
            )
