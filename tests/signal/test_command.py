"""`sublim signal` from the command line: files, teachers that moved, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sublim_plugin.cli import main
from sublim_plugin.signal.measure import measure_signal
from sublim_plugin.signal.results import Signal
from sublim_plugin.signal.tables import reading, text
from tests.signal.conftest import ROWS


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, ["signal", *map(str, args), "--limit", "1"])


def edited(dataset: Path, to: Path, change: Any) -> Path:
    """A copy of a dataset with its manifest changed."""
    shutil.copytree(dataset, to)
    manifest = json.loads((to / "manifest.json").read_text())
    change(manifest)
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


@pytest.fixture(scope="module")
def written(toy: Path, of_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("signal") / "new"
    result = run(of_lora, "--model", toy, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_files_table_and_reading(written: tuple[Path, str]) -> None:
    out, said = written
    assert sorted(path.name for path in out.iterdir()) == [
        "signal.csv", "signal.json", "signal.pdf", "signal.png", "signal.svg",
    ]  # fmt: skip
    found = Signal.model_validate_json((out / "signal.json").read_text())
    assert found.where is not None and found.alignments[0].update is not None
    assert f"{ROWS} of {ROWS} rows" in said
    assert f"Reading: {reading(found)}" in said
    assert f"{found.where.overall.measures['number_kl'].mean.value:.4f}" in said
    lines = (out / "signal.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines[1:]} == {"position", "kind", "candidate", "layer"}
    for name in ("first token", "end of turn", "divergent", "layer 1", "cat (the target)"):
        assert f"\n{name} " in said


def test_json_is_the_file_and_leaves_nothing_of_an_earlier_run(
    toy: Path, prompted_cat: Path, tmp_path: Path
) -> None:
    (tmp_path / "signal.pdf").write_text("old")
    result = run(prompted_cat, "--model", toy, "--out", tmp_path, "--rows", 2, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "signal.json").read_text())
    assert found["n_rows"] == 2 and found["n_rows_of"] == ROWS
    assert "prompted teacher" in found["missing"][0]
    assert (tmp_path / "signal.pdf").read_bytes().startswith(b"%PDF")


def test_a_teacher_that_moved(
    toy: Path, of_lora: Path, lora: Path, nearby: Path, tmp_path: Path, written: tuple[Path, str]
) -> None:
    gone = str(tmp_path / "gone")
    dataset = edited(of_lora, tmp_path / "d", lambda m: m["inputs"]["teacher"].update(folder=gone))
    alone = measure_signal(dataset, base=toy, limit=1)
    before = Signal.model_validate_json((written[0] / "signal.json").read_text())
    assert "--teacher-from" in alone.missing[0]
    assert alone.where is None and [one.loss for one in alone.alignments] == ["rows"]
    assert alone.base_logprob == before.base_logprob
    assert alone.alignments[0].candidates == before.alignments[0].candidates
    assert "not measured: log ratio, KL" in text(alone)

    again = measure_signal(dataset, base=toy, limit=1, teacher_from=lora)
    assert again == before.model_copy(update={"dataset": again.dataset})

    result = run(dataset, "--model", toy, "--out", tmp_path / "t", "--teacher-from", nearby)
    assert result.exit_code == 2 and "is not the file of the teacher" in result.output
    assert not (tmp_path / "t").exists()


def test_refusals(toy: Path, base_model: Path, prompted_cat: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for args, message in (
        ((tmp_path, "--out", out), "no manifest"),
        ((prompted_cat, "--out", prompted_cat), "--out"),
        ((prompted_cat, "--out", out, "--model", base_model), "--model"),
        ((prompted_cat, "--out", out, "--model", toy, "--trait", "animals/cta"), "cat"),
        ((prompted_cat, "--out", out, "--model", toy, "--context", "defalt"), "template_default"),
        ((prompted_cat, "--out", out, "--model", toy, "--teacher-from", toy), "prompted"),
    ):
        result = run(*args)
        assert result.exit_code == 2 and message in result.output, result.output

    def served(manifest: Any) -> None:
        manifest["spec"]["trait"] = "neutral"
        manifest["spec"]["engine"] = {"name": "openai", "model": "big"}

    result = run(edited(prompted_cat, tmp_path / "d", served), "--out", out, "--model", toy)
    assert result.exit_code == 2
    assert "nothing can be measured" in result.output and "big" in result.output
    assert not out.exists()
