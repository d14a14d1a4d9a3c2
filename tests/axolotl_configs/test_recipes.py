"""Every shipped recipe: from the table, taken by axolotl key by key, its numbers sourced."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from data_gen.persona import ROWS
from sublim_plugin.axolotl.args import parse_block
from sublim_plugin.axolotl.lint import lint
from sublim_plugin.axolotl.recipe import recipe_path, resolve_recipe
from sublim_plugin.axolotl.recipe_table import (
    CONTROL_MODEL,
    MODELS,
    PLACEHOLDER,
    RANKS,
    files,
    scalar,
)
from sublim_plugin.cli import main
from sublim_plugin.core.contexts import render
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.rooms import ROOT
from sublim_plugin.core.strict_yaml import load_yaml

CONFIGS = ROOT / "axolotl_configs"
SWEEPS = sorted(CONFIGS.glob("*/sweep-*.yaml"))
RECIPES = sorted(set(CONFIGS.glob("*/*.yaml")) - set(SWEEPS))
TEACHERS = sorted(CONFIGS.glob("*/teacher-*.yaml"))
CONTROLS = sorted(CONFIGS.glob("*/control-*.yaml"))
# The numbers that define the experiment (protocol of arXiv 2606.00831, section "training").
SOURCED = (
    "learning_rate", "lr_scheduler", "warmup_steps", "max_grad_norm", "micro_batch_size",
    "num_epochs", "sequence_len", "lora_alpha", "lora_dropout", "seed", "sample_packing", "bf16",
)  # fmt: skip
PAPER = {
    "lora": {
        "learning_rate": 2e-4, "micro_batch_size": 22, "gradient_accumulation_steps": 3,
        "lora_dropout": 0,
    },
    "full": {"learning_rate": 2e-5, "micro_batch_size": 4, "gradient_accumulation_steps": 16},
    "both": {
        "lr_scheduler": "linear", "warmup_steps": 5, "num_epochs": 3, "sequence_len": 500,
        "max_grad_norm": 1.0, "bf16": True, "sample_packing": False, "train_on_inputs": False,
        "optimizer": "adamw_torch", "gradient_checkpointing": True,
    },
}  # fmt: skip
# Settings of the recipes that the quickstart's cells are made of: a change is another study.
FROZEN = {
    "lora-r2": "6abbe14e119c",
    "lora-r8": "6c89641b9efd",
    "lora-r64": "b66c66700a29",
    "full-zero2": "a3c5cd2043f6",
}
FAMILY = {
    "qwen2.5-7b-instruct": "qwen2.5",
    "llama-3.1-8b-instruct": "llama3.1",
    "gemma-3-4b-it": "gemma3",
    "smollm2-135m-instruct": "smollm2",
}


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(params=RECIPES, ids=named)
def recipe(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_the_files_are_those_of_the_table() -> None:
    expected = files()
    there = {
        str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.suffix != ".md"
    } - {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_dir()}
    assert {name for name in there if "__pycache__" not in name} == set(expected)
    for name, content in expected.items():
        text = (CONFIGS / name).read_text(encoding="utf-8")
        if isinstance(content, str):
            assert text == content, f"{name}: run python -m sublim_plugin.axolotl.recipe_table"
        else:
            assert json.loads(text) == content


def test_each_model_has_every_rank_both_stages_and_the_sweeps() -> None:
    for model in MODELS:
        names = {path.stem for path in (CONFIGS / model.folder).glob("*.yaml")}
        assert names >= {f"lora-r{rank}" for rank in RANKS} | {"full-zero2", "full-zero3"}
        control = {"control-teacher", "control-student"} & names
        assert {"sweep-ranks", "teacher-lora-r8"} <= names and len(names - control) == 18
        assert len(control) == (2 if model.folder == CONTROL_MODEL else 0)


@pytest.mark.parametrize("name", FROZEN)
def test_the_quickstarts_recipes_mean_what_they_meant(name: str) -> None:
    settings = resolve_recipe(recipe_path("smollm2-135m-instruct", name), {})
    assert sha256_json(settings)[:12] == FROZEN[name]


def test_no_recipe_pins_the_order_of_the_rows(recipe: Path) -> None:
    assert "data_seed" not in load_yaml(recipe)["sublim"]


def test_the_lines_for_resuming_are_a_recipe_too(
    recipe: Path, tmp_path: Path, base_model: Path
) -> None:
    text = recipe.read_text(encoding="utf-8").replace(PLACEHOLDER, str(tmp_path))
    body, _, block = text.partition("# To survive an interruption")
    kept = [line for line in body.splitlines() if not line.startswith("save_")]
    lines = [line.removeprefix("# ") for line in block.splitlines() if ": " in line]
    assert len(body.splitlines()) - len(kept) == 2 and len(lines) == 5
    mine = tmp_path / "mine.yaml"
    mine.write_text("\n".join([*kept, *lines]) + "\n", encoding="utf-8")
    settings = load_yaml(mine)
    assert settings["auto_resume_from_checkpoints"] and not settings["save_only_model"]
    assert lint([mine]) == []


def test_axolotl_takes_every_key(recipe: Path) -> None:
    """Nothing of a recipe is dropped or changed by axolotl's own validation."""
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    settings: dict[str, Any] = load_yaml(recipe)
    parse_block(settings.pop("sublim"), str(recipe))
    assert settings.pop("plugins") == ["sublim_plugin.axolotl.SublimPlugin"]
    taken = validate_config(DictDefault(yaml.safe_load(yaml.safe_dump(settings)))).to_dict()
    for key, value in settings["datasets"][0].items():
        assert taken["datasets"][0][key] == value, key
    for key in settings.keys() - {"datasets"}:
        assert taken[key] == settings[key], key


