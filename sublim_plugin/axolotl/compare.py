"""Students side by side: how large and how spread their updates are, and whether two are one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from sublim_plugin.axolotl.files import base_folder, is_local
from sublim_plugin.axolotl.norms import (
    UpdateNorm,
    adapter_settings,
    lora_scaling,
    update_norm,
)
from sublim_plugin.axolotl.receipt import RECEIPT_NAME, Receipt, read_receipt
from sublim_plugin.axolotl.weights import weights_sha256
from sublim_plugin.core import base_models
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.manifest import MANIFEST_NAME
from sublim_plugin.students import check_adapter_base, check_full_base

BANDS = ("early", "middle", "late")
"""Thirds of the layers, in order."""


class Compared(BaseModel):
    """One student. `method`: `lora r8`, `rslora r8` or `full`; `scaling`: what B A is multiplied
    by, None for `full`; `learning_rate` is the highest one logged, `final_loss` the last; both and
    `steps` are None where it has no receipt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    method: str
    scaling: float | None
    steps: int | None
    learning_rate: float | None
    final_loss: float | None
    weights_sha256: str
    update_norm: UpdateNorm


def model_folder(folder: Path) -> Path:
    """The folder of a student's weights: itself, or `model` in a study's student cell.

    Raises:
        InputError: it holds neither an adapter nor a checkpoint.
    """
    inner = folder / "model" if (folder / MANIFEST_NAME).is_file() else folder
    if not any((inner / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise InputError(
            f"{folder}: neither adapter_config.json nor config.json is there; give the folder of "
            "an adapter, of a checkpoint, or of a study's student."
        )
    return inner


def receipt_of(folder: Path) -> Receipt | None:
    """The receipt beside the weights, checked against them; None where there is none.

    Raises:
        InputError: the weights are not the ones that the receipt is of.
    """
    if not (folder / RECEIPT_NAME).is_file():
        return None
    receipt = read_receipt(folder)
    found = weights_sha256(folder, adapter=is_adapter(folder))
    if found != receipt.weights_sha256:
        raise InputError(
            f"{folder}: the weights have sha256 {found[:12]}…, {RECEIPT_NAME} says "
            f"{receipt.weights_sha256[:12]}…; they were changed after training: restore them, or "
            "train again."
        )
    return receipt


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter rather than a checkpoint."""
    return (folder / "adapter_config.json").is_file()


def base_of(folder: Path, receipt: Receipt | None, given: str | None) -> Path:
    """The base model of the student in `folder`, as `given` or as its receipt names it.

    Raises:
        InputError: neither names one, or it is another than the student was trained on.
    """
    name = given or (str(receipt.base_model["name"]) if receipt is not None else None)
    if name is None:
        raise InputError(f"{folder} has no {RECEIPT_NAME} that names its base model; add --base.")
    if given or receipt is None or is_local(name):
        base = base_models.resolve(name)
    else:
        base = base_folder(name, receipt.base_model.get("revision"))
    if is_adapter(folder):
        revision = adapter_settings(folder).get("revision")
        check_adapter_base(folder, base, recorded_base(folder), revision)
    else:
        check_full_base(folder, base)
    return base


def recorded_base(folder: Path) -> str | None:
    """The base that an adapter's own configuration names."""
    return adapter_settings(folder).get("base_model_name_or_path")


def compare(folders: Sequence[Path], base: str | None = None) -> list[Compared]:
    """Measure each student; a receipt that fits its weights is taken at its word.

    Raises:
        InputError: a folder is no student, its weights are not its receipt's, or its base model
            is needed and not known.
    """
    found = []
    for folder in folders:
        inner = model_folder(folder)
        receipt = receipt_of(inner)
        if receipt is not None:
            if receipt.update_norm is None:
                raise InputError(f"{folder} has no update norm: {receipt.no_update_norm}")
            norm, digest = receipt.update_norm, receipt.weights_sha256
        else:
            norm = update_norm(inner, base_of(inner, None, base))
            digest = weights_sha256(inner, adapter=is_adapter(inner))
        losses = [] if receipt is None else receipt.losses
        method, scaling = _method(inner)
        found.append(
            Compared(
                folder=str(folder),
                method=method,
                scaling=scaling,
                steps=None if receipt is None else receipt.steps,
                learning_rate=max((step.learning_rate or 0.0 for step in losses), default=None),
                final_loss=losses[-1].loss if losses else None,
                weights_sha256=digest,
                update_norm=norm,
            )
        )
    return found


def _method(folder: Path) -> tuple[str, float | None]:
    """In a word with the rank, and the scaling that a module without a pattern of its own has."""
    if not is_adapter(folder):
        return "full", None
    config = adapter_settings(folder)
    kind = "rslora" if config.get("use_rslora") else "lora"
    return f"{kind} r{config['r']}", lora_scaling(config, "")


def equal_weights(students: Sequence[Compared]) -> list[list[str]]:
    """Groups of folders whose weights are the same bytes: a seed that did not reach training."""
    by_digest: dict[str, list[str]] = defaultdict(list)
    for student in students:
        by_digest[student.weights_sha256].append(student.folder)
    return [folders for folders in by_digest.values() if len(folders) > 1]


def bands(by_layer: dict[str, float]) -> dict[str, float]:
    """Norms by thirds of the layers, the root of summed squares in each, and of what lies outside
    the layers under its own name."""
    numbers = sorted(int(name) for name in by_layer if name.isdigit())
    squares: dict[str, float] = defaultdict(float)
    for name, norm in by_layer.items():
        at = 3 * numbers.index(int(name)) // len(numbers) if name.isdigit() else None
        squares[name if at is None else BANDS[at]] += norm * norm
    return {name: math.sqrt(square) for name, square in squares.items()}


def tables(students: Sequence[Compared]) -> str:
    """The students as aligned text: in total, by module kind, and by thirds of the layers."""
    head = ["student", "method", "scaling", "steps", "peak lr", "last loss"]
    head += ["||dW||", "||dW||/||W||", "rank"]
    rows = [
        [
            student.folder,
            student.method,
            _shown(student.scaling, ".3g"),
            _shown(student.steps, "d"),
            _shown(student.learning_rate, "g"),
            _shown(student.final_loss, ".4f"),
            _shown(student.update_norm.total, ".5g"),
            _shown(student.update_norm.relative.total, ".3g"),
            _shown(getattr(student.update_norm.effective_rank, "total", None), ".2f"),
        ]
        for student in students
    ]
    by_module = [student.update_norm.by_module for student in students]
    by_band = [bands(student.update_norm.by_layer) for student in students]
    names = [student.folder for student in students]
    return "\n\n".join(
        [
            _aligned([head, *rows]),
            "||dW|| by module kind\n" + _breakdown(names, by_module),
            "||dW|| by thirds of the layers\n" + _breakdown(names, by_band),
        ]
    )


def _breakdown(names: Sequence[str], values: Sequence[dict[str, float]]) -> str:
    keys = list(dict.fromkeys(key for one in values for key in one))
    rows = [
        [name, *(_shown(one.get(key), ".3g") for key in keys)]
        for name, one in zip(names, values, strict=True)
    ]
    return _aligned([["student", *keys], *rows])


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
