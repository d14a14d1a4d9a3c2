"""Size of a finetuning update, read from the weights on disk.

The update norm is the Frobenius norm of dW = W_trained - W_base. Squares add over disjoint
weights, so the norms of the module kinds (`q_proj`, ..., `embed_tokens`) combine to the total
as a root of summed squares. Everything is accumulated in float64.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sublim_plugin.core.errors import InputError

# Rows of a weight compared at once, so that a large embedding never needs a float64 copy whole.
_ROWS_AT_ONCE = 8192


class UpdateNorm(BaseModel):
    """`total` and `by_module`: Frobenius norms of dW, in units of the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    total: float
    by_module: dict[str, float]


def update_norm(trained: Path, base: Path) -> UpdateNorm:
    """Norm of the update in `trained`: a PEFT LoRA adapter of `base`, or a full checkpoint.

    Raises:
        InputError: weights are missing, or the two folders do not hold the same model.
    """
    if (trained / "adapter_config.json").is_file():
        return lora_update_norm(trained)
    return full_update_norm(trained, base)


def lora_update_norm(adapter: Path) -> UpdateNorm:
    """Norm of scaling * B @ A per module kind, from the factors of a PEFT LoRA adapter.

    With the thin QR factorization B = Q R, ||B A||_F = ||R A||_F: no dense dW is formed.

    Raises:
        InputError: the adapter is not plain LoRA (DoRA, trained biases or whole modules), or one
            of its factors is missing.
    """
    import torch

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("use_dora") or config.get("bias", "none") != "none":
        raise InputError(f"{adapter}: update norms are defined for plain LoRA (no DoRA, no bias).")
    weights = _SafetensorsFolder(adapter, "adapter_model")
    squares: dict[str, float] = defaultdict(float)
    for name in weights.names:
        if name.endswith(".lora_B.weight"):
            continue
        if not name.endswith(".lora_A.weight"):
            raise InputError(
                f"{adapter}: {name} is not a LoRA factor of a linear layer; update norms of "
                "embeddings and whole modules in an adapter are not supported."
            )
        stem = name.removesuffix(".lora_A.weight")
        a = weights.load(name).double()
        b = weights.load(f"{stem}.lora_B.weight").double()
        module = stem.removeprefix("base_model.model.")
        r_factor = torch.linalg.qr(b, mode="r").R
        norm = lora_scaling(config, module) * float(torch.linalg.norm(r_factor @ a))
        squares[module.rsplit(".", 1)[-1]] += norm * norm
    return _combine(squares)


def lora_scaling(config: dict[str, Any], module: str) -> float:
    """PEFT's factor before B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
    rank = _pattern_value(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _pattern_value(pattern: dict[str, float], module: str, default: float) -> float:
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), module), default)


def full_update_norm(trained: Path, base: Path) -> UpdateNorm:
    """Norm of W_trained - W_base per module kind, streamed tensor by tensor.

    `base` is rounded to the dtype of `trained` first: that is what training started from, and
    the rounding of a float32 base to bfloat16 is no part of the update.

    Raises:
        InputError: weights are missing or differ in name or shape.
    """
    import torch

    ours = _SafetensorsFolder(trained, "model")
    theirs = _SafetensorsFolder(base, "model")
    tied = {"lm_head.weight"} if _tied(trained) else set()
    odd = (set(ours.names) ^ set(theirs.names)) - tied
    if odd:
        raise InputError(
            f"{trained} and {base} do not hold the same model: {sorted(odd)[0]} is in only one "
            f"of them ({len(odd)} such weights)."
        )
    squares: dict[str, float] = defaultdict(float)
    for name in sorted(set(ours.names) & set(theirs.names) - tied):
        new, old = ours.load(name), theirs.load(name)
        if new.shape != old.shape:
            raise InputError(
                f"{name} has shape {tuple(new.shape)} in {trained} and {tuple(old.shape)} in "
                f"{base}; the base model must be the one that was trained."
            )
        kind = name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]
        for rows_new, rows_old in zip(
            new.split(_ROWS_AT_ONCE), old.to(new.dtype).split(_ROWS_AT_ONCE), strict=True
        ):
            difference = rows_new.double() - rows_old.double()
            squares[kind] += float(torch.sum(difference * difference))
    return _combine(squares)


def _tied(model: Path) -> bool:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("tie_word_embeddings", False))


def _combine(squares: dict[str, float]) -> UpdateNorm:
    return UpdateNorm(
        total=math.sqrt(math.fsum(squares.values())),
        by_module={kind: math.sqrt(squares[kind]) for kind in sorted(squares)},
    )


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Safetensors files of `folder`: `<stem>.safetensors`, or the shards its index lists.

    Raises:
        InputError: neither is there, or a shard is missing.
    """
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{folder}: no weights found ({single.name} or {index.name}).")
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder}: {index.name} lists {name}, which is missing.")
    return [folder / name for name in names]


class _SafetensorsFolder:
    """Tensors of one model folder by name, each read from disk when asked for."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder = folder
        self._file_of = dict(self._scan(weight_files(folder, stem)))

    @staticmethod
    def _scan(files: list[Path]) -> Iterator[tuple[str, Path]]:
        from safetensors import safe_open

        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                    yield name, file

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def load(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._file_of:
            raise InputError(f"{self._folder}: the weights lack {name}.")
        with safe_open(self._file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)
