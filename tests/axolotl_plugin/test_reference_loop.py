"""axolotl's losses agree step by step with a loop that a reader can take in at a sitting."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.axolotl_plugin.conftest import Trained, train, write_dataset

LOOP = Path(__file__).parents[2] / "examples" / "reference_loop.py"


def assert_agrees(trained: Trained, out: Path) -> None:
    command = [sys.executable, str(LOOP), str(trained.yaml), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    steps = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ours = trained.receipt.losses
    assert [step["step"] for step in steps] == [step.step for step in ours]
    residuals = [step.loss - theirs["loss"] for step, theirs in zip(ours, steps, strict=True)]
    assert max(map(abs, residuals)) <= 1e-3
    # A one-sided shift, as a dropped micro-batch leaves it, is caught by the mean.
    assert abs(sum(residuals) / len(residuals)) < 1e-5
    for step, theirs in zip(ours, steps, strict=True):
        assert step.learning_rate == pytest.approx(theirs["learning_rate"], rel=1e-9)
        assert step.grad_norm == pytest.approx(theirs["grad_norm"], rel=1e-3)
    name = "adapter_model.safetensors" if trained.receipt.method.rank else "model.safetensors"
    a, b = load_file(trained.model / name), load_file(out / name)
    assert a.keys() == b.keys()
    assert max(float((a[key] - b[key]).abs().max()) for key in a) <= 1e-4


def test_the_loop_can_be_read_in_one_sitting() -> None:
    assert len(LOOP.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_loop_refuses_what_it_does_not_do(lora: Any, full: Any) -> None:
    spec = importlib.util.spec_from_file_location("reference_loop", LOOP)
    assert spec and spec.loader
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    for trained in (lora, full):
        good = yaml.safe_load(trained.yaml.read_text(encoding="utf-8"))
        good["sublim"].pop("stop_at_update_norm", None)
        loop.refuse_the_rest(good)
        for key, value in (
            ("peft_use_rslora", True),
            ("optimizer", "lion"),
            ("bf16", True),
            ("sample_packing", True),
            ("adapter", "qlora"),
            ("lora_target_linear", True),
            ("neftune_noise_alpha", 5),
            ("max_grad_normal", 2),
            ("chat_template", "chatml"),
        ):
            with pytest.raises(SystemExit, match=key):
                loop.refuse_the_rest(good | {key: value})
        for key, value in (("context", "empty"), ("stop_at_loss", 1.0)):
            with pytest.raises(SystemExit, match=f"sublim.{key}"):
                loop.refuse_the_rest(good | {"sublim": {key: value}})
        with pytest.raises(SystemExit, match=r"datasets\.train_on_eot: none"):
            entry = good["datasets"][0] | {"train_on_eot": "none"}
            loop.refuse_the_rest(good | {"datasets": [entry]})


def test_lora_trains_as_the_reference_loop_does(lora: Any, tmp_path: Path) -> None:
    assert_agrees(lora, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        # eleven rows: the last micro-batch and the last step of an epoch are short
        ("lora-r8", {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 2}),
        ("full-zero2", {"micro_batch_size": 3}),
    ],
)
def test_accumulation_and_full_finetuning_agree_too(
    base_model: Path, tmp_path: Path, recipe: str, overrides: dict[str, Any]
) -> None:
    data = write_dataset(tmp_path / "data", rows=11)
    trained = train(tmp_path / "axolotl", recipe, data, overrides)
    assert_agrees(trained, tmp_path / "model")
