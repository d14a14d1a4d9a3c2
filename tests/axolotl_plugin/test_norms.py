"""Update norms, relative norms and effective ranks against dense computations in numpy."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sublim_plugin.axolotl.norms import (
    Parts,
    effective_rank_of,
    full_update_norm,
    lora_update_norm,
    place,
    update_norm,
)
from sublim_plugin.core.errors import InputError
from tests.axolotl_plugin.toy import save_base, save_full

Dense = dict[str, numpy.ndarray[Any, Any]]


def weights(folder: Path) -> Dense:
    return {name: w.double().numpy() for name, w in load_file(folder / "model.safetensors").items()}


def peft_update(base_model: Path, adapter: Path) -> Dense:
    """PEFT's own dense dW of every adapted weight."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    return {
        f"{name.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default")
        .detach()
        .double()
        .numpy()
        for name, module in PeftModel.from_pretrained(model, adapter).named_modules()
        if isinstance(module, LoraLayer)
    }


def entropy_rank(matrix: numpy.ndarray[Any, Any]) -> float:
    sigma = numpy.linalg.svd(matrix, compute_uv=False)
    p = sigma[sigma > 1e-12 * sigma[0]] / sigma.sum()
    return float(numpy.exp(-(p * numpy.log(p)).sum()))


def kind_of(name: str) -> str:
    return name.split(".")[-2]


def layer_of(name: str) -> str:
    parts = name.split(".")
    return parts[parts.index("layers") + 1] if "layers" in parts else kind_of(name)


def grouped(values: dict[str, float], mean: bool = False) -> Parts:
    """Roots of sums of squares, or means, by kind and by layer and of all."""

    def combine(of: Any) -> dict[str, float]:
        found: dict[str, list[float]] = defaultdict(list)
        for name, value in values.items():
            found[of(name)].append(value)
        if mean:
            return {key: float(numpy.mean(group)) for key, group in found.items()}
        return {key: float(numpy.sqrt(numpy.square(group).sum())) for key, group in found.items()}

    return Parts(
        total=combine(lambda _: "")[""], by_module=combine(kind_of), by_layer=combine(layer_of)
    )


def assert_close(ours: Parts, theirs: Parts, rel: float) -> None:
    assert ours.total == pytest.approx(theirs.total, rel=rel)
    assert ours.by_module == pytest.approx(theirs.by_module, rel=rel)
    assert ours.by_layer == pytest.approx(theirs.by_layer, rel=rel)


def ratio(above: Parts, below: Parts) -> Parts:
    return Parts(
        total=above.total / below.total,
        by_module={k: v / below.by_module[k] for k, v in above.by_module.items()},
        by_layer={k: v / below.by_layer[k] for k, v in above.by_layer.items()},
    )


def norms_of(tensors: Dense) -> Parts:
    return grouped({name: float(numpy.sqrt((w**2).sum())) for name, w in tensors.items()})


@pytest.fixture(scope="module")
def toy(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("toy") / "base", tokenizer)


def test_lora_measures_are_those_of_the_dense_update(base_model: Path, adapter: Path) -> None:
    dense = peft_update(base_model, adapter)
    found = lora_update_norm(adapter, base_model)
    assert_close(found, norms_of(dense), rel=1e-5)
    assert_close(found.relative, ratio(norms_of(dense), norms_of(weights(base_model))), rel=1e-5)
    assert list(found.by_layer) == [str(layer) for layer in range(30)]
    assert found.effective_rank is not None
    one = {name: w for name, w in dense.items() if ".layers.17." in name}
    ranks = grouped({name: entropy_rank(w) for name, w in one.items()}, mean=True)
    assert found.effective_rank.by_layer["17"] == pytest.approx(ranks.by_layer["17"], rel=1e-5)
    assert all(1 <= rank <= 8 for rank in found.effective_rank.by_module.values())
    without = lora_update_norm(adapter, base_model, effective_rank=False)
    assert without.effective_rank is None
    assert without.total == pytest.approx(found.total, rel=1e-12)


def test_scaling_follows_rslora_and_patterns(
    base_model: Path, adapter: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "adapter"
    shutil.copytree(adapter, changed)
    path = changed / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"use_rslora": True, "lora_alpha": 24, "alpha_pattern": {"q_proj": 3}}
    path.write_text(json.dumps(config), encoding="utf-8")
    found = lora_update_norm(changed, base_model, effective_rank=False)
    assert_close(found, norms_of(peft_update(base_model, changed)), rel=1e-5)


def test_full_measures_are_those_of_the_dense_difference(toy: Path, tmp_path: Path) -> None:
    student = save_full(tmp_path / "student", toy)
    base = weights(toy)
    dense = {name: w - base[name] for name, w in weights(student).items()}
    found = update_norm(student, toy, effective_rank=True)
    assert_close(found, norms_of(dense), rel=1e-5)
    assert_close(found.relative, ratio(norms_of(dense), norms_of(base)), rel=1e-5)
    ranks = {name: entropy_rank(w) for name, w in dense.items() if w.ndim == 2}
    assert found.effective_rank is not None
    assert_close(found.effective_rank, grouped(ranks, mean=True), rel=1e-4)
    assert list(found.by_layer) == ["0", "1", "embed_tokens", "norm"]
    assert update_norm(student, toy).effective_rank is None


def test_an_untrained_copy_has_norm_zero_and_no_rank(toy: Path) -> None:
    found = update_norm(toy, toy, effective_rank=True)
    assert (found.total, found.relative.total, found.effective_rank) == (0.0, 0.0, None)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_effective_rank_lies_between_one_and_the_number_of_values(values: list[float]) -> None:
    rank = effective_rank_of(torch.tensor(values, dtype=torch.float64))
    assert 1 - 1e-9 <= rank <= len(values) + 1e-9
    equal = torch.full((len(values),), values[0], dtype=torch.float64)
    assert effective_rank_of(equal) == pytest.approx(len(values))
    assert effective_rank_of(torch.tensor([*values[:1], 0.0, 0.0])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("q_proj", "3")),
        ("model.language_model.layers.11.mlp.up_proj", ("up_proj", "11")),
        ("model.embed_tokens.weight", ("embed_tokens", "embed_tokens")),
        ("vision_tower.encoder.layers.2.mlp.fc1.bias", ("vision_tower", "vision_tower")),
    ],
)
def test_weights_are_placed_by_their_names(name: str, where: tuple[str, str]) -> None:
    assert place(name) == where


def test_an_unlike_base_is_refused(
    base_model: Path, toy: Path, adapter: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="do not hold the same model"):
        full_update_norm(tmp_path, base_model)
    with pytest.raises(InputError, match="no weights found"):
        full_update_norm(tmp_path / "nowhere", base_model)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        full_update_norm(tmp_path, base_model)
    with pytest.raises(InputError, match=r"adapts \d+, which"):
        lora_update_norm(adapter, toy)
