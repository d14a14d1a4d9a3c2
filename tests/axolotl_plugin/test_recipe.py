"""Writing a run's YAML, and the `sublim:` block."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sublim_plugin.axolotl.args import parse_block
from sublim_plugin.axolotl.files import base_folder, name_datasets
from sublim_plugin.axolotl.receipt import read_receipt
from sublim_plugin.axolotl.recipe import recipe_path, resolve_recipe, write_axolotl_yaml
from sublim_plugin.core.errors import InputError

MODEL = "smollm2-135m-instruct"


def write(folder: Path, recipe: str, **overrides: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    out = folder / "axolotl.yaml"
    resolved = write_axolotl_yaml(
        recipe_path(MODEL, recipe),
        out,
        base_model="/models/base",
        dataset_path=folder / "data",
        output_dir=folder / "model",
        seed=3,
        overrides=overrides,
    )
    return resolved, yaml.safe_load(out.read_text(encoding="utf-8"))


def test_a_run_gets_its_paths_seeds_and_overrides(tmp_path: Path) -> None:
    resolved, written = write(tmp_path, "lora-r8", num_epochs=2, lora_r=4)
    assert written["base_model"] == "/models/base"
    assert written["datasets"][0]["path"] == str(tmp_path / "data")
    assert written["output_dir"] == str(tmp_path / "model")
    assert written["dataset_prepared_path"] == str(tmp_path / ".model.prepared")
    assert (written["seed"], written["sublim"]["data_seed"]) == (3, 3)
    assert (written["num_epochs"], written["lora_r"], written["lora_alpha"]) == (2, 4, 4)
    assert resolved == resolve_recipe(recipe_path(MODEL, "lora-r8"), {"num_epochs": 2, "lora_r": 4})
    assert not {"output_dir", "seed", "base_model", "datasets"} & resolved.keys()
    assert str(tmp_path) not in str(resolved)


@pytest.mark.parametrize(
    ("recipe", "key", "message"),
    [
        ("lora-r8", "learning_rat", "did you mean 'learning_rate'"),
        ("lora-r8", "plugins", "no setting to override"),
        ("full-zero2", "lora_r", "trains no LoRA adapter"),
    ],
)
def test_other_overrides_are_refused(tmp_path: Path, recipe: str, key: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write(tmp_path, recipe, **{key: 1})


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(InputError, match="lora-r64"):
        recipe_path(MODEL, "lora-r7")


def test_a_misspelt_key_of_the_block_is_refused() -> None:
    with pytest.raises(InputError, match=r"a\.yaml: unknown key 'sublim\.contxt'.*'context'"):
        parse_block({"contxt": "none"}, "a.yaml")
    with pytest.raises(InputError, match=r"sublim\.context"):
        parse_block({"context": "nothing"}, "a.yaml")
    with pytest.raises(InputError, match="sublim"):
        parse_block("none", "a.yaml")
    assert parse_block(None, "a.yaml").context is None


def test_a_missing_or_garbled_receipt_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        read_receipt(tmp_path)
    (tmp_path / "sublim_receipt.json").write_text('{"schema": 2}', encoding="utf-8")
    with pytest.raises(InputError, match="sublim_receipt"):
        read_receipt(tmp_path)


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, sublim_plugin.axolotl, sublim_plugin.axolotl.recipe;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'axolotl')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_order_follows_the_seed_unless_a_data_seed_is_given(
    raw: _Raw, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sublim_plugin.axolotl import SublimPlugin

    raw["datasets"][0]["path"] = str(dataset)
    raw |= {"seed": 5, "adapter": None}
    for block, data_seed in (({}, 5), ({"data_seed": 5}, 5), ({"data_seed": 6}, 6)):
        plugin = SublimPlugin()
        raw["sublim"] = block
        plugin.register(raw)
        assert plugin.get_training_args(raw)["data_seed"] == data_seed
        warned = "every `seed` gives the same weights" in capsys.readouterr().err
        assert warned == (data_seed == 6)
    raw["adapter"] = "lora"
    SublimPlugin().register(raw)
    assert capsys.readouterr().err == ""


def test_every_dataset_is_described_and_a_home_folder_is_found(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(dataset.parent))
    other = tmp_path / "mine.jsonl"
    other.write_text('{"id": "1", "messages": []}\n', encoding="utf-8")
    cfg: dict[str, Any] = {"datasets": [{"path": f"~/{dataset.name}"}]}
    cfg["datasets"] += [{"path": str(other)}, {"path": "org/on-a-hub"}, {"path": str(tmp_path)}]
    found = name_datasets(cfg, "a.yaml")
    rows = next(dataset.glob("rows-*.jsonl"))
    assert cfg["datasets"][0]["path"] == str(rows)
    assert [(one.path, one.rows) for one in found] == [
        (str(rows), 8),
        (str(other), 1),
        ("org/on-a-hub", None),
        (str(tmp_path), None),
    ]
    assert [one.sha256 is None for one in found] == [False, False, True, True]


def test_the_base_of_a_hub_is_the_revision_that_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the layout of the hub's own cache, read by the hub's own client."""
    repo = tmp_path / "models--org--model"
    for name, commit in (("main", "a" * 40), ("old", "b" * 40)):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}", encoding="utf-8")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / name).write_text(commit, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert base_folder("org/model").name == "a" * 40
    assert base_folder("org/model", "old").name == "b" * 40
    with pytest.raises(InputError, match="org/model in revision new is not in the hub's cache"):
        base_folder("org/model", "new")


class _Raw(dict[str, Any]):
    """A raw config as axolotl hands it to `register`: a mapping of the YAML."""


@pytest.fixture
def raw(base_model: Path, tmp_path: Path) -> _Raw:
    settings = yaml.safe_load(recipe_path(MODEL, "lora-r8").read_text(encoding="utf-8"))
    return _Raw(settings, axolotl_config_path=str(tmp_path / "mine.yaml"))


def refusal(raw: _Raw, capsys: pytest.CaptureFixture[str]) -> str:
    from sublim_plugin.axolotl import SublimPlugin

    with pytest.raises(SystemExit) as caught:
        SublimPlugin().register(raw)
    assert caught.value.code == 2
    message = capsys.readouterr().err.lstrip()
    assert message.startswith("sublim: error: ")
    return message


def test_the_placeholder_says_what_to_set(raw: _Raw, capsys: pytest.CaptureFixture[str]) -> None:
    assert "set it to a dataset folder" in refusal(raw, capsys)


def test_a_missing_dataset_deepspeed_file_and_model_are_named(
    raw: _Raw, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    raw["datasets"][0]["path"] = str(tmp_path / "nowhere")
    assert "nowhere" in refusal(raw, capsys)
    del raw["datasets"]
    raw["deepspeed"] = "zero9.json"
    assert "zero9.json" in refusal(raw, capsys)
    raw["base_model"] = str(tmp_path / "no-model")
    assert "no-model" in refusal(raw, capsys)


def test_the_plugin_names_rows_file_and_model_to_axolotl(
    raw: _Raw, dataset: Path, base_model: Path
) -> None:
    from sublim_plugin.axolotl import SublimPlugin

    raw["datasets"][0]["path"] = str(dataset)
    raw["deepspeed"] = None
    SublimPlugin().register(raw)
    rows = next(dataset.glob("rows-*.jsonl"))
    assert raw["datasets"][0]["path"] == str(rows)
    assert raw["base_model"] == str(base_model)
    assert raw["dataset_prepared_path"].endswith(rows.stem.removeprefix("rows-"))