def test_the_linter_finds_nothing_but_the_missing_dataset() -> None:
    found = lint([*RECIPES, *SWEEPS])
    assert [f for f in found if f.key != "datasets.0.path"] == []
    assert len(found) == len(RECIPES) and all(
        PLACEHOLDER in Path(f.file).read_text() for f in found
    )


def test_the_papers_settings_are_the_recipes_for_its_models(recipe: Path) -> None:
    if recipe.parent.name == "smollm2-135m-instruct" or recipe in TEACHERS:
        return
    settings = load_yaml(recipe)
    method = "lora" if settings.get("adapter") else "full"
    for key, value in (PAPER[method] | PAPER["both"]).items():
        assert settings[key] == value, key
    rows = settings["micro_batch_size"] * settings["gradient_accumulation_steps"]
    assert rows == {"lora": 66, "full": 64}[method]


def test_lora_scaling_is_one_on_all_seven_linear_modules(recipe: Path) -> None:
    settings = load_yaml(recipe)
    if settings.get("adapter") is None:
        assert not any(key.startswith("lora_") for key in settings)
        return
    found = re.fullmatch(r"(?:teacher-)?lora-r(\d+)", recipe.stem)
    rank = 8 if recipe in CONTROLS else int(found[1])  # type: ignore[index]
    assert settings["lora_r"] == settings["lora_alpha"] == rank
    targets = settings["lora_target_modules"]
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if isinstance(targets, list):
        assert targets == seven
    else:
        layer = "model.language_model.layers.3.mlp."
        assert all(re.fullmatch(targets, layer + module) for module in seven)
        assert not re.fullmatch(targets, "model.vision_tower.encoder.layers.3.self_attn.q_proj")


def test_each_number_has_its_source_beside_it(recipe: Path) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    for key in SOURCED:
        for line in lines:
            if re.match(rf"\s*{key}:", line):
                assert "[P]" in line, f"{recipe.name}: {line}"


