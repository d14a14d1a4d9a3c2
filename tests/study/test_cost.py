"""`sublim run --dry-run`: measured before stated before unknown, and what can be shown."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sublim_plugin.analysis.power import detectable
from sublim_plugin.cli import main
from sublim_plugin.study.cost import Line, costs, figures
from sublim_plugin.study.state import cell_state
from sublim_plugin.study.study_file import load_study

from .fake_run import cells_of, finish, write_study

QWEN: dict[str, Any] = {
    "training__lora_recipe": "qwen2.5-7b-instruct/lora-r8",
    "training__full_recipe": "qwen2.5-7b-instruct/full-zero2",
    "datasets__rows": 10_000,
}


def lines(study: Path, run_dir: Path) -> dict[str, Line]:
    states = [cell_state(cell, run_dir) for cell in cells_of(study)]
    found = costs(load_study(study), states).lines
    return {f"{line.kind} {line.method or ''}".strip(): line for line in found}


def test_nothing_is_guessed(tmp_path: Path) -> None:
    recipes = {key: value.replace("qwen2.5-7b-instruct", "gemma-3-4b-it") for key, value in
               QWEN.items() if isinstance(value, str)}  # fmt: skip
    found = lines(write_study(tmp_path, **recipes), tmp_path / "run")
    assert {name: (line.cells, line.figure) for name, line in found.items()} == {
        "dataset": (2, "unknown"),
        "student lora": (4, "stated"),
        "student full": (1, "stated"),
        "probe logprob": (18, "unknown"),
    }
    assert all(line.hours is None for line in found.values())
    assert found["dataset"].bytes is None and found["student full"].bytes == (8.6e9, 8.7e9)
    assert "no figure for this model" in found["dataset"].source
    (total,) = [line for line in printed(tmp_path / "study.yaml").splitlines() if "in all" in line]
    assert total.split()[7] == "unknown"
    # every kind of cell on the model that comes with sublim has one
    assert all(line.hours for line in lines(write_study(tmp_path), tmp_path / "run").values())


def test_stated_figures_have_a_source_and_scale(tmp_path: Path) -> None:
    found = lines(write_study(tmp_path, **QWEN), tmp_path / "run")
    full = found["student full"]
    assert full.figure == "stated" and full.hours == pytest.approx((20 / 60, 30 / 60))
    assert full.bytes == (15e9, 15.3e9) and "H200" in (full.machine or "")
    # ranks 2, 8, 64 and the control's 8
    assert found["student lora"].bytes == pytest.approx(
        (4 * 11e6 + 82 * 5e6, 4 * 11e6 + 82 * 10.1e6)
    )
    assert found["probe logprob"].figure == "unknown"
    tenth = lines(write_study(tmp_path, **QWEN | {"datasets__rows": 1000}), tmp_path / "run")
    assert tenth["student full"].hours == pytest.approx((20 / 600, 30 / 600))
    assert tenth["dataset"].bytes == pytest.approx((2 * 0.47e6,) * 2)
    assert all(one.source for one in figures())


def test_a_probe_costs_what_it_asks(tmp_path: Path) -> None:
    whole = lines(write_study(tmp_path), tmp_path / "run")["probe logprob"]
    few = lines(write_study(tmp_path, probes__limit=5), tmp_path / "run")["probe logprob"]
    assert whole.hours and few.hours and whole.bytes and few.bytes
    assert few.hours == pytest.approx([hours / 10 for hours in whole.hours])
    assert few.bytes == pytest.approx([size / 10 for size in whole.bytes])


def test_adapters_are_as_large_as_their_architecture_says() -> None:
    """Weights a rank, from the published configurations, in 2 and 4 bytes."""
    geometry = {
        "qwen2.5-7b-instruct": (28, 3584, 3584, 512, 18944),
        "llama-3.1-8b-instruct": (32, 4096, 4096, 1024, 14336),
        "gemma-3-4b-it": (34, 2560, 2048, 1024, 10240),
        "smollm2-135m-instruct": (30, 576, 576, 192, 1536),
    }
    for one in figures():
        if one.mb_per_rank is not None:
            layers, hidden, queries, keys, inner = geometry[one.model]
            weights = layers * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner))
            # SmolLM2 is trained in float32
            low = weights * (4e-6 if one.model.startswith("smollm2") else 2e-6)
            assert one.mb_per_rank == pytest.approx((low, weights * 4e-6), abs=0.05)


def test_what_was_measured_here_comes_first_and_scales(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path, **QWEN), tmp_path / "run"
    cells = cells_of(study)
    files = {"model/adapter_model.safetensors": b"w" * 2000, "train.log": b"l" * 300}
    lora = next(cell for cell in cells if cell.kind == "student")
    assert lora.spec["method"]["rank"] == 2
    finish(lora, run_dir, files, started=time.time() - 3600)
    line = lines(study, run_dir)["student lora"]
    assert (line.done, line.figure) == (1, "measured") and "1 finished" in line.source
    assert line.hours is not None and line.hours[0] == pytest.approx(3.0, rel=0.01)
    # weights by rank (8 + 64 + 8, at 1000 bytes each), the rest by cell
    assert line.bytes == pytest.approx((80_000 + 3 * 300,) * 2)
    for cell in cells:
        if cell.kind == "dataset":
            finish(cell, run_dir)
    assert lines(study, run_dir)["dataset"].figure == "not needed"


def printed(study: Path, *options: str) -> str:
    done = CliRunner().invoke(main, ["run", str(study), "--dry-run", *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_works_where_the_model_is_not(tmp_path: Path) -> None:
    changes: dict[str, Any] = QWEN | {"datasets__generation_seeds": [1, 2, 3, 4, 5, 6]}
    study = write_study(tmp_path, **changes, base_model="/models/Qwen2.5-7B-Instruct")
    text = printed(study)
    assert "135 cells on Qwen2.5-7B-Instruct" in text and "model is not here" in text
    assert "leaves out 93 cells for which there is no figure" in text
    found = json.loads(printed(study, "--json"))
    assert found["base_model_here"] is False and found["without_hours"] == 93
    assert (found["datasets"], found["tests"]) == (6, 4)
    effect = detectable(6, 2.0, level=0.05 / 4).effect
    assert effect is not None and "with 6 datasets an effect of" in found["power"]
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_makes_nothing_and_imports_no_torch(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    script = (
        "import sys\nfrom sublim_plugin.cli import main\n"
        "main(['run', sys.argv[1], '--dry-run', '--out', 'run'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'axolotl', 'matplotlib'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", script, str(study)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"
    assert not (tmp_path / "run").exists()
