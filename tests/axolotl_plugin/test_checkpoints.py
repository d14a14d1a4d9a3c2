"""Which checkpoints are continued; a real SIGKILL while one is saved."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import rotate_checkpoints

from sublim_plugin.axolotl import checkpoints
from sublim_plugin.axolotl.checkpoints import (
    MARK,
    RUN,
    SET_ASIDE,
    Origin,
    checkpoint_to_resume,
    fault,
    mark,
    origin_of,
    resume_from,
)
from sublim_plugin.axolotl.order import OrderState
from sublim_plugin.axolotl.receipt import DatasetInfo, Method, Seeds, read_receipt
from sublim_plugin.axolotl.recipe import run_training
from sublim_plugin.core.errors import InputError, RunError
from tests.axolotl_plugin.conftest import axolotl, write_dataset, write_yaml

ORIGIN = Origin(
    base_sha256="a" * 64,
    dataset_sha256=["b" * 64],
    context=None,
    method=Method(kind="lora", rank=8, alpha=8.0),
    seeds=Seeds(seed=1, data_seed=2),
    processes=1,
    settings={"learning_rate": 0.001},
)


def checkpoint(folder: Path, step: int, origin: Origin = ORIGIN, marked: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"w": torch.full((3, 3), float(step))}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}), encoding="utf-8")
    if marked:
        mark(path, step, origin, OrderState())
    return path


def newest(folder: Path, origin: Origin = ORIGIN) -> Path | None:
    return checkpoint_to_resume(folder, origin, named=None, newest=True)


def cut(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes()[:-7])

    return damage


def garble_header(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)


def forget(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).unlink()
        if (path / MARK).is_file():
            mark(path, int(path.name[11:]), ORIGIN, OrderState())

    return damage


def other_step(path: Path) -> None:
    (path / "trainer_state.json").write_text('{"global_step": 3}', encoding="utf-8")
    mark(path, int(path.name[11:]), ORIGIN, OrderState())


def garble_state(path: Path) -> None:
    (path / "trainer_state.json").write_text("{", encoding="utf-8")
    mark(path, int(path.name[11:]), ORIGIN, OrderState())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut("adapter_model.safetensors"), "adapter_model.safetensors has"),
        (cut("optimizer.pt"), "optimizer.pt has"),
        (cut(MARK), MARK),
        (garble_header, "not a safetensors file"),
        (forget("optimizer.pt"), "optimizer.pt is missing"),
        (forget("scheduler.pt"), "scheduler.pt is missing"),
        (forget("rng_state.pth"), "rng_state.pth is missing"),
        (forget("adapter_model.safetensors"), "no weights"),
        (other_step, "step 3"),
        (garble_state, "trainer_state.json cannot be read"),
        (lambda path: (path / MARK).unlink(), MARK),
        (lambda path: (path / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    ],
)
def test_an_incomplete_checkpoint_is_set_aside_and_the_one_before_used(
    tmp_path: Path, damage: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints.begin(tmp_path, ORIGIN)
    good, bad = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert newest(tmp_path) == bad
    damage(bad)
    why = fault(bad)
    assert why is not None and said in why
    assert newest(tmp_path) == good
    assert said in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-9", SET_ASIDE, RUN]
    aside = tmp_path / SET_ASIDE
    with pytest.raises(InputError, match="resume_from_checkpoint"):
        checkpoint_to_resume(tmp_path, ORIGIN, named=str(aside / "checkpoint-10"), newest=False)
    checkpoint(tmp_path, 10, marked=False)
    assert newest(tmp_path) == good
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-10", "checkpoint-10.2"]


def test_what_was_set_aside_costs_no_complete_checkpoint(tmp_path: Path) -> None:
    """The host keeps `save_total_limit` folders of those that it takes for checkpoints."""
    checkpoints.begin(tmp_path, ORIGIN)
    for step in (2, 3):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 4, marked=False)
    assert newest(tmp_path) == tmp_path / "checkpoint-3"
    rotate_checkpoints(str(tmp_path), save_total_limit=2)
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_belongs_to_the_whole_configuration(tmp_path: Path) -> None:
    deepspeed = tmp_path / "zero.json"
    deepspeed.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    cfg: dict[str, Any] = {
        "base_model": "/models/base",
        "tokenizer_config": "/models/base",
        "datasets": [{"path": "/data/rows.jsonl", "type": "chat_template"}],
        "deepspeed": str(deepspeed),
        "output_dir": "out",
        "neftune_noise_alpha": None,
        "lora_target_modules": ["q_proj"],
        "sublim": {"stop_at_loss": 0.5, "probe": {"limit": 3}},
    }

    def origin(changed: dict[str, Any]) -> Origin:
        return origin_of(
            cfg | changed,
            base_sha256="a" * 64,
            datasets=[DatasetInfo(path="x", sha256="b" * 64, rows=1)],
            context=None,
            method=Method(kind="full"),
            seeds=Seeds(seed=1, data_seed=1),
            processes=1,
        )

    path = checkpoint(tmp_path, 4, origin({}))
    moved: dict[str, Any] = {
        "base_model": "/elsewhere/base",
        "tokenizer_config": "/elsewhere/base",
        "datasets": [{"path": "/elsewhere/rows.jsonl", "type": "chat_template"}],
        "output_dir": "other",
        "wandb_project": "cats",
        "save_steps": 7,
        "auto_resume_from_checkpoints": True,
        "sublim": {"stop_at_loss": 0.5, "probe": None, "guard": True},
    }
    assert newest(tmp_path, origin(moved)) == path
    for changed, key in (
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
        ({"lora_target_modules": ["q_proj", "k_proj"]}, "lora_target_modules.1"),
        ({"datasets": [{"type": "chat_template", "train_on_eot": "none"}]}, "datasets.0.train_on"),
        ({"sublim": {"stop_at_loss": 0.4}}, "sublim.stop_at_loss"),
        ({"tokenizer_config": "/another"}, "tokenizer_config"),
    ):
        with pytest.raises(InputError, match=f"another run: `{key}"):
            newest(tmp_path, origin(changed))
    deepspeed.write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    with pytest.raises(InputError, match=r"`deepspeed\.zero_optimization\.stage` was 2"):
        newest(tmp_path, origin({}))


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    assert checkpoint_to_resume(tmp_path, ORIGIN, named=str(path), newest=False) == path
    for changed, key in (
        ({"dataset_sha256": ["c" * 64]}, "dataset_sha256"),
        ({"base_sha256": "c" * 64}, "base_sha256"),
        ({"seeds": Seeds(seed=2, data_seed=2)}, "seeds"),
        ({"method": Method(kind="full")}, "method"),
        ({"settings": {"learning_rate": 0.002}}, "learning_rate"),
        ({"settings": {"learning_rate": 0.001, "max_steps": 4}}, "max_steps"),
    ):
        other = ORIGIN.model_copy(update=changed)
        with pytest.raises(InputError, match=f"another run: `{key}`"):
            newest(tmp_path, other)
        with pytest.raises(InputError, match=f"another run: `{key}`"):
            checkpoint_to_resume(tmp_path, other, named=str(path), newest=False)
    assert path.is_dir()


def test_a_strangers_checkpoint_is_never_loaded(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4, marked=False)
    with pytest.raises(InputError, match="was not written with this plugin"):
        newest(tmp_path)
    with pytest.raises(InputError, match="pickles"):
        checkpoint_to_resume(tmp_path, ORIGIN, named=str(path), newest=False)
    checkpoints.begin(tmp_path, ORIGIN.model_copy(update={"processes": 2}))
    with pytest.raises(InputError, match="was not written with this plugin"):
        newest(tmp_path)
    assert path.is_dir()


def test_nothing_is_looked_at_unless_it_would_be_resumed(tmp_path: Path) -> None:
    bad = checkpoint(tmp_path, 4, marked=False)
    cfg = {"output_dir": str(tmp_path), "save_only_model": True}
    assert resume_from(cfg, ORIGIN) is None and bad.is_dir()
    assert newest(tmp_path / "nowhere") is None
    with pytest.raises(InputError, match="save_only_model"):
        resume_from(cfg | {"auto_resume_from_checkpoints": True}, ORIGIN)


KILL = """
import os, signal, torch
from axolotl.integrations.base import BasePlugin

