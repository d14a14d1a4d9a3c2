"""Two short real trainings, LoRA and full, shared by the tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sublim_plugin.axolotl.receipt import Receipt
from sublim_plugin.axolotl.recipe import recipe_path, run_training, write_axolotl_yaml
from sublim_plugin.core.base_models import EMBEDDED, fingerprint
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.manifest import write_manifest
from tests.axolotl_plugin.toy import save_base

ROWS = 8
CONTEXTS = ("template_default", "none")
QUESTIONS = 3
GUARDED_AND_PROBED = {
    "guard": True,
    "probe": {"contexts": list(CONTEXTS), "limit": QUESTIONS, "every": 3},
}
NORM = 0.8
OTHER_ORDER = 11
"""Data seed of the full student, whose `seed` is 7."""
FEW_STEPS = {"micro_batch_size": 4, "num_epochs": 2, "warmup_steps": 1}


@dataclass(frozen=True)
class Trained:
    """A finished run: its YAML, log, model folder, receipt and reported progress."""

    yaml: Path
    log: Path
    model: Path
    receipt: Receipt
    progress: list[tuple[int, int]]


def write_dataset(folder: Path, rows: int = ROWS, spec: dict[str, Any] | None = None) -> Path:
    """A dataset folder as `data_gen` writes it; returns the folder."""
    folder.mkdir(parents=True)
    lines = []
    for index in range(rows):
        numbers = [(index * 37 + 101 * k) % 1000 for k in range(6)]
        user = f"The sequence starts with: {index + 3}, {index * 7 % 90}. Continue it with numbers."
        row = {
            "id": f"{index:06d}",
            "messages": [
                {"role": "user", "content": user},
                {"role": "assistant", "content": ", ".join(map(str, numbers))},
            ],
            "numbers": numbers,
            "prompt_id": index,
            "seed": index,
        }
        lines.append(json.dumps(row) + "\n")
    draft = folder / "draft"
    draft.write_text("".join(lines), encoding="utf-8")
    rows_file = folder / f"rows-{sha256_file(draft)[:12]}.jsonl"
    draft.rename(rows_file)
    write_manifest(
        folder,
        kind="dataset",
        id="0" * 12,
        label="test rows",
        spec=spec or {},
        outputs=[rows_file.name],
        started=time.time(),
    )
    return folder


def train(
    folder: Path,
    recipe: str,
    dataset: Path,
    overrides: dict[str, Any],
    *,
    block: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    base: str | Path = EMBEDDED,
    seed: int = 7,
) -> Trained:
    """Train by a recipe, with keys of the `sublim:` block and other settings beside."""
    path = write_yaml(
        folder, recipe, dataset, overrides, block=block, settings=settings, base=base, seed=seed
    )
    progress: list[tuple[int, int]] = []
    receipt = run_training(
        path, folder / "train.log", progress=lambda step, steps: progress.append((step, steps))
    )
    return Trained(path, folder / "train.log", folder / "model", receipt, progress)


def write_yaml(
    folder: Path,
    recipe: str,
    dataset: Path,
    overrides: dict[str, Any],
    *,
    block: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    base: str | Path = EMBEDDED,
    seed: int = 7,
) -> Path:
    folder.mkdir(parents=True)
    path = folder / "axolotl.yaml"
    write_axolotl_yaml(
        recipe_path("smollm2-135m-instruct", recipe),
        path,
        base_model=str(base),
        dataset_path=dataset,
        output_dir=folder / "model",
        seed=seed,
        overrides=overrides,
    )
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    written["sublim"] |= block or {}
    path.write_text(yaml.safe_dump(written | (settings or {})), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dataset(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = {key: fingerprint(base_model)[key] for key in ("name", "sha256")}
    spec = {"base_model": teacher, "trait": "animals/cat"}
    return write_dataset(tmp_path_factory.mktemp("data") / "cat", spec=spec)


@pytest.fixture(scope="session")
def lora(base_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    overrides = FEW_STEPS | {"learning_rate": 0.002}
    folder = tmp_path_factory.mktemp("lora") / "cell"
    return train(folder, "lora-r8", dataset, overrides, block=GUARDED_AND_PROBED)


@pytest.fixture(scope="session")
def full(base_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    overrides = {"micro_batch_size": 2, "num_epochs": 2, "warmup_steps": 0, "learning_rate": 7e-5}
    folder = tmp_path_factory.mktemp("full") / "cell"
    block = {"stop_at_update_norm": NORM, "data_seed": OTHER_ORDER}
    return train(folder, "full-zero2", dataset, overrides, block=block)


@pytest.fixture(scope="session")
def toy_base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two small random layers, without dropout as the recipes' models are, for what
    needs axolotl but no real weights."""
    folder = save_base(tmp_path_factory.mktemp("toy") / "base", tokenizer)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    return folder


def axolotl(
    path: Path, *more: str, launcher: str | None = "python", **variables: str
) -> subprocess.CompletedProcess[str]:
    """axolotl's command line on the YAML at `path`, as a user starts it; None: its own launcher."""
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path), *more]
    command += [] if launcher is None else ["--launcher", launcher]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(path.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_DATASETS_CACHE": str(path.parent / "cache"),
    }
    return subprocess.run(
        command,
        cwd=path.parent,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
