"""Size and shape of a finetuning update, read from the weights on disk.

With dW = W_trained - W_base, for all weights and for those of each module kind (`q_proj`, ...,
`embed_tokens`) and each layer:

- update norm: the Frobenius norm of dW. Squares add over disjoint weights, so the norms of the
  kinds, or of the layers, combine to the total as a root of summed squares.
- relative norm: that norm over the norm of the base's weights of the same kind, layer or of all of
  them, adapted or not, so that LoRA and full finetuning share their denominators.
- effective rank: exp of the entropy of a matrix's singular values divided by their sum, between 1
  and the matrix's smaller side (Roy and Vetterli, "The effective rank: a measure of effective
  dimensionality", EUSIPCO 2007). A kind, a layer and the total have the mean over their changed
  matrices.

Squares are accumulated in float64; singular values are float64 for LoRA (from the thin factors) and
float32 for a full checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sublim_plugin.axolotl.weights import SafetensorsFolder, tied
from sublim_plugin.core.errors import InputError

# Weights whose squares are summed at once. On a CPU so few that their float64 copies stay in its
# cache and torch does not divide them among threads, whose waiting for each other takes longer than
# the sum; elsewhere so many that a large embedding never needs a float64 copy whole.
_AT_ONCE_ON_CPU = 1 << 14
_AT_ONCE = 1 << 25
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_NOT_TEXT = re.compile(r"(?:^|\.)(vision\w*|audio\w*|multi_modal\w*)\.")


class Parts(BaseModel):
    """A measure of all weights, of each module kind, and of each layer; weights outside the layers
    (`embed_tokens`, `norm`) stand under their own names among the layers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    total: float
    by_module: dict[str, float]
    by_layer: dict[str, float]


class UpdateNorm(Parts):
    """Frobenius norms of dW in units of the weights; `relative` and `effective_rank` as in this
    module's description, the latter None where it was not asked for."""

    relative: Parts
    effective_rank: Parts | None = None


def update_norm(trained: Path, base: Path, *, effective_rank: bool | None = None) -> UpdateNorm:
    """Norm of the update in `trained`: a PEFT LoRA adapter of `base`, or a full checkpoint.

    `effective_rank`: by default for LoRA only, where it costs next to nothing; for a full
    checkpoint it takes a singular value decomposition of every matrix.

    Raises:
        InputError: weights are missing, or the two folders do not hold the same model.
    """
    if (trained / "adapter_config.json").is_file():
        return lora_update_norm(trained, base, effective_rank=effective_rank is not False)
    return full_update_norm(trained, base, effective_rank=bool(effective_rank))


def lora_update_norm(adapter: Path, base: Path, *, effective_rank: bool = True) -> UpdateNorm:
    """Norm of scaling * B @ A, from the factors of a PEFT LoRA adapter: no dense dW is formed.

    With the thin QR factorizations B = Q R and A^T = P S, B A = Q (R S^T) P^T has the singular
    values of the small R S^T.

    Raises:
        InputError: the adapter is not plain LoRA (DoRA, trained biases or whole modules), one of
            its factors is missing, or the base lacks a module that it adapts.
    """
    import torch

    config = adapter_settings(adapter)
    factors = SafetensorsFolder(adapter, "adapter_model")
    weights = SafetensorsFolder(base, "model")
    tally = _Tally()
    for stem in lora_modules(factors):
        a = factors.load(f"{stem}.lora_A.weight").double()
        b = factors.load(f"{stem}.lora_B.weight").double()
        module = stem.removeprefix("base_model.model.")
        r, s = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.T, mode="r").R
        core = lora_scaling(config, module) * (r @ s.T)
        values = torch.linalg.svdvals(core) if effective_rank else None
        tally.changed(module, float(torch.sum(core * core)), values)
    for name in weights.names:
        if not (name == "lm_head.weight" and tied(base)):
            tally.has(name, _square(weights.load(name)))
    if foreign := sorted(tally.update.keys() - tally.base.keys()):
        raise InputError(f"{adapter} adapts {foreign[0][1]}, which {base} does not have.")
    return tally.result()


def adapter_settings(adapter: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter.

    Raises:
        InputError: it is missing, garbled, or the adapter has DoRA magnitudes or trained biases.
    """
    path = adapter / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); train or copy it again.") from error
    if config.get("use_dora") or config.get("bias", "none") != "none":
        raise InputError(f"{adapter}: update norms are defined for plain LoRA (no DoRA, no bias).")
    return config


def lora_modules(factors: SafetensorsFolder) -> list[str]:
    """Stems of the adapted modules, `base_model.model.<module>`.

    Raises:
        InputError: a tensor is no factor of a linear layer.
    """
    stems = []
    for name in factors.names:
        if name.endswith(".lora_A.weight"):
            stems.append(name.removesuffix(".lora_A.weight"))
        elif not name.endswith(".lora_B.weight"):
            raise InputError(
                f"{factors.folder}: {name} is not a LoRA factor of a linear layer; update norms of "
                "embeddings and whole modules in an adapter are not supported."
            )
    return stems


def lora_scaling(config: dict[str, Any], module: str) -> float:
    """PEFT's factor before B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
    rank = _pattern_value(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _pattern_value(pattern: dict[str, float], module: str, default: float) -> float:
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), module), default)


