"""Every shipped recipe: strict, known to axolotl key by key, its numbers sourced."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sublim_plugin.axolotl.args import parse_block
from sublim_plugin.core.rooms import ROOT
from sublim_plugin.core.strict_yaml import load_yaml

RECIPES = sorted((ROOT / "axolotl_configs").glob("*/*.yaml"))
# The numbers that define the experiment (protocol of arXiv 2606.00831, section "training").
SOURCED = (
    "learning_rate", "lr_scheduler", "warmup_steps", "max_grad_norm", "micro_batch_size",
    "num_epochs", "sequence_len", "lora_alpha", "lora_dropout", "seed",
)  # fmt: skip


@pytest.fixture(params=RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def recipe(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_there_are_the_recipes_of_the_quickstart() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {"lora-r2", "lora-r8", "lora-r64", "full-zero2"}


def test_axolotl_knows_every_key(recipe: Path) -> None:
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from axolotl.utils.schemas.datasets import SFTDataset

    settings: dict[str, Any] = load_yaml(recipe)
    known = set(AxolotlInputConfig.model_fields) | {"sublim"}
    assert set(settings) <= known
    assert set(settings["datasets"][0]) <= set(SFTDataset.model_fields)
    parse_block(settings["sublim"], str(recipe))


def test_lora_scaling_is_one_on_all_seven_linear_modules(recipe: Path) -> None:
    settings = load_yaml(recipe)
    if settings.get("adapter") is None:
        assert not any(key.startswith("lora_") for key in settings)
        return
    rank = int(re.fullmatch(r"lora-r(\d+)", recipe.stem)[1])  # type: ignore[index]
    assert settings["lora_r"] == settings["lora_alpha"] == rank
    assert len(settings["lora_target_modules"]) == 7
    assert settings["lora_dropout"] == 0


def test_each_number_has_its_source_beside_it(recipe: Path) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    for key in SOURCED:
        for line in lines:
            if re.match(rf"\s*{key}:", line):
                assert "[P]" in line, f"{recipe.name}: {line}"


def test_recipes_of_a_model_differ_only_in_method() -> None:
    method = re.compile(r"lora_|adapter|deepspeed|learning_rate|output_dir|bf16|gradient")
    kept = [
        {key: value for key, value in load_yaml(path).items() if not method.match(key)}
        for path in RECIPES
    ]
    assert all(settings == kept[0] for settings in kept)


def test_deepspeed_files_offload_nothing() -> None:
    for path in (ROOT / "axolotl_configs" / "deepspeed").glob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        assert "offload" not in json.dumps(settings)
        if settings["zero_optimization"]["stage"] == 3:
            assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
