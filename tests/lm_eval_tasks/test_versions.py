"""Other versions of lm-eval, and both ways to install sublim; pip fetches what it needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("subliminal_cat_none", "subliminal_oak_claude", "subliminal_queen_numbers")
KEPT = ("data_gen", "axolotl_configs", "lm_eval_tasks", "sublim_plugin")


def environment(folder: Path, lm_eval: str, editable: bool) -> Path:
    """Python of a venv with this one's packages, but another lm-eval, and sublim from sources."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    beneath = folder / "beneath"
    beneath.mkdir()
    for path in sys.path:
        for entry in Path(path).glob("*") if path.endswith("site-packages") else ():
            known = (beneath / entry.name).is_symlink() or entry.name in KEPT
            if not known and not entry.name.startswith(("sublim", "lm_eval", "__editable__")):
                (beneath / entry.name).symlink_to(entry)
    (packages / "zz_beneath.pth").write_text(f"{beneath}\n")
    sources = folder / "sources"
    for room in KEPT:
        shutil.copytree(ROOT / room, sources / room)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, sources)
    ours = ["--editable", str(sources)] if editable else [str(sources)]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([*pip, f"lm_eval=={lm_eval}"], check=True)
    subprocess.run([*pip, "--force-reinstall", *ours], check=True)
    return python


def run(python: Path, base: Path, out: Path) -> dict:
    """`lm_eval` on the tasks, isolated (`-I`): nothing but what is installed finds them."""
    done = subprocess.run(
        [
            python, "-I", "-m", "lm_eval",
            "--model", "hf",
            "--model_args", f"pretrained={base},dtype=float32",
            "--tasks", ",".join(NAMES),
            "--limit", "2",
            "--device", "cpu",
            "--log_samples",
            "--output_path", str(out),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.rglob("results_*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("version", "editable"), [("0.4.12", False), ("0.4.13", True)])
def test_another_lm_eval_gives_the_same_numbers(version, editable, toy_base, tmp_path):
    python = environment(tmp_path / "venv", version, editable)
    found = subprocess.run(
        [python, "-I", "-c", "import sublim_plugin; print(sublim_plugin.__file__)"],
        capture_output=True,
        text=True,
    ).stdout
    assert ("/venv/sources/" if editable else "/site-packages/") in found
    there = run(python, toy_base, tmp_path / "there")
    here = run(Path(sys.executable), toy_base, tmp_path / "here")
    assert there["lm_eval_version"] == version != here["lm_eval_version"]
    for name in NAMES:
        numbers = {key: v for key, v in here["results"][name].items() if isinstance(v, float)}
        assert len(numbers) >= 5
        for key, value in numbers.items():
            assert there["results"][name][key] == pytest.approx(value, abs=1e-6), (name, key)
        assert there["configs"][name]["metadata"]["notes"] == []
    listed = subprocess.run(
        [python, "-I", "-m", "lm_eval", "validate", "--tasks", ",".join((*NAMES, "subliminal"))],
        capture_output=True,
        text=True,
    )
    assert listed.stdout.splitlines()[-1] == "All tasks found and valid"
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for hook in ("sublim.pth", "sublim.start"):
        assert (packages / hook).read_text() == (ROOT / hook).read_text()
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "uninstall", "-q", "-y", "sublim"],
        check=True,
    )
    assert not list(packages.glob("*sublim*"))
