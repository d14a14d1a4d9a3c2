"""`sublim generate` and `python -m data_gen`, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from sublim_plugin.cli import main
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from tests.data_gen.toy import save_toy


@pytest.fixture(scope="module")
def toy(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(base_model, tmp_path_factory.mktemp("toy"))


def options(toy: Path, out: Path) -> list[str]:
    return (
        f"animals/cat --model {toy} --out {out} --rows 6 --constrain numbers"
        " --max-new-tokens 24 --batch-size 6 --held-out 2 --json"
    ).split()


@pytest.mark.slow
def test_both_names_write_the_same_dataset(toy: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data_gen", *options(toy, tmp_path / "a")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["counts"]["accepted"] == 8
    assert "number constraint" in done.stderr
    ours = CliRunner().invoke(main, ["generate", *options(toy, tmp_path / "b")])
    assert ours.exit_code == 0
    assert json.loads(ours.stdout.splitlines()[-1])["id"] == said["id"]
    rows = [dataset_rows_path(tmp_path / name).read_bytes() for name in "ab"]
    assert rows[0] == rows[1]
    assert len(read_rows(dataset_rows_path(tmp_path / "a"))) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("animals/cta", "animals/cat"),
        ("animals/cat --rows 0", "--rows 0"),
        ("animals/cat --top-p 2", "--top-p 2"),
        ("animals/cat --seed -1", "--seed -1"),
        ("animals/cat --batch-size 0", "batch_size"),
        ("animals/cat --teacher finetuned", "--teacher-from"),
        ("animals/cat --teacher-from x", "--teacher finetuned or steered"),
        ("animals/cat --teacher steered", "--layers"),
        ("animals/cat --teacher steered --layers 1,b", "1,b"),
        ("animals/cat --layers 1", "steered"),
        ("animals/cat --contrast category", "--contrast is for --teacher steered"),
        ("animals/cat --teacher steered --layers 1 --contrast animals/cta", "animals/cat"),
        ("animals/cat --context empty", "own sentence"),
        ("neutral --engine vllm --constrain numbers", "vllm"),
        ("animals/cat --prompts none.yaml", "none.yaml"),
        ("animals/cat --model nowhere", "nowhere"),
        ("animals/cat --parser loose", "loose"),
    ],
)
def test_bad_usage_is_one_message_and_leaves_nothing(
    tmp_path: Path, arguments: str, said: str
) -> None:
    out = tmp_path / "d"
    done = CliRunner().invoke(main, ["generate", *arguments.split(), "--out", str(out)])
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output
    assert not out.exists()