def full_update_norm(trained: Path, base: Path, *, effective_rank: bool = False) -> UpdateNorm:
    """Norm of W_trained - W_base, streamed tensor by tensor.

    `base` is rounded to the dtype of `trained` first: that is what training started from, and
    the rounding of a float32 base to bfloat16 is no part of the update.

    Raises:
        InputError: weights are missing or differ in name or shape.
    """
    import torch

    ours, theirs = SafetensorsFolder(trained, "model"), SafetensorsFolder(base, "model")
    tally = _Tally()
    for name in same_weights(ours, theirs):
        new, old = ours.load(name), theirs.load(name)
        if new.shape != old.shape:
            raise InputError(
                f"{name} has shape {tuple(new.shape)} in {trained} and {tuple(old.shape)} in "
                f"{base}; the base model must be the one that was trained."
            )
        old = old.to(new.dtype)
        square = squared_difference(new, old)
        values = None
        if effective_rank and new.ndim == 2 and square > 0:
            values = torch.linalg.svdvals(new.float() - old.float()).double()
        tally.changed(name, square, values)
        tally.has(name, _square(old))
    return tally.result()


def same_weights(ours: SafetensorsFolder, theirs: SafetensorsFolder) -> list[str]:
    """Names of the weights of two checkpoints of one model; a tied lm_head is no weight of its own.

    Raises:
        InputError: a name is in only one of them.
    """
    of_both = set(ours.names) & set(theirs.names)
    beside = {"lm_head.weight"} if tied(ours.folder) else set()
    if odd := sorted((set(ours.names) ^ set(theirs.names)) - beside):
        raise InputError(
            f"{ours.folder} and {theirs.folder} do not hold the same model: {odd[0]} is in only "
            f"one of them ({len(odd)} such weights)."
        )
    return sorted(of_both - beside)


def squared_difference(new: Any, old: Any) -> float:
    """Sum of squares of new - old (tensors of one shape), accumulated in float64."""
    pieces = zip(_pieces(new), _pieces(old), strict=True)
    return math.fsum(_sum_of_squares(ours.double() - theirs.double()) for ours, theirs in pieces)


def _square(weight: Any) -> float:
    return math.fsum(_sum_of_squares(piece.double()) for piece in _pieces(weight))


def _pieces(weight: Any) -> Any:
    on_cpu = weight.device.type == "cpu"
    return weight.reshape(-1).split(_AT_ONCE_ON_CPU if on_cpu else _AT_ONCE)


def _sum_of_squares(values: Any) -> float:
    return float((values * values).sum())


def place(name: str) -> tuple[str, str]:
    """Module kind and layer of a weight or module: `("q_proj", "12")`; outside the layers the kind
    twice. Everything of a vision or audio part counts as one kind, outside the layers."""
    if beside := _NOT_TEXT.search(name):
        return beside[1], beside[1]
    stem = name.removesuffix(".weight").removesuffix(".bias")
    kind = stem.rsplit(".", 1)[-1]
    layer = _LAYER.search(stem)
    return kind, layer[1] if layer else kind


class _Tally:
    """Sums of squares and effective ranks, keyed by what they are of."""

    def __init__(self) -> None:
        self.update: dict[tuple[str, str], float] = defaultdict(float)
        self.base: dict[tuple[str, str], float] = defaultdict(float)
        self.ranks: dict[tuple[str, str], list[float]] = defaultdict(list)

    def changed(self, name: str, square: float, singular_values: Any) -> None:
        for key in _keys(name):
            self.update[key] += square
            if singular_values is not None and square > 0:
                self.ranks[key].append(effective_rank_of(singular_values))

    def has(self, name: str, square: float) -> None:
        for key in _keys(name):
            self.base[key] += square

    def result(self) -> UpdateNorm:
        norms = {key: math.sqrt(square) for key, square in self.update.items()}
        relative = {
            key: norm / math.sqrt(self.base[key])
            for key, norm in norms.items()
            if self.base[key] > 0
        }
        means = {key: math.fsum(ranks) / len(ranks) for key, ranks in self.ranks.items()}
        return UpdateNorm(
            **_parts(norms).model_dump(),
            relative=_parts(relative),
            effective_rank=_parts(means) if means else None,
        )


def _keys(name: str) -> tuple[tuple[str, str], ...]:
    kind, layer = place(name)
    return ("total", ""), ("module", kind), ("layer", layer)


def _parts(values: dict[tuple[str, str], float]) -> Parts:
    def of(what: str) -> dict[str, float]:
        named = [key[1] for key in values if key[0] == what]
        ordered = sorted(named, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n))
        return {name: values[what, name] for name in ordered}

    return Parts(total=values["total", ""], by_module=of("module"), by_layer=of("layer"))


def effective_rank_of(singular_values: Any) -> float:
    """exp(-sum p log p) with p = sigma / sum sigma; `singular_values` is one-dimensional."""
    shares = singular_values / singular_values.sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())
