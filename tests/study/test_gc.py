"""`sublim gc`: what goes, and above all what stays."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from sublim_plugin.cli import main
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.core.manifest import verify
from sublim_plugin.study.gc import find, remove
from sublim_plugin.study.state import cell_state

from .fake_run import cells_of, finish, write_study


def write(path: Path, size: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def found(study: Path, run_dir: Path) -> dict[str, str]:
    return {i.path: i.what for i in find(cells_of(study), run_dir, ids_known=True)}


def test_a_finished_student_keeps_what_its_manifest_names(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path), tmp_path / "run"
    cell = next(cell for cell in cells_of(study) if cell.kind == "student")
    listed = {"model/model.safetensors": b"w", "model/optimizer.pt": b"o"}
    folder = finish(cell, run_dir, listed)
    write(folder / "model" / "checkpoint-3" / "optimizer.pt", 1000)
    write(folder / "model" / "global_step3" / "state.pt", 500)
    write(folder / "model" / "rng_state_0.pth")
    write(folder / "model" / "merged" / "model.safetensors", 2000)
    write(folder / ".model.partial" / "checkpoint-1" / "x")
    write(folder / ".model.prepared" / "x")
    write(folder / "log.txt")
    items = find(cells_of(study), run_dir, ids_known=True)
    name = folder.name
    assert {item.path: item.what for item in items} == {
        f"cells/{name}/.model.partial": "unfinished",
        f"cells/{name}/.model.prepared": "unfinished",
        f"cells/{name}/model/checkpoint-3": "checkpoint",
        f"cells/{name}/model/global_step3": "optimizer",
        f"cells/{name}/model/merged": "merged copy",
        f"cells/{name}/model/rng_state_0.pth": "optimizer",
    }
    assert sum(item.bytes for item in items) == 1000 + 500 + 10 + 2000 + 10 + 10
    assert remove(items, run_dir) == items
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {*listed, "manifest.json", "log.txt"} <= left
    assert not any("checkpoint" in path or "merged" in path for path in left)
    assert verify(folder) and cell_state(cell, run_dir).state == "done"


def test_an_unfinished_student_keeps_what_it_goes_on_from(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path), tmp_path / "run"
    first, second = [cell for cell in cells_of(study) if cell.kind == "student"][:2]
    kept = write(first.folder(run_dir) / ".model.partial" / "checkpoint-4" / "weights")
    write(first.folder(run_dir) / ".model.prepared" / "x")
    write(second.folder(run_dir) / ".model.partial" / "config.json")
    dataset = write(cells_of(study)[0].folder(run_dir) / "work" / "replies.jsonl")
    assert set(found(study, run_dir)) == {
        f"cells/{first.folder_name}/.model.prepared",
        f"cells/{second.folder_name}/.model.partial",
    }
    remove(find(cells_of(study), run_dir, ids_known=True), run_dir)
    assert kept.is_file() and dataset.is_file()


def test_orphans_go_unless_somebody_works_on_them(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path), tmp_path / "run"
    for cell in cells_of(study)[:3]:
        finish(cell, run_dir)
    write_study(tmp_path, datasets__generation_seeds=[2])
    orphans = {f"cells/{path.name}" for path in (run_dir / "cells").iterdir()}
    write(run_dir / "cells" / "my notes" / "x")
    assert found(study, run_dir) == dict.fromkeys(orphans, "orphan")
    # until the base model is prepared no id is known, and no cell an orphan
    assert find(cells_of(study), run_dir, ids_known=False) == []
    items = find(cells_of(study), run_dir, ids_known=True)
    held = run_dir / items[0].path
    with cell_lock(held):
        assert items[0].path not in found(study, run_dir)
        # begun after the list was made
        removed = remove(items, run_dir)
    assert [item.path for item in removed] == [item.path for item in items[1:]]
    assert (held / "manifest.json").is_file() and (run_dir / "cells" / "my notes").is_dir()


def test_nothing_outside_the_run_folder_is_touched(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path), tmp_path / "run"
    outside = write(tmp_path / "outside" / "checkpoint-1" / "precious")
    cell = next(cell for cell in cells_of(study) if cell.kind == "student")
    folder = finish(cell, run_dir)
    (folder / "checkpoint-9").symlink_to(outside.parent, target_is_directory=True)
    (folder / "elsewhere").symlink_to(outside.parents[1], target_is_directory=True)
    inside = run_dir / "cells"
    (inside / "probe-x-0123456789ab").symlink_to(outside.parents[1], target_is_directory=True)
    orphan = inside / "probe-y-0123456789ab"
    orphan.mkdir()
    (orphan / "link").symlink_to(outside.parents[1], target_is_directory=True)
    assert found(study, run_dir) == {"cells/probe-y-0123456789ab": "orphan"}
    remove(find(cells_of(study), run_dir, ids_known=True), run_dir)
    assert outside.read_bytes() == b"x" * 10 and not orphan.exists()
    assert (folder / "checkpoint-9").is_symlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "cells").symlink_to(inside, target_is_directory=True)
    with pytest.raises(InputError, match="symbolic link"):
        find(cells_of(study), elsewhere, ids_known=True)


def test_temporary_files_go_when_they_are_old(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path), tmp_path / "run"
    folder = finish(cells_of(study)[0], run_dir)
    old, new = (write(folder / f".tmp-manifest.json.{n}.ab") for n in (1, 2))
    os.utime(old, (time.time() - 7200,) * 2)
    assert found(study, run_dir) == {f"cells/{folder.name}/{old.name}": "temporary"}
    remove(find(cells_of(study), run_dir, ids_known=True), run_dir)
    assert new.is_file() and not old.exists()


def test_tokenized_rows_that_students_shared_go(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path), tmp_path / "run"
    finish(cells_of(study)[0], run_dir)
    write(run_dir / ".cache/prepared/0a1b2c3d4e5f/x/data.arrow")
    kept = write(run_dir / ".cache/table")
    assert found(study, run_dir) == {".cache/prepared/0a1b2c3d4e5f": "prepared"}
    remove(find(cells_of(study), run_dir, ids_known=True), run_dir)
    assert kept.is_file() and not [*(run_dir / ".cache/prepared").iterdir()]


def test_the_command_shows_first_and_removes_when_told(tmp_path: Path) -> None:
    study, run_dir = write_study(tmp_path), tmp_path / "run"
    cell = next(cell for cell in cells_of(study) if cell.kind == "student")
    big = write(finish(cell, run_dir) / "model" / "checkpoint-3" / "x", 2_500_000)

    def gc(*options: str) -> str:
        done = CliRunner().invoke(main, ["gc", str(study), "--out", str(run_dir), *options])
        assert done.exit_code == 0, done.output
        return done.output

    shown = gc()
    assert "2.5 MB  checkpoint" in shown and "add --yes" in shown and big.is_file()
    listed = json.loads(gc("--json"))
    assert listed["removed"] is False and listed["bytes"] == 2_500_000 and big.is_file()
    assert "removed" in gc("--yes") and not big.exists()
    assert "nothing to remove" in gc("--yes")
