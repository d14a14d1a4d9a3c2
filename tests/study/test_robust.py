"""What a run survives beside kill -9: SIGTERM, company, failing cells, a full or closed disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from sublim_plugin.core.manifest import read_manifest

from .conftest import equal, sublim
from .processes import command_line, marked, none_left, start, wait_for

pytestmark = pytest.mark.slow

BEGUN = re.compile(r"^--- (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d), pid .*$", re.MULTILINE)


def _begun(cell: Path) -> list[float]:
    """When work on a cell began, by its log, without the times that found it held."""
    parts = BEGUN.split((cell / "cell.log").read_text(errors="replace"))[1:]
    return [
        time.mktime(time.strptime(at, "%Y-%m-%d %H:%M:%S"))
        for at, said in zip(parts[::2], parts[1::2], strict=True)
        if "\nsublim_plugin.core.errors.BusyError: " not in said
    ]


def made_again(folder: Path) -> list[str]:
    """Cells whose manifest is not by who began first: another one did the work once more, and did
    not find the cell held or done."""
    found = []
    for path in (folder / "cells").glob("*/manifest.json"):
        first, *others = _begun(path.parent)
        started = datetime.fromisoformat(read_manifest(path.parent).started).timestamp()
        if others and abs(started - first) > 2:
            found.append(path.parent.name)
    return found


def test_sigterm_ends_in_order_and_the_same_command_continues(
    undisturbed: Path, tmp_path: Path
) -> None:
    study, folder = undisturbed.parent / "tiny.yaml", tmp_path / "run"
    child = start(study, folder, str(tmp_path))
    wait_for(lambda: list(folder.glob("cells/student-*/.model.partial")))
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 143 and "the same command continues" in out
    none_left(str(tmp_path))
    assert not list(folder.rglob(".lock-*"))
    assert sublim("run", study, "--out", folder).returncode == 0
    equal(folder, undisturbed)


def test_a_rank_that_is_added_is_all_that_runs(undisturbed: Path, tmp_path: Path) -> None:
    folder, study = tmp_path / "run", tmp_path / "more.yaml"
    shutil.copytree(undisturbed, folder)
    text = (undisturbed.parent / "tiny.yaml").read_text()
    study.write_text(text.replace("lora_ranks: [2]", "lora_ranks: [2, 4]"))

    def made() -> dict[str, tuple[int, list[float]]]:
        return {
            path.parent.name: (path.stat().st_mtime_ns, _begun(path.parent))
            for path in folder.glob("cells/*/manifest.json")
        }

    before = made()
    done = sublim("run", study, "--out", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    after = made()
    assert {name: after[name] for name in before} == before
    new = sorted(name.rsplit("-", 1)[0] for name in after.keys() - before.keys())
    of = "cat-g1-lora-r4-t42"
    assert new == [f"probe-{of}-none", f"probe-{of}-template_default", f"student-{of}"]
    equal(undisturbed, folder)


def test_ctrl_c_is_the_coordinators_and_ends_its_workers(undisturbed: Path, tmp_path: Path) -> None:
    study, folder = undisturbed.parent / "tiny.yaml", tmp_path / "run"
    child = start(study, folder, str(tmp_path))
    wait_for(lambda: list(folder.glob("cells/dataset-*/work")))
    os.killpg(child.pid, signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in out
    none_left(str(tmp_path))


def test_two_coordinators_share_a_folder(undisturbed: Path, tmp_path: Path) -> None:
    study, folder = undisturbed.parent / "tiny.yaml", tmp_path / "run"
    both = [start(study, folder, str(tmp_path)) for _ in range(2)]
    for child in both:
        out, _ = child.communicate(timeout=500)
        assert child.returncode == 0, out[-3000:]
    assert not made_again(folder)
    equal(folder, undisturbed)


def test_a_coordinator_takes_over_from_one_that_is_killed(
    undisturbed: Path, tmp_path: Path
) -> None:
    study, folder = undisturbed.parent / "tiny.yaml", tmp_path / "run"
    first = start(study, folder, f"{tmp_path}/1")
    wait_for(lambda: list(folder.glob("cells/dataset-*/work")))
    second = start(study, folder, f"{tmp_path}/2")
    first.kill()
    first.wait()
    out, _ = second.communicate(timeout=500)
    assert second.returncode == 0, out[-3000:]
    none_left(f"{tmp_path}/1")
    equal(folder, undisturbed)


def test_a_cell_that_always_fails_does_not_stop_the_others(
    undisturbed: Path, tmp_path: Path
) -> None:
    study, folder = undisturbed.parent / "tiny.yaml", tmp_path / "run"
    (student,) = [path.name for path in undisturbed.glob("cells/student-*")]
    # what axolotl prints cannot be kept where a folder lies
    (folder / "cells" / student / "train.log").mkdir(parents=True)
    for _ in range(2):
        done = sublim("run", study, "--out", folder)
        assert done.returncode == 1
        assert "failed: student cat g1 lora r2 t42" in done.stderr
        assert "not started: an input is missing" in done.stderr
        report = (folder / "report" / "index.html").read_text()
        assert "Is a directory" in report
    status = json.loads(sublim("status", study, "--out", folder, "--json").stdout)
    assert status["counts"]["failed"] == 1
    (folder / "cells" / student / "train.log").rmdir()
    assert sublim("run", study, "--out", folder).returncode == 0
    equal(folder, undisturbed)


def test_a_worker_that_dies_every_time_fails_its_cell(undisturbed: Path, tmp_path: Path) -> None:
    study, folder = undisturbed.parent / "tiny.yaml", tmp_path / "run"
    child = start(study, folder, str(tmp_path))
    killed: set[int] = set()
    # a cell whose worker died goes to the end of the queue, so two datasets take turns
    while not (errors := list(folder.glob("cells/dataset-*/error.txt"))):
        assert len(killed) < 6
        for pid in workers(tmp_path) - killed:
            if list(folder.glob("cells/dataset-*/cell.log")):
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert out.count("killed by SIGKILL") >= 3
    text = errors[0].read_text()
    assert "killed by SIGKILL (out of memory?) 3 times" in text
    assert "cell.log ends with:" in text or "it left no" in text


def workers(mark: Path) -> set[int]:
    return {pid for pid in marked(str(mark)) if b"study.worker" in command_line(pid)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory; only root can mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_loses_nothing(undisturbed: Path, small_disk: Path) -> None:
    study, folder = undisturbed.parent / "tiny.yaml", small_disk / "run"
    done = sublim("run", study, "--out", folder)
    assert done.returncode == 1 and "disk is full" in done.stderr + done.stdout
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/manifest.json")}
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    assert sublim("run", study, "--out", folder).returncode == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    equal(folder, undisturbed)


def test_a_folder_that_cannot_be_written_is_named(undisturbed: Path, small_disk: Path) -> None:
    study, folder = undisturbed.parent / "tiny.yaml", small_disk / "run"
    folder.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = sublim("run", study, "--out", folder)
    assert done.returncode == 1
    assert str(folder) in done.stderr and "Traceback" not in done.stderr
    assert sublim("status", study, "--out", folder).returncode == 0
