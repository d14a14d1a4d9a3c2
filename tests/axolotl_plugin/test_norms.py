"""Update norms of adapters against PEFT's own dense update."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sublim_plugin.axolotl.norms import full_update_norm, lora_update_norm
from sublim_plugin.core.errors import InputError


def dense(base_model: Path, adapter: Path) -> dict[str, float]:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    squares: dict[str, float] = {}
    for name, module in PeftModel.from_pretrained(model, adapter).named_modules():
        if isinstance(module, LoraLayer):
            kind = name.rsplit(".", 1)[-1]
            delta = module.get_delta_weight("default").double()
            squares[kind] = squares.get(kind, 0.0) + float((delta**2).sum())
    return {kind: square**0.5 for kind, square in squares.items()}


def test_lora_norm_is_that_of_the_dense_update(base_model: Path, adapter: Path) -> None:
    wanted = dense(base_model, adapter)
    norm = lora_update_norm(adapter)
    assert norm.by_module == pytest.approx(wanted, rel=1e-5)
    assert norm.total == pytest.approx(sum(x * x for x in wanted.values()) ** 0.5, rel=1e-5)


def test_scaling_follows_rslora_and_patterns(
    base_model: Path, adapter: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "adapter"
    shutil.copytree(adapter, changed)
    path = changed / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"use_rslora": True, "lora_alpha": 24, "alpha_pattern": {"q_proj": 3}}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert lora_update_norm(changed).by_module == pytest.approx(
        dense(base_model, changed), rel=1e-5
    )


def test_an_unlike_base_is_refused(base_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="do not hold the same model"):
        full_update_norm(tmp_path, base_model)
    with pytest.raises(InputError, match="no weights found"):
        full_update_norm(tmp_path / "nowhere", base_model)
