"""`sublim status`: counted in a large study, listed in a small one, and why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sublim_plugin.cli import main
from sublim_plugin.core import read_ahead as ahead
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.study import reasons as reasons_module
from sublim_plugin.study.reasons import Reasons
from sublim_plugin.study.state import cell_state

from .fake_run import cells_of, finish, write_study

SEEDS: dict[str, Any] = {"datasets__generation_seeds": [1, 2, 3]}


def status(study: Path, run_dir: Path, *options: str) -> str:
    done = CliRunner().invoke(main, ["status", str(study), "--out", str(run_dir), *options])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_dataset_whose_replies_are_being_gathered_is_running(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path), tmp_path / "run"
    dataset = next(cell for cell in cells_of(study) if cell.kind == "dataset")
    with cell_lock(dataset.folder(run_dir) / "work"):
        assert cell_state(dataset, run_dir).state == "running"
    assert cell_state(dataset, run_dir).state == "missing"


def test_a_large_study_is_counted_by_kind_and_axis(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path, **SEEDS), tmp_path / "run"
    cells = cells_of(study)
    for cell in cells:
        if cell.kind != "probe" or not cell.spec["student"]:
            finish(cell, run_dir)
    broken = next(cell for cell in cells if cell.kind == "probe" and cell.spec["student"])
    broken.folder(run_dir).mkdir()
    (broken.folder(run_dir) / "error.txt").write_text("out of memory\nmore\n")
    (broken.folder(run_dir) / "cell.log").write_text("…")
    lines = status(study, run_dir).splitlines()
    assert len(lines) < 30 < len(cells)
    assert lines[0].split() == ["done", "running", "failed", "missing"]
    table = {line.split()[0]: line.split()[1:] for line in lines[1:] if line[:1].strip()}
    assert table["dataset"] == ["6", "-", "-", "-"] and table["student"] == ["15", "-", "-", "-"]
    assert table["probe"] == ["3", "-", "1", "44"]
    methods = [line for line in lines if line.strip().startswith("method")]
    assert methods[0].split(maxsplit=1)[1] == "lora r2 3/3, lora r8 6/6, lora r64 3/3, full 3/3"
    assert methods[1].split(maxsplit=1)[1] == "lora r2 0/9, lora r8 0/18, lora r64 0/9, full 0/9"
    at = lines.index(f"failed: probe {broken.label}: out of memory")
    assert lines[at + 1].strip() == str(broken.folder(run_dir) / "cell.log")
    assert lines[-1] == "24 done, 1 failed, 44 missing"
    assert len(status(study, run_dir, "--cells").splitlines()) == len(cells) + 2 + 1
    found = json.loads(status(study, run_dir, "--json"))
    assert found["counts"] == {"done": 24, "running": 0, "failed": 1, "missing": 44}
    (failed,) = [row for row in found["cells"] if row["state"] == "failed"]
    assert failed["log"].endswith("cell.log") and len(found["cells"]) == len(cells)


def test_a_small_study_is_listed(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path), tmp_path / "run"
    finish(cells_of(study)[0], run_dir)
    lines = status(study, run_dir, "--why").splitlines()
    assert lines[0].split() == ["done", "dataset", "cat", "g1"]
    assert lines[1].split()[0] == "missing" and lines[2].strip() == "not made yet"
    assert lines[-1] == "1 done, 24 missing"


def test_the_input_that_changed_is_named_down_the_chain(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path), tmp_path / "run"
    for cell in cells_of(study):
        finish(cell, run_dir)
    write_study(tmp_path, datasets__sampler__temperature=0.7)
    cells = cells_of(study)
    reasons = Reasons(cells, run_dir)
    told = {cell.label: reasons.why(cell_state(cell, run_dir)) for cell in cells}
    change = "sampler.temperature: 1.0 → 0.7"
    assert told["cat g1"].endswith(f": {change}")
    assert told["cat g1 lora r8 t42"].endswith(f": dataset.{change}")
    assert told["cat g1 lora r8 t42 none"].endswith(f": student.dataset.{change}")
    # of several that are equally near, the one with the same label
    assert told["cat g1 lora r8 t42"].startswith("changed since student-cat-g1-lora-r8-t42-")
    assert told["base none"] == "done"
    # with another label too: what differs below the ids finds the right one
    write_study(tmp_path, datasets__sampler__temperature=0.7, training__seeds=[7])
    cells = cells_of(study)
    told = {c.label: Reasons(cells, run_dir).why(cell_state(c, run_dir)) for c in cells[-3:]}
    assert told["neutral g1 lora r8 t7 none"].endswith(
        f": student.dataset.{change}; student.training_seed: 42 → 7"
    )
    # and a large study says it once for all cells of a kind
    for seeds in ([1], [1, 2, 3]):
        write_study(tmp_path, datasets__generation_seeds=seeds, datasets__sampler__temperature=0.7)
    grouped = status(study, run_dir, "--why")
    assert f"dataset: 2 cells: changed: {change}\n" in grouped
    assert len(grouped.splitlines()) < 40


def test_a_stale_manifest_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, run_dir = write_study(tmp_path), tmp_path / "run"
    for cell in cells_of(study):
        finish(cell, run_dir)
    write_study(tmp_path, training__seeds=[7], datasets__rows=65)
    read: list[str] = []
    real = reasons_module.find_manifest
    monkeypatch.setattr(
        reasons_module, "find_manifest", lambda folder: read.append(folder.name) or real(folder)
    )
    cells = cells_of(study)
    states = [cell_state(cell, run_dir) for cell in cells]
    reasons = Reasons(cells, run_dir)
    told = {state.cell.label: reasons.why(state) for state in states}
    assert len(read) == len(set(read)) == 25 - 3
    assert "dataset.rows: 64 → 65; training_seed: 42 → 7" in told["cat g1 lora r8 t7"]


def test_the_commands_cost_nothing_until_they_run() -> None:
    script = (
        "import sys, time\nbegan = time.perf_counter()\nfrom click.testing import CliRunner\n"
        "from sublim_plugin.cli import main\nprint(CliRunner().invoke(main, ['--help']).output)\n"
        "print('pydantic' in sys.modules, 'sublim_plugin.study' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "False False"
    for command in ("run", "status", "report", "gc"):
        (line,) = [line for line in lines if line.startswith(f"  {command} ")]
        assert len(line.split()) > 4
        shown = CliRunner().invoke(main, [command, "--help"])
        assert shown.exit_code == 0 and f"Usage: main {command} " in shown.output


def test_reading_ahead_reads_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(tmp_path / f"{n}") for n in range(400)]
    for path in paths[:-1]:
        Path(path).write_text("x")
    read: list[str] = []
    real = ahead._read
    monkeypatch.setattr(ahead, "_read", lambda path: read.append(path) or real(path))
    monkeypatch.setattr(ahead, "SLOW_S", 10.0)
    ahead.read_ahead(paths)
    assert len(read) < 40  # in memory: a few are tried
    monkeypatch.setattr(ahead, "SLOW_S", 0.0)
    ahead.read_ahead(paths)
    assert set(read) == set(paths)  # the missing one is passed over