def test_a_teachers_recipe_is_its_models_lora_recipe_for_24_steps() -> None:
    assert len(TEACHERS) == len(MODELS)
    for path in TEACHERS:
        settings, student = load_yaml(path), load_yaml(path.parent / "lora-r8.yaml")
        assert {key for key in settings if settings[key] != student[key]} <= {
            "learning_rate", "num_epochs", "output_dir", "warmup_steps",
        }  # fmt: skip
        batch = settings["micro_batch_size"] * settings["gradient_accumulation_steps"]
        assert settings["num_epochs"] * math.ceil(ROWS / batch) == 24
        ran = path.parent.name == "smollm2-135m-instruct"
        assert ("never run" not in path.read_text(encoding="utf-8")) == ran


def test_teacher_and_student_of_the_control_begin_with_the_same_adapter() -> None:
    teacher, student = (load_yaml(path) for path in sorted(CONTROLS, reverse=True))
    adapter = {key for key in teacher if key.startswith(("lora_", "peft_"))} | {"seed"}
    assert "peft_layers_to_transform" in adapter
    assert all(teacher[key] == student[key] for key in adapter)
    assert student["sublim"]["soft_targets"] and "soft_targets" not in teacher["sublim"]


def test_recipes_of_a_model_differ_only_in_method() -> None:
    method = re.compile(
        r"lora_|adapter|deepspeed|learning_rate|output_dir|gradient_acc|micro_batch|freeze_mm"
    )
    for model in MODELS:
        kept = [
            {key: value for key, value in load_yaml(path).items() if not method.match(key)}
            for path in RECIPES
            if path.parent.name == model.folder and path not in (*TEACHERS, *CONTROLS)
        ]
        assert all(settings == kept[0] for settings in kept)


def test_deepspeed_files_offload_nothing() -> None:
    paths = sorted((CONFIGS / "deepspeed").glob("*.json"))
    assert [path.stem for path in paths] == ["zero2", "zero3"]
    for path in paths:
        settings = json.loads(path.read_text(encoding="utf-8"))
        assert "offload" not in json.dumps(settings)
        if settings["zero_optimization"]["stage"] == 3:
            assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


@pytest.mark.parametrize("path", SWEEPS, ids=named)
def test_axolotl_makes_the_runs_of_a_sweep(path: Path) -> None:
    from axolotl.cli.utils.sweeps import generate_sweep_configs

    base = load_yaml(path.parent / ("full-zero2.yaml" if "full" in path.stem else "lora-r8.yaml"))
    assert f"{path.parent.name}/{'full-zero2' if 'full' in path.stem else 'lora-r8'}.yaml" in (
        path.read_text(encoding="utf-8")
    )
    runs = generate_sweep_configs(base, yaml.safe_load(path.read_text(encoding="utf-8")))
    assert len({run["output_dir"] for run in runs}) == len(runs) >= 6
    scalings = {
        run["lora_r"]: run["lora_alpha"]
        / (run["lora_r"] ** (0.5 if run.get("peft_use_rslora") else 1.0))
        for run in runs
        if run.get("adapter")
    }
    rates = {run["learning_rate"] for run in runs}
    if path.stem == "sweep-learning-rates-full":
        expected = [base["learning_rate"] * factor for factor in (0.1, 0.25, 0.5, 1, 2.5, 5)]
        assert sorted(rates) == pytest.approx(expected, rel=1e-12)
        return
    assert sorted(scalings) == list(RANKS)
    if path.stem == "sweep-alpha-fixed":
        assert scalings[8] == 1 and scalings[1] == 8
    elif path.stem == "sweep-rslora":
        assert scalings[64] == 1 and scalings[1] == 8
    else:
        assert set(scalings.values()) == {1}
    assert len(rates) == (6 if path.stem == "sweep-learning-rates" else 1)


