"""Real axolotl runs: the receipt, equality with plain axolotl, refusals, kills."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file

from sublim_plugin.axolotl.receipt import Method, Seeds
from sublim_plugin.axolotl.recipe import run_training
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import InputError, RunError
from sublim_plugin.core.hashing import sha256_file
from tests.axolotl_plugin.conftest import OTHER_ORDER

SEED_ONLY = """
import torch
from axolotl.integrations.base import BasePlugin


class SeedOnly(BasePlugin):
    def pre_lora_load(self, cfg, model):
        torch.manual_seed(cfg.seed)
"""


def test_lora_receipt_says_what_was_trained(lora: Any, dataset: Path, base_model: Path) -> None:
    receipt = lora.receipt
    rows = dataset_rows_path(dataset)
    assert (receipt.dataset.path, receipt.dataset.rows) == (str(rows), 8)
    assert receipt.dataset.sha256 == sha256_file(rows)
    assert receipt.base_model["sha256"] == fingerprint(base_model)["sha256"]
    assert receipt.method == Method(kind="lora", rank=8, alpha=8.0, rslora=False, scaling=1.0)
    assert receipt.context == {"kind": "template_default"}
    assert receipt.seeds.model_dump() == {"seed": 7, "data_seed": 7}
    assert receipt.zero_stage is None
    assert receipt.steps == 4 and [step.step for step in receipt.losses] == [1, 2, 3, 4]
    first, second = receipt.losses[:2], receipt.losses[2:]
    assert sum(step.loss for step in second) < sum(step.loss for step in first)
    assert receipt.weights_sha256 == sha256_file(lora.model / "adapter_model.safetensors")
    assert lora.progress[-1] == (4, 4)
    assert sorted(p.name for p in lora.model.parent.iterdir()) == [
        "axolotl.yaml",
        "model",
        "train.log",
    ]


def test_loss_is_on_the_completion_and_its_end_of_turn_only(lora: Any, dataset: Path) -> None:
    completions = {
        row["messages"][-1]["content"] + "<|im_end|>"
        for row in read_rows(dataset_rows_path(dataset))
    }
    first = lora.receipt.first_row
    assert first.loss_text in completions
    assert first.text.endswith("<|im_start|>assistant\n" + first.loss_text + "\n")
    audit = lora.receipt.mask_audit
    assert (audit.rows, audit.compared_rows) == (8, 8)
    assert audit.loss_share == pytest.approx(audit.loss_tokens / audit.tokens)


def test_mask_audit_counts_agree_with_the_tokenizer(
    lora: Any, dataset: Path, tokenizer: Any
) -> None:
    rows = read_rows(dataset_rows_path(dataset))
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    completions = [row["messages"][-1]["content"] + "<|im_end|>" for row in rows]

    def count(strings: list[str]) -> int:
        return sum(len(tokenizer(s, add_special_tokens=False)["input_ids"]) for s in strings)

    assert lora.receipt.mask_audit.tokens == count(texts)
    assert lora.receipt.mask_audit.loss_tokens == count(completions)


@pytest.mark.slow
def test_our_run_equals_plain_axolotl(
    lora: Any, dataset: Path, base_model: Path, tmp_path: Path
) -> None:
    plain = yaml.safe_load(lora.yaml.read_text(encoding="utf-8"))
    del plain["sublim"]
    # axolotl draws LoRA's initialization from an unseeded generator: without this one line no two
    # runs of it are equal.
    (tmp_path / "seed_only.py").write_text(SEED_ONLY, encoding="utf-8")
    plain["plugins"] = ["seed_only.SeedOnly"]
    plain["base_model"] = str(base_model)
    plain["datasets"][0] |= {"path": str(dataset_rows_path(dataset)), "ds_type": "json"}
    plain["output_dir"] = str(tmp_path / "model")
    plain["dataset_prepared_path"] = str(tmp_path / "prepared")
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path)]
    done = subprocess.run(
        [*command, "--launcher", "python"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=True,
    )
    losses = [float(x) for x in re.findall(r"'loss': '([^']+)'", done.stdout + done.stderr)]
    ours = [float(f"{step.loss:.4g}") for step in lora.receipt.losses]
    assert losses == ours
    a = load_file(tmp_path / "model" / "adapter_model.safetensors")
    b = load_file(lora.model / "adapter_model.safetensors")
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= 1e-6


def test_full_finetuning_runs_through_zero2(full: Any, base_model: Path) -> None:
    receipt = full.receipt
    assert receipt.method == Method(kind="full")
    assert receipt.seeds == Seeds(seed=7, data_seed=OTHER_ORDER)
    said = full.log.read_text(encoding="utf-8")
    assert "sublim: warning" in said and "every `seed` gives the same weights" in said
    assert receipt.zero_stage == 2
    assert receipt.steps == len(receipt.losses) == receipt.stopping.step
    assert receipt.weights_sha256 == sha256_file(full.model / "model.safetensors")
    trained = load_file(full.model / "model.safetensors")
    base = load_file(base_model / "model.safetensors")
    changed = [name for name in trained if not torch.equal(trained[name], base[name])]
    assert len(changed) == len(base)


def test_full_update_norm_is_that_of_the_dense_difference(full: Any, base_model: Path) -> None:
    from safetensors.numpy import load_file as load_numpy

    trained, base = (load_numpy(f / "model.safetensors") for f in (full.model, base_model))
    squares: dict[str, float] = {}
    for name, weight in trained.items():
        kind = name.split(".")[-2]
        difference = weight.astype(numpy.float64) - base[name].astype(numpy.float64)
        squares[kind] = squares.get(kind, 0.0) + float((difference**2).sum())
    norm = full.receipt.update_norm
    assert norm.total == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-5)
    assert norm.by_module == pytest.approx({k: v**0.5 for k, v in squares.items()}, rel=1e-5)


def test_a_changed_dataset_is_refused_before_training(
    lora: Any, dataset: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in dataset.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    rows = next(changed.glob("rows-*.jsonl"))
    rows.write_text(rows.read_text(encoding="utf-8").replace("101", "102"), encoding="utf-8")
    settings = yaml.safe_load(lora.yaml.read_text(encoding="utf-8"))
    settings["datasets"][0]["path"] = str(changed)
    settings["output_dir"] = str(tmp_path / "model")
    path = tmp_path / "axolotl.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(InputError, match="sha256") as caught:
        run_training(path, tmp_path / "train.log")
    assert str(caught.value).count("\n") == 0
    assert "Traceback" not in str(caught.value)
    assert "Starting trainer" not in (tmp_path / "train.log").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["axolotl.yaml", "changed", "train.log"]


@pytest.mark.slow
def test_a_run_without_receipt_has_failed(lora: Any, tmp_path: Path) -> None:
    settings = yaml.safe_load(lora.yaml.read_text(encoding="utf-8"))
    settings |= {"output_dir": str(tmp_path / "model"), "max_steps": 1}
    settings["plugins"] = ["sublim_plugin.axolotl_misspelt.SublimPlugin"]
    settings["base_model"] = json.loads(
        (lora.model / "adapter_config.json").read_text(encoding="utf-8")
    )["base_model_name_or_path"]
    settings["datasets"][0] |= {"path": lora.receipt.dataset.path, "ds_type": "json"}
    path = tmp_path / "axolotl.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    with pytest.raises(RunError, match="without a receipt") as caught:
        run_training(path, tmp_path / "train.log")
    assert "Model successfully saved" in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_killed_run_leaves_no_child_and_no_model(lora: Any, tmp_path: Path) -> None:
    settings = yaml.safe_load(lora.yaml.read_text(encoding="utf-8"))
    settings["output_dir"] = str(tmp_path / "model")
    path, log = tmp_path / "axolotl.yaml", tmp_path / "train.log"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    code = (
        "import sys; from pathlib import Path;"
        "from sublim_plugin.axolotl.recipe import run_training;"
        "run_training(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(path), str(log)])
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert children
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(_alive(int(pid)) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(int(pid)) for pid in children)
    assert not (tmp_path / "model").exists()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
