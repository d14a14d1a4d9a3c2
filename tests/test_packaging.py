"""What is installed: every room and data file, the hook, the entry points, a quick `--help`."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def test_the_wheel_holds_every_file_of_every_room() -> None:
    files = metadata.files("sublim")
    assert files is not None
    installed = {str(file) for file in files}
    for room in ("data_gen", "axolotl_configs", "lm_eval_tasks", "sublim_plugin"):
        kept = (".py", ".yaml", ".json", ".md", ".bib", ".sh", ".typed")
        ours = {
            str(path.relative_to(ROOT))
            for path in (ROOT / room).rglob("*")
            if path.suffix in kept or path.name == "py.typed"
        }
        assert ours and ours <= installed, ours - installed
    assert {"sublim.pth", "sublim.start"} <= installed
    tops = {name.split("/")[0] for name in installed if "/" in name and not name.startswith("..")}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "data_gen", "axolotl_configs", "lm_eval_tasks", "sublim_plugin", "__pycache__",
    } - ({"__pycache__"} - tops)  # fmt: skip


def test_help_is_instant_and_lists_the_commands() -> None:
    times = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(
            [BIN / "sublim", "--help"], capture_output=True, text=True, check=True
        )
        times.append(time.monotonic() - started)
    for command in ("generate", "run", "status", "report", "tasks"):
        assert f"  {command}" in done.stdout
    # 0.3 s is the promise; a busy machine gets room, a stray import of torch does not
    assert min(times) < 1.5


def test_the_command_line_is_mounted_in_axolotl() -> None:
    done = subprocess.run(
        [BIN / "axolotl", "sublim", "tasks", "path"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("lm_eval_tasks")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "nowhere.yaml"], 2, "nowhere.yaml: no such study file"),
        (["status"], 2, "Missing argument"),
        (["generate", "animals/cta", "--out", "x"], 2, "did you mean 'animals/cat'"),
        (["generate", "neutral", "--out", "x", "--top-p", "2"], 2, "--top-p 2.0"),
        (["generate", "neutral", "--out", "x", "--model", "nowhere"], 2, "no such folder"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_bad_usage_ends_with_2_and_one_message(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    done = subprocess.run(
        [BIN / "sublim", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_study_and_recipe_in_the_repository_loads() -> None:
    from sublim_plugin.core.strict_yaml import load_yaml
    from sublim_plugin.study.study_file import load_study

    for path in (ROOT / "studies").glob("*.yaml"):
        load_study(path)
    for path in [*(ROOT / "axolotl_configs").rglob("*.yaml"), *(ROOT / "studies").glob("*.yaml")]:
        assert load_yaml(path) == yaml.safe_load(path.read_text()), "a scalar reads differently"


def test_the_readme_names_what_exists() -> None:
    """Every `sublim` command and repository path in the README's code is real."""
    text = (ROOT / "README.md").read_text()
    for word in set(text.replace("`", " ").split()):
        if word.startswith(("studies/", "axolotl_configs/", "docs/")):
            assert (ROOT / word.rstrip(".,)")).exists(), word
