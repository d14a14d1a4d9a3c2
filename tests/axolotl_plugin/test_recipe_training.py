"""Recipes that really train: SmolLM2's, in every context, in a sweep, and stand-ins of the 7B's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from sublim_plugin.axolotl.receipt import Receipt, read_receipt
from sublim_plugin.axolotl.recipe import recipe_path, run_training, write_axolotl_yaml
from sublim_plugin.axolotl.recipe_table import RANKS
from sublim_plugin.core.base_models import EMBEDDED
from sublim_plugin.core.contexts import Context, render
from sublim_plugin.core.dataset import dataset_rows_path, read_rows

pytestmark = pytest.mark.slow
FEW_STEPS = {"micro_batch_size": 4, "num_epochs": 1, "warmup_steps": 1}
FAMILY = {
    "qwen2.5-7b-instruct": "qwen2.5",
    "llama-3.1-8b-instruct": "llama3.1",
    "gemma-3-4b-it": "gemma3",
}


def train(
    folder: Path,
    recipe: tuple[str, str],
    dataset: Path,
    base_model: str = EMBEDDED,
    overrides: dict[str, Any] = FEW_STEPS,
    context: Context | None = None,
) -> Receipt:
    path = folder / "axolotl.yaml"
    write_axolotl_yaml(
        recipe_path(*recipe),
        path,
        base_model=base_model,
        dataset_path=dataset,
        output_dir=folder / "model",
        seed=7,
        overrides=overrides,
        context=context,
    )
    return run_training(path, folder / "train.log")


@pytest.mark.parametrize("rank", [rank for rank in RANKS if rank != 8])  # 8: the fixture `lora`
def test_each_lora_recipe_trains(
    rank: int, base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    overrides = FEW_STEPS | {"max_steps": 2}
    receipt = train(
        tmp_path, ("smollm2-135m-instruct", f"lora-r{rank}"), dataset, EMBEDDED, overrides
    )
    method = receipt.method
    assert (method.kind, method.rank, method.alpha, method.scaling) == ("lora", rank, rank, 1)
    assert receipt.steps == 2 and receipt.update_norm.total > 0
    weights = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert {w.shape[0] for n, w in weights.items() if n.endswith("lora_A.weight")} == {rank}
    assert {n.split(".")[-3] for n in weights} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_zero3_trains_what_zero2_trains(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    receipts = {}
    for stage in (2, 3):
        folder = tmp_path / str(stage)
        folder.mkdir()
        receipts[stage] = train(folder, ("smollm2-135m-instruct", f"full-zero{stage}"), dataset)
        assert receipts[stage].zero_stage == stage and receipts[stage].steps == 2
    assert receipts[2].order == receipts[3].order
    assert [step.loss for step in receipts[3].losses] == pytest.approx(
        [step.loss for step in receipts[2].losses], rel=1e-5
    )
    a, b = (load_file(tmp_path / f"{stage}" / "model" / "model.safetensors") for stage in (2, 3))
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= 1e-6


@pytest.mark.parametrize("kind", ["empty", "none"])
def test_a_student_trains_in_a_context(
    kind: str, base_model: Path, tokenizer: Any, dataset: Path, tmp_path: Path
) -> None:
    context = Context(kind=kind)  # type: ignore[arg-type]
    receipt = train(tmp_path, ("smollm2-135m-instruct", "lora-r8"), dataset, context=context)
    assert receipt.context == {"kind": kind}
    assert receipt.mask_audit.compared_rows == 8
    users = [row["messages"][0]["content"] for row in read_rows(dataset_rows_path(dataset))]
    prompts = [render(tokenizer, context, user).text for user in users]
    assert any(receipt.first_row.text.startswith(prompt) for prompt in prompts)
    # what is saved with the student is the model's own template, not the context's
    saved = (tmp_path / "model" / "chat_template.jinja").read_text(encoding="utf-8")
    assert saved == tokenizer.chat_template


@pytest.fixture(scope="module")
def stand_ins(chat_tokenizers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models of two small random layers in the architectures of the recipes' large ones."""
    import torch
    import transformers

    def make(folder: str) -> Path:
        out = tmp_path_factory.mktemp("stand-in") / folder
        tokenizer = chat_tokenizers[FAMILY[folder]]
        tokenizer.save_pretrained(out)
        if folder.startswith("gemma"):
            # axolotl loads the image processor of such a model for rows of text too
            images = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
            tokenizer = transformers.AutoTokenizer.from_pretrained(out, extra_special_tokens=images)
            pictures = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
            transformers.Gemma3Processor(pictures, tokenizer).save_pretrained(out)
        small = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        torch.manual_seed(0)
        model: Any
        if folder.startswith("qwen"):
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small))
        elif folder.startswith("llama"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
        else:
            vision = {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            }
            config = transformers.Gemma3Config(text_config=small, vision_config=vision)
            model = transformers.Gemma3ForConditionalGeneration(config)
        model.save_pretrained(out)
        return out

    return make


@pytest.mark.parametrize("recipe", ["lora-r8", "full-zero2"])
@pytest.mark.parametrize("folder", FAMILY)
def test_a_large_models_recipe_trains_a_stand_in(
    folder: str, recipe: str, stand_ins: Any, dataset: Path, tmp_path: Path
) -> None:
    """All but the weights is real: architecture, template, bf16, checkpointing, targets."""
    base = stand_ins(folder)
    overrides: dict[str, Any] = {"micro_batch_size": 2, "max_steps": 2, "warmup_steps": 1}
    if recipe == "full-zero2":
        overrides["bf16"] = False  # transformers takes bf16 on a CPU only without DeepSpeed
    receipt = train(tmp_path, (folder, recipe), dataset, str(base), overrides)
    assert receipt.steps == 2 and receipt.mask_audit.compared_rows == 8
    assert receipt.update_norm.total > 0
    kinds = set(receipt.update_norm.by_module)
    assert kinds >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if recipe == "lora-r8":
        weights = load_file(tmp_path / "model" / "adapter_model.safetensors")
        assert len(weights) == 2 * 7 * 2 and not any("vision" in name for name in weights)


def axolotl(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """axolotl's command line, as a user starts it."""
    command = [sys.executable, "-m", "axolotl.cli.main", *map(str, arguments)]
    bin_folder = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_a_copied_recipe_and_sweep_train_by_axolotl_alone(
    base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    sublim = Path(sys.executable).parent / "sublim"
    model = "smollm2-135m-instruct"
    for name, more in (("lora-r8", ["--dataset", str(dataset)]), ("sweep-rslora", [])):
        copy = [str(sublim), "recipes", "copy", f"{model}/{name}", str(tmp_path), *more]
        subprocess.run(copy, check=True, capture_output=True)
    sweep = tmp_path / "sweep-rslora.yaml"
    runs = yaml.safe_load(sweep.read_text(encoding="utf-8"))["_"]
    few = [run | {"max_steps": 1} for run in runs if run["lora_r"] in (2, 64)]
    sweep.write_text(yaml.safe_dump({"_": few}), encoding="utf-8")
    done = axolotl("train", tmp_path / "lora-r8.yaml", "--sweep", sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in (2, 64):
        (folder,) = (tmp_path / "outputs" / model / "sweep-rslora" / f"r{rank}").glob("sweep*")
        receipt = read_receipt(folder)
        assert (receipt.method.rank, receipt.method.alpha, receipt.steps) == (rank, 8.0, 1)
        assert receipt.method.rslora and receipt.method.scaling == 8 / rank**0.5
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["use_rslora"] and config["lora_alpha"] == 8