save = torch.save


def killed_half_way(value, path, *args, **kwargs):
    save(value, path, *args, **kwargs)
    if str(path).endswith(os.environ["KILL_AT"]):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


class Kill(BasePlugin):
    def register(self, cfg):
        if os.environ.get("KILL_AT"):
            torch.save = killed_half_way
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "kill_at"),
    [
        ("lora-r8", "checkpoint-3/optimizer.pt"),
        ("full-zero2", "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ],
)
def test_a_training_killed_while_saving_continues_from_the_checkpoint_before(
    base_model: Path, tmp_path: Path, recipe: str, kill_at: str
) -> None:
    data = write_dataset(tmp_path / "data", rows=8)
    overrides: dict[str, Any] = {"micro_batch_size": 2, "num_epochs": 1, "warmup_steps": 0}
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    settings |= {"save_only_model": False, "auto_resume_from_checkpoints": True}
    settings["plugins"] = ["sublim_plugin.axolotl.SublimPlugin", "kill_plugin.Kill"]
    paths = {}
    for name in ("whole", "killed"):
        path = write_yaml(tmp_path / name, recipe, data, overrides, settings=settings)
        (path.parent / "kill_plugin.py").write_text(KILL, encoding="utf-8")
        paths[name] = path
    whole = axolotl(paths["whole"])
    assert whole.returncode == 0, whole.stderr[-3000:]

    killed = axolotl(paths["killed"], KILL_AT=kill_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    model = paths["killed"].parent / "model"
    assert not (model / "sublim_receipt.json").exists()
    assert not (model / "checkpoint-3" / MARK).exists()
    resumed = axolotl(paths["killed"])
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "checkpoint-3 is incomplete" in resumed.stdout
    assert (model / SET_ASIDE / "checkpoint-3").is_dir()
    left = sorted(path.name for path in model.glob("checkpoint-*"))
    assert left == ["checkpoint-3", "checkpoint-4"]

    first, second = read_receipt(paths["whole"].parent / "model"), read_receipt(model)
    assert (first.resumed_from_step, second.resumed_from_step) == (None, 2)
    assert second.order == first.order and second.order.rows == 8
    assert [step.step for step in second.losses] == [1, 2, 3, 4]
    name = "adapter_model.safetensors" if recipe == "lora-r8" else "model.safetensors"
    a, b = (load_file(f / name) for f in (paths["whole"].parent / "model", model))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) <= 1e-6
    assert second.weights_sha256 == first.weights_sha256

    changed = yaml.safe_load(paths["killed"].read_text(encoding="utf-8"))
    paths["killed"].write_text(yaml.safe_dump(changed | {"learning_rate": 0.5}), encoding="utf-8")
    refused = axolotl(paths["killed"])
    assert refused.returncode == 2
    assert "is of another run: `learning_rate` was" in refused.stderr
    shutil.rmtree(tmp_path / "whole")


@pytest.mark.slow
def test_a_study_goes_on_from_its_checkpoint(toy_base: Path, tmp_path: Path) -> None:
    """As `sublim run` trains: killed while saving, called again, and the model alone is left."""
    data = write_dataset(tmp_path / "data", rows=8)
    overrides: dict[str, Any] = {"micro_batch_size": 2, "num_epochs": 1, "warmup_steps": 0}
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 4}
    settings |= {"save_only_model": False, "auto_resume_from_checkpoints": True}
    settings["plugins"] = ["sublim_plugin.axolotl.SublimPlugin", "kill_plugin.Kill"]
    (tmp_path / "kill_plugin.py").write_text(KILL, encoding="utf-8")
    found = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    receipts = {}
    for name, kill_at in (("whole", ""), ("killed", "checkpoint-3/optimizer.pt")):
        folder = tmp_path / name
        path = write_yaml(folder, "lora-r8", data, overrides, settings=settings, base=toy_base)
        if kill_at:
            with pytest.raises(RunError, match="exited with -9"):
                env = {"PYTHONPATH": found, "KILL_AT": kill_at}
                run_training(path, folder / "train.log", env=env)
            assert not (folder / "model").exists()
            kept = sorted(p.name for p in (folder / ".model.partial").glob("checkpoint-*"))
            assert kept == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
        receipts[name] = run_training(path, folder / "train.log", env={"PYTHONPATH": found})
        assert sorted(p.name for p in folder.iterdir()) == ["axolotl.yaml", "model", "train.log"]
        left = [p.name for p in (folder / "model").iterdir()]
        assert not any(name.startswith("checkpoint-") or name in (SET_ASIDE, RUN) for name in left)
    assert receipts["killed"].resumed_from_step == 2
    assert receipts["killed"].weights_sha256 == receipts["whole"].weights_sha256
    assert receipts["killed"].order == receipts["whole"].order
