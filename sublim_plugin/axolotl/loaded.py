"""What the plugin reads off an axolotl configuration and the model that came of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sublim_plugin.axolotl.files import base_folder
from sublim_plugin.axolotl.receipt import Method
from sublim_plugin.core.errors import InputError


def plain(value: Any) -> Any:
    """A part of the configuration as plain dicts and lists."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def seed_of(cfg: Any) -> int:
    """The training seed; transformers' own where the YAML has none."""
    from transformers import TrainingArguments

    seed = cfg.get("seed")
    return TrainingArguments.seed if seed is None else int(seed)


def base_of(cfg: Any) -> Path:
    """The folder of the base model, in the revision that was loaded."""
    return base_folder(str(cfg["base_model"]), cfg.get("revision_of_model"))


def method_of(cfg: Any, model: Any) -> Method:
    """What is trained, by the adapter that the model carries: `lora_model_dir` sets no rank in the
    YAML."""
    if not cfg.get("adapter"):
        return Method(kind="full")
    settings: Any = getattr(model, "peft_config", {}).get("default")
    if not hasattr(settings, "lora_alpha"):
        raise InputError(
            f"`adapter: {cfg['adapter']}`: the receipt knows LoRA and full finetuning."
        )
    alpha, rank, rslora = float(settings.lora_alpha), int(settings.r), bool(settings.use_rslora)
    return Method(
        kind="lora",
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        scaling=alpha / (math.sqrt(rank) if rslora else rank),
    )
