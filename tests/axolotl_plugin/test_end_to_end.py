"""axolotl from start to finish where it matters: seeds, refusals, matched controls, launchers.

The models are of two small random layers: what is tested is what axolotl and the plugin do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sublim_plugin.axolotl.norms import update_norm
from sublim_plugin.axolotl.receipt import read_receipt
from sublim_plugin.core.errors import InputError, RunError
from tests.axolotl_plugin.conftest import axolotl, train, write_dataset, write_yaml

pytestmark = pytest.mark.slow
STEPS: dict[str, Any] = {"micro_batch_size": 2, "num_epochs": 4, "warmup_steps": 0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("rows") / "data", rows=8)


def test_two_seeds_of_full_finetuning_are_two_students(
    toy_base: Path, rows: Path, tmp_path: Path
) -> None:
    """A recipe as it is shipped, with `seed` changed and nothing else."""
    found = {}
    for seed in (1, 2):
        path = write_yaml(tmp_path / f"{seed}", "full-zero2", rows, STEPS, base=toy_base, seed=seed)
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        del recipe["sublim"]["data_seed"]  # which `sublim run` writes, and the recipe has not
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        done = axolotl(path)
        assert done.returncode == 0, done.stderr[-3000:]
        found[seed] = read_receipt(path.parent / "model")
        assert (found[seed].seeds.seed, found[seed].seeds.data_seed) == (seed, seed)
        assert sorted(found[seed].order.first_rows[:8]) == [f"{row:06d}" for row in range(8)]
    assert found[1].order.sha256 != found[2].order.sha256
    assert found[1].order.first_rows != found[2].order.first_rows
    assert found[1].weights_sha256 != found[2].weights_sha256


def test_equal_students_under_two_seeds_are_told(
    toy_base: Path, rows: Path, tmp_path: Path
) -> None:
    for seed in (1, 2):
        path = write_yaml(
            tmp_path / f"yaml-{seed}", "full-zero2", rows, STEPS, base=toy_base, seed=seed,
            block={"data_seed": 1},
            settings={"output_dir": str(tmp_path / "out" / f"seed-{seed}")},
        )  # fmt: skip
        done = axolotl(path)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "they are one student, not two" in done.stderr
    assert f"are those in {tmp_path / 'out' / 'seed-1'}" in done.stderr


def test_a_row_in_another_context_stops_before_the_first_step(
    toy_base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    turns = [("system", "You love owls."), ("user", "Continue: 1, 2"), ("assistant", "3, 4")]
    row = {"id": "7", "messages": [{"role": role, "content": text} for role, text in turns]}
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="row 7: the training prompt is not what") as caught:
        train(tmp_path / "run", "lora-r8", data, STEPS, block={"context": "empty"}, base=toy_base)
    said = str(caught.value)
    trained, context = (
        line for line in said.splitlines() if line.strip().startswith(("trained on:", "context:"))
    )
    assert "You love owls." in trained and "Continue: 1, 2" in trained
    assert "You love owls." not in context and "Continue: 1, 2" in context
    assert "Leave system messages out of the rows" in said
    log = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert "'loss'" not in log and not (tmp_path / "run" / "model").exists()


def test_tokens_of_another_template_stop_before_the_first_step(
    toy_base: Path, rows: Path, tmp_path: Path
) -> None:
    """What a stale cache does: axolotl's own tokens are not what the rows file renders."""
    (tmp_path / "stale.py").write_text(
        "from axolotl.integrations.base import BasePlugin\n\n\n"
        "class Stale(BasePlugin):\n"
        "    def post_trainer_create(self, cfg, trainer):\n"
        "        def shifted(row):\n"
        "            return {**row, 'input_ids': [row['input_ids'][1], *row['input_ids'][1:]]}\n\n"
        "        trainer.train_dataset = trainer.train_dataset.map(shifted)\n",
        encoding="utf-8",
    )
    plugins = ["stale.Stale", "sublim_plugin.axolotl.SublimPlugin"]
    path = write_yaml(
        tmp_path / "run", "lora-r8", rows, STEPS, base=toy_base, settings={"plugins": plugins}
    )
    (path.parent / "stale.py").write_text((tmp_path / "stale.py").read_text(), encoding="utf-8")
    done = axolotl(path)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "trained on: 'system" in done.stderr and "expected:   '<|im_start|>" in done.stderr
    assert "'loss'" not in done.stdout + done.stderr


