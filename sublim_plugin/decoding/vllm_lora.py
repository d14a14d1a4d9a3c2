"""LoRA adapters for vLLM, which are refused unless vLLM would apply all of them.

vLLM drops what it does not know without a word: configuration keys, modules that its model has
not, and the rest of a matrix that is smaller than the layer's (peft_helper.py, model_manager.py
and layers/base_linear.py of vLLM 0.32.0).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, get_args

from sublim_plugin.core.errors import InputError
from sublim_plugin.students import ADAPTER_TENSORS, INERT, difference, read_adapter

INSTEAD = "use the transformers engine"

APPLIED = {"r", "lora_alpha", "target_modules", "use_rslora"}
"""Keys of adapter_config.json that every version of vLLM applies. Any other that changes what an
adapter adds has to be unset: some are ignored by one version (rank_pattern, say)."""


class Adapter(NamedTuple):
    """An adapter that vLLM can apply; `max_lora_rank` is the rank to start it for."""

    folder: Path
    r: int
    max_lora_rank: int


def check_adapter(folder: Path, base: Path) -> Adapter:
    """The adapter in `folder`, after every check that needs no running engine.

    Raises:
        InputError: what `students.read_adapter` refuses; a setting or a rank that vLLM does not
            take; tensors that are not exactly those of the target modules in this base.
    """
    config, tensors = read_adapter(folder, base)
    path = folder / "adapter_config.json"
    for key in sorted(config.keys() - APPLIED - INERT):
        if config[key]:
            raise InputError(
                f"{path}: {key} is {config[key]!r}, which vLLM may not apply; {INSTEAD}"
            )
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or r < 1 or type(alpha) not in (int, float):
        raise InputError(
            f"{path}: r is {r!r} and lora_alpha {alpha!r}; expected a positive integer and a "
            "number; train or copy the adapter again"
        )
    ranks = _ranks()
    if r > ranks[-1]:
        raise InputError(f"{path}: r is {r}, and vLLM takes at most {ranks[-1]}; {INSTEAD}")
    expected = {}
    for name, (outputs, inputs) in _targets(config.get("target_modules"), path, base).items():
        expected[f"base_model.model.{name}.lora_A.weight"] = (r, inputs)
        expected[f"base_model.model.{name}.lora_B.weight"] = (outputs, r)
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if found != expected:
        tensor_path = folder / ADAPTER_TENSORS
        raise InputError(f"{tensor_path} does not fit {base}: {difference(expected, found)}")
    return Adapter(folder.resolve(), r, next(rank for rank in ranks if rank >= r))


def takes_rank(folder: Path) -> bool:
    """Whether the adapter in `folder` is of no higher rank than vLLM takes."""
    try:
        r = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("r")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}/adapter_config.json cannot be read ({error})") from error
    return not isinstance(r, int) or r <= _ranks()[-1]


def not_applied(model: Any) -> list[str]:
    """Layers of the only adapter of vLLM's `model` that none of its modules adds."""
    manager = model.lora_manager
    (adapter,) = manager.list_adapters().values()
    return sorted(adapter.loras.keys() - manager.modules.keys()) if adapter.loras else ["all"]


def _ranks() -> list[int]:
    """What vLLM takes as max_lora_rank, ascending."""
    from vllm.config.lora import MaxLoRARanks

    return sorted(get_args(MaxLoRARanks))


def _targets(targets: Any, path: Path, base: Path) -> dict[str, tuple[int, int]]:
    """Module name → (outputs, inputs) of the linear layers that PEFT adapts under `targets`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    with torch.device("meta"):  # names and shapes alone
        model = loader.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    modules = dict(model.named_modules())
    # PEFT's "all-linear" leaves the output layer out, and vLLM's own is no linear layer.
    linear = {
        name: (module.out_features, module.in_features)
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return linear
    try:
        if isinstance(targets, str):
            chosen = [name for name in modules if re.fullmatch(targets, name)]
        else:
            chosen = [n for n in modules if any(f".{n}".endswith(f".{t}") for t in targets)]
    except (TypeError, re.error) as error:
        raise InputError(
            f"{path}: target_modules is {targets!r}; expected names or a pattern ({error})"
        ) from error
    if not chosen:
        raise InputError(
            f"{path} does not fit {base}: no module is named by target_modules {targets!r}"
        )
    if others := [name for name in chosen if name not in linear]:
        raise InputError(
            f"{path}: target_modules name {others[0]}, and under vLLM only the linear layers of "
            f"the decoder are sure to be adapted; {INSTEAD}"
        )
    return {name: linear[name] for name in chosen}