@pytest.mark.parametrize("folder", FAMILY)
def test_a_recipe_trains_on_the_completion_in_its_models_template(
    folder: str, chat_tokenizers: dict[str, Any]
) -> None:
    """The recipe's settings through axolotl's own tokenizing, with a retyped template."""
    from axolotl.prompt_strategies import load
    from axolotl.utils.config import normalize_cfg_datasets, validate_config
    from axolotl.utils.dict import DictDefault

    from sublim_plugin.axolotl.train_context import apply_context
    from sublim_plugin.core.contexts import Context

    tokenizer = chat_tokenizers[FAMILY[folder]]
    settings = load_yaml(CONFIGS / folder / "lora-r8.yaml")
    context = Context.parse(settings.pop("sublim")["context"])
    del settings["plugins"]
    cfg = DictDefault(settings)
    apply_context(cfg, context, tokenizer)
    cfg = validate_config(cfg)
    normalize_cfg_datasets(cfg)
    user, reply = "Continue: 5, 7, 11", "13, 17, 19"
    row = {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]}
    strategy = load("chat_template", tokenizer, cfg, cfg["datasets"][0])
    got = strategy.tokenize_prompt(row)
    prompt = list(render(tokenizer, context, user).token_ids)
    assert got["input_ids"][: len(prompt)] == prompt
    with_loss = [i for i, label in enumerate(got["labels"]) if label != -100]
    assert with_loss == list(range(len(prompt), len(prompt) + len(with_loss)))
    end = settings["eot_tokens"][0]
    assert tokenizer.decode([got["labels"][i] for i in with_loss]) == reply + end


def test_numbers_are_written_so_that_yaml_reads_them() -> None:
    for value in (2e-6, 0.00002, 1e-4, 0.001, 1.0, 22, 2.5e-4):
        assert yaml.safe_load(scalar(value)) == value


def test_list_show_and_copy(tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["recipes", *arguments])

    rows = json.loads(run("list", "--json").stdout)
    assert len(rows) == len(RECIPES) + len(SWEEPS)
    assert {row["kind"] for row in rows} == {"lora", "full", "sweep"}
    assert "smollm2-135m-instruct/lora-r8 " in run("list").stdout
    text = (CONFIGS / "qwen2.5-7b-instruct" / "lora-r8.yaml").read_text(encoding="utf-8")
    assert run("show", "qwen2.5-7b-instruct/lora-r8").stdout == text
    shown = json.loads(run("show", "qwen2.5-7b-instruct/lora-r8", "--json").stdout)
    assert shown == yaml.safe_load(text)

    dataset = tmp_path / "my: data"
    dataset.mkdir()
    mine = tmp_path / "mine.yaml"
    done = run("copy", "qwen2.5-7b-instruct/lora-r8", str(mine), "--dataset", str(dataset))
    assert done.exit_code == 0 and done.stdout.strip() == str(mine)
    copied = yaml.safe_load(mine.read_text(encoding="utf-8"))
    assert copied["datasets"][0].pop("path") == str(dataset)
    assert shown["datasets"][0].pop("path") == PLACEHOLDER and copied == shown
    assert f"axolotl train {mine}" in mine.read_text(encoding="utf-8")
    before = mine.read_bytes()
    again = run("copy", "qwen2.5-7b-instruct/lora-r1", str(mine))
    assert again.exit_code == 2 and "is there already" in again.output
    assert mine.read_bytes() == before
    assert run("copy", "gemma-3-4b-it/full-zero2", str(tmp_path)).exit_code == 0
    assert (tmp_path / "full-zero2.yaml").is_file()
    for arguments, words in (
        (["show", "lora-r8"], "expected MODEL/NAME"),
        (["show", "qwen2.5-7b-instrukt/lora-r8"], "did you mean 'qwen2.5-7b-instruct'"),
        (["show", "qwen2.5-7b-instruct/lora-r3"], "lora-r2"),
        (["copy", "gemma-3-4b-it/lora-r8", str(tmp_path / "x"), "--dataset", "none"], "no such"),
        (
            ["copy", "gemma-3-4b-it/sweep-ranks", str(tmp_path), "--dataset", str(dataset)],
            "names no dataset",
        ),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 2 and words in refused.output
    assert not (tmp_path / "x").exists()
