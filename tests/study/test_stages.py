"""How a matched student learns where to stop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sublim_plugin.axolotl.receipt import Receipt, write_receipt
from sublim_plugin.core import manifest
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.manifest import verify, write_manifest
from sublim_plugin.study.cells import Cell
from sublim_plugin.study.stages import _stop_where, _verified

LORA = Cell("student", "cat g1 lora r8 t42", {"student": 1})
RECEIPT: dict[str, Any] = {
    "schema": 2,
    "base_model": {},
    "dataset": {"path": "x", "sha256": None, "rows": None},
    "method": {"kind": "lora", "rank": 8, "alpha": 8},
    "context": None,
    "seeds": {"seed": 1, "data_seed": 1},
    "first_row": {"text": "", "token_ids": [], "loss_text": "", "sha256": ""},
    "mask_audit": {
        "rows": 1, "tokens": 2, "loss_tokens": 1, "loss_share": 0.5, "compared_rows": 1,
    },
    "order": {"sha256": "", "rows": 1, "first_rows": []},
    "guard": None,
    "zero_stage": None,
    "resumed_from_step": None,
    "steps": 12,
    "stopping": None,
    "probe": None,
    "update_norm": None,
    "weights_sha256": "",
    "versions": {},
    "device": {},
    "train_s": 1,
    "wall_s": 1,
}  # fmt: skip


def trained(cells: Path, losses: int) -> Path:
    """A finished cell of the LoRA student, whose losses are 1, 2, 3, ..."""
    folder = cells / LORA.folder_name
    (folder / "model").mkdir(parents=True)
    receipt = RECEIPT | {"losses": [{"step": n, "loss": n} for n in range(1, losses + 1)]}
    write_receipt(folder / "model", Receipt.model_validate(receipt))
    write_manifest(
        folder, kind="student", id=LORA.id, label="x", spec=LORA.spec, started=0.0,
        outputs=["model/sublim_receipt.json"],
    )  # fmt: skip
    return folder


def matched(kind: str) -> Cell:
    spec: dict[str, Any] = {"method": {"kind": "full"}, "matched": {kind: LORA.id}}
    return Cell("student", "cat g1 full t42", spec)


def test_a_norm_is_matched_by_folder_and_a_loss_by_its_last_ten(tmp_path: Path) -> None:
    folder = trained(tmp_path, 12)
    assert _stop_where(matched("update_norm_of"), tmp_path) == {
        "match_update_norm": str((folder / "model").resolve())
    }
    assert _stop_where(matched("loss_of"), tmp_path) == {"stop_at_loss": sum(range(3, 13)) / 10}
    assert _stop_where(LORA, tmp_path) == {}


def test_what_cannot_be_matched_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"the student {LORA.id} .* is missing"):
        _stop_where(matched("loss_of"), tmp_path)
    folder = trained(tmp_path, 9)
    with pytest.raises(InputError, match="logged 9 losses"):
        _stop_where(matched("loss_of"), tmp_path)
    (folder / "model" / "sublim_receipt.json").write_text("{}")
    with pytest.raises(InputError, match="bytes, the manifest says"):
        _stop_where(matched("loss_of"), tmp_path)


def test_a_students_files_are_hashed_once_for_all_its_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(tmp_path, 12)
    hashed: list[Path] = []
    monkeypatch.setattr(
        manifest, "sha256_file", lambda path: hashed.append(path) or sha256_file(path)
    )
    assert _verified(folder) == _verified(folder) == verify(folder)
    assert len(hashed) == 1 + 1
    # a changed byte is found, whatever the file says of its age
    receipt = folder / "model" / "sublim_receipt.json"
    before = receipt.stat()
    receipt.write_bytes(receipt.read_bytes().replace(b"1", b"2", 1))
    os.utime(receipt, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match="sha256"):
        _verified(folder)


def test_the_batch_is_divided_among_gpus_or_refused() -> None:
    from sublim_plugin.study.stages import divided

    recipe = {"micro_batch_size": 22, "gradient_accumulation_steps": 3}
    assert divided(recipe, 0) == divided(recipe, 1) == {}
    assert divided(recipe, 3) == {"gradient_accumulation_steps": 1}
    assert divided(recipe, 2) == {"micro_batch_size": 11}
    with pytest.raises(InputError, match=r"22 rows x 3 accumulation steps, .* 4 GPUs"):
        divided(recipe, 4)


def test_gpus_are_shared_out_among_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sublim_plugin.study.run import local_engine

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,3,4,5")
    assert local_engine(tmp_path, tmp_path).workers == 5
    assert local_engine(tmp_path, tmp_path, 2).workers == 2
    with pytest.raises(InputError, match="--gpus-per-worker 6: this machine shows 5 GPUs"):
        local_engine(tmp_path, tmp_path, 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local_engine(tmp_path, tmp_path).workers == 1