def test_matched_controls(toy_base: Path, rows: Path, tmp_path: Path) -> None:
    """LoRA, then full finetuning to its norm, then LoRA to a loss."""
    fast = STEPS | {"learning_rate": 0.01}
    lora = train(tmp_path / "lora", "lora-r8", rows, fast, base=toy_base)
    assert lora.receipt.update_norm is not None
    for given in (lora.model, lora.model / "sublim_receipt.json"):
        name = f"full-{given.suffix}"
        full = train(
            tmp_path / name, "full-zero2", rows, STEPS | {"learning_rate": 0.001, "num_epochs": 40},
            block={"match_update_norm": str(given)}, base=toy_base,
        )  # fmt: skip
        stopping = full.receipt.stopping
        assert stopping is not None and stopping.target == lora.receipt.update_norm.total
        reached = update_norm(full.model, toy_base).total
        assert reached == pytest.approx(stopping.target, rel=0.02)
        assert stopping.source == str(lora.model) and full.receipt.steps < 160

    losses = [step.loss for step in lora.receipt.losses]
    target = sum(losses[-12:-2]) / 10  # the mean after all steps but two
    again = train(
        tmp_path / "loss", "lora-r8", rows, fast, block={"stop_at_loss": target}, base=toy_base
    )
    stopping = again.receipt.stopping
    assert stopping is not None and stopping.kind == "loss" and stopping.reached <= target
    ours = [step.loss for step in again.receipt.losses]
    assert ours == losses[: len(ours)] and 10 <= len(ours) <= len(losses) - 2
    assert stopping.reached == pytest.approx(sum(ours[-10:]) / 10)
    with pytest.raises(RunError, match="no matched control"):
        train(
            tmp_path / "never", "lora-r8", rows, fast, block={"stop_at_loss": 0.01}, base=toy_base
        )
    assert not (tmp_path / "never" / "model").exists()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"peft_use_dora": True}, "DoRA"),
        ({"lora_modules_to_save": ["lm_head"]}, "not a LoRA factor"),
    ],
)
def test_a_receipt_without_a_norm_says_why(
    toy_base: Path, rows: Path, tmp_path: Path, settings: dict[str, Any], why: str
) -> None:
    trained = train(tmp_path / "run", "lora-r8", rows, STEPS, settings=settings, base=toy_base)
    receipt = trained.receipt
    assert receipt.update_norm is None and why in str(receipt.no_update_norm)
    assert receipt.steps == 16 and receipt.weights_sha256 and receipt.order.rows == 32
    log = trained.log.read_text(encoding="utf-8")
    assert log.index("the receipt will hold no update norm") < log.index("'loss'")
    with pytest.raises(InputError, match="stop rule"):
        train(
            tmp_path / "stop", "lora-r8", rows, STEPS, settings=settings, base=toy_base,
            block={"stop_at_update_norm": 1.0},
        )  # fmt: skip


def test_an_adapter_is_trained_further(toy_base: Path, rows: Path, tmp_path: Path) -> None:
    """`lora_model_dir` brings its own rank; the YAML has none."""
    first = train(tmp_path / "first", "lora-r8", rows, STEPS, base=toy_base)
    path = write_yaml(tmp_path / "second", "lora-r8", rows, STEPS, base=toy_base)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in ("lora_r", "lora_alpha", "lora_target_modules"):
        del settings[key]
    settings["lora_model_dir"] = str(first.model)
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = axolotl(path)
    assert done.returncode == 0, done.stderr[-3000:]
    receipt = read_receipt(path.parent / "model")
    assert receipt.method == first.receipt.method
    assert receipt.weights_sha256 != first.receipt.weights_sha256


def test_full_finetuning_under_axolotls_own_launcher(
    toy_base: Path, rows: Path, tmp_path: Path
) -> None:
    """`axolotl train mine.yaml`, as the README has it: through accelerate."""
    receipts = []
    for launcher in (None, "python"):
        path = write_yaml(tmp_path / str(launcher), "full-zero2", rows, STEPS, base=toy_base)
        done = axolotl(path, launcher=launcher, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr[-3000:]
        receipts.append(read_receipt(path.parent / "model"))
        assert receipts[-1].zero_stage == 2 and receipts[-1].steps == 16
    assert receipts[0].order == receipts[1].order
    assert receipts[0].weights_sha256 == receipts[1].weights_sha256
