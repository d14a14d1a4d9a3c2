"""Scale a finished update to a norm: W_base + s (W - W_base), as task arithmetic does
(arXiv 2212.04089).

LoRA: every B is multiplied by s, in float32. A full checkpoint in float32 stays so; one in a
smaller dtype is written in float32, because its update is made of few rounding steps of the
weights: scaled and rounded again, most of it would come back unscaled or vanish. The note says what
rounding would have made of the norm.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from sublim_plugin.axolotl.compare import base_of, compare, is_adapter, model_folder, receipt_of
from sublim_plugin.axolotl.norms import (
    adapter_settings,
    lora_modules,
    same_weights,
    squared_difference,
    update_norm,
)
from sublim_plugin.axolotl.receipt import RESCALE_NAME, Rescaled, write_receipt
from sublim_plugin.axolotl.weights import SafetensorsFolder, weights_sha256
from sublim_plugin.core import base_models
from sublim_plugin.core.atomic import write_json
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.students import read_tensors

EXACT = 1e-5
"""Largest relative distance of the written norm from the one asked for."""
_COPIED = (".json", ".jinja", ".txt", ".model")


def rescale(
    student: Path, out: Path, *, to_norm: float | Path, base: str | None = None
) -> Rescaled:
    """Write to `out` the student with its update scaled to a Frobenius norm: a normal adapter or
    checkpoint, with tokenizer and receipt.

    Args:
        to_norm: that norm, or another student of the same base model that has it.
        base: the student's base model, where its receipt does not name it.

    Raises:
        InputError: the student is not loaded strictly (as `students.py` does), has no update, the
            other one is of another base, or `out` exists.
        RunError: the written weights do not have that norm.
    """
    folder = model_folder(student)
    norm_of = None
    if isinstance(to_norm, Path):
        norm_of = str(to_norm)
        _same_base(folder, to_norm, base)
        to_norm = compare([to_norm], base)[0].update_norm.total
    if not (math.isfinite(to_norm) and to_norm > 0):
        raise InputError(f"the norm to scale to is {to_norm}; it must be a positive number.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists; choose a folder that does not, so that nothing is lost.")
    receipt = receipt_of(folder)
    base_path = base_of(folder, receipt, base)
    had = None if receipt is None else receipt.update_norm
    with_rank = had is None or had.effective_rank is not None
    before = update_norm(folder, base_path, effective_rank=False).total
    if before == 0:
        raise InputError(f"{folder} equals its base model; there is no update to scale.")
    factor = to_norm / before
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rounded = None
        if is_adapter(folder):
            _scale_adapter(folder, partial, factor)
        else:
            rounded = _scale_checkpoint(folder, base_path, partial, factor)
        _copy_beside(folder, partial)
        after = update_norm(partial, base_path, effective_rank=with_rank and is_adapter(folder))
        if abs(after.total / to_norm - 1) > EXACT:
            raise RunError(
                f"{folder}: scaled by {factor:.6g}, the update has the norm {after.total:.8g} "
                f"instead of {to_norm:.8g}: the base model in {base_path} is stored in more "
                "digits than the training started from. Nothing was written."
            )
        note = Rescaled(
            source=str(student),
            source_sha256=weights_sha256(folder, adapter=is_adapter(folder)),
            factor=factor,
            from_norm=before,
            to_norm=after.total,
            norm_of=norm_of,
            rounded_norm=rounded,
        )
        if receipt is None:
            write_json(partial / RESCALE_NAME, note.model_dump(mode="json"))
        else:
            digest = weights_sha256(partial, adapter=is_adapter(folder))
            changed = {
                "update_norm": after,
                "no_update_norm": None,
                "weights_sha256": digest,
                "rescaled": note,
            }
            write_receipt(partial, receipt.model_copy(update=changed))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return note


def _same_base(folder: Path, other: Path, base: str | None) -> None:
    ours, theirs = (
        base_models.fingerprint(base_of(one, receipt_of(one), base))
        for one in (folder, model_folder(other))
    )
    if ours["sha256"] != theirs["sha256"]:
        raise InputError(
            f"{other} was trained on {theirs['name']} (sha256 {theirs['sha256'][:12]}), {folder} "
            f"on {ours['name']} ({ours['sha256'][:12]}); norms of updates to different weights do "
            "not match anything. Give --to-norm a number if that is what you want."
        )


def _scale_adapter(folder: Path, out: Path, factor: float) -> None:
    from safetensors.torch import save_file

    adapter_settings(folder)
    name = "adapter_model.safetensors"
    stems = lora_modules(SafetensorsFolder(folder, "adapter_model"))
    tensors = read_tensors(folder / name)
    for stem in stems:
        key = f"{stem}.lora_B.weight"
        if key not in tensors:
            raise InputError(f"{folder / name} lacks {key}; train or copy it again.")
        tensors[key] = tensors[key].float().mul(factor)
    save_file(tensors, out / name, metadata={"format": "pt"})


def _scale_checkpoint(folder: Path, base: Path, out: Path, factor: float) -> float | None:
    """Write the scaled weights, file by file; return the norm that they would have in the source's
    dtype, None where that is float32."""
    import torch
    from safetensors.torch import save_file

    ours, theirs = SafetensorsFolder(folder, "model"), SafetensorsFolder(base, "model")
    names = set(same_weights(ours, theirs))
    rounded, small = 0.0, False
    for file in ours.files:
        scaled: dict[str, Any] = {}
        for name, new in read_tensors(file).items():
            if name not in names:
                raise InputError(
                    f"{file}: {name} is tied to the embedding and yet stored; save the model with "
                    "save_pretrained, which leaves it out."
                )
            old = theirs.load(name).to(new.dtype)
            if old.shape != new.shape:
                raise InputError(f"{name} has another shape in {folder} than in {base}.")
            there = (old.double() + factor * (new.double() - old.double())).float()
            scaled[name] = there
            small = small or new.dtype != torch.float32
            rounded += squared_difference(there.to(new.dtype), old)
        save_file(scaled, out / file.name, metadata={"format": "pt"})
    return math.sqrt(rounded) if small else None


def _copy_beside(folder: Path, out: Path) -> None:
    """Configuration and tokenizer; the configuration names the dtype that was written."""
    for file in sorted(folder.iterdir()):
        ours = file.name.startswith("sublim_") or file.name == "trainer_state.json"
        if file.is_file() and file.suffix in _COPIED and not ours:
            shutil.copyfile(file, out / file.name)
    path = out / "config.json"
    if is_adapter(folder) or not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "float32"
    write_json(path, config)
