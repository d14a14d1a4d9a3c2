"""What does not fit is refused, with the path."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import SyntheticRun

from sublim_plugin.analysis.collect import CellRef, collect, error_text, read_replies, scan
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file


@pytest.fixture
def run(tmp_path: Path) -> SyntheticRun:
    return SyntheticRun(tmp_path)


def rewrite(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a cell and, as a careless editor would, its manifest's hash."""
    path = folder / name
    if name.endswith(".jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    rehash(folder, name)


def rehash(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / name
    manifest["outputs"][name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_quickstart_is_read_whole(run: SyntheticRun) -> None:
    run.quickstart()
    records = collect(run.root, run.cells)
    assert (len(records.datasets), len(records.students), len(records.probes)) == (2, 5, 18)
    assert collect(run.root).probes and len(scan(run.root)) == len(run.cells)
    assert records.students[0].receipt.losses[0].step == 1


def test_an_empty_run_has_no_records(tmp_path: Path) -> None:
    assert collect(tmp_path / "never-made").cells == ()


def test_scan_tells_unfinished_from_done(run: SyntheticRun) -> None:
    run.probe(None, "none")
    (run.root / "cells" / "probe-half").mkdir()
    assert sorted(cell.state for cell in scan(run.root)) == ["done", "unfinished"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "probe"}'])
def test_garbled_manifest(run: SyntheticRun, text: str) -> None:
    folder = run.probe(None, "none")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=re.escape(str(folder / "manifest.json"))):
        collect(run.root)


def test_done_cell_without_manifest(run: SyntheticRun) -> None:
    folder = run.root / "cells" / "probe-gone"
    folder.mkdir(parents=True)
    with pytest.raises(InputError, match="probe-gone"):
        collect(run.root, [(folder, "done")])


def test_questions_changed_after_the_manifest(run: SyntheticRun) -> None:
    folder = run.probe(None, "none")
    path = folder / "questions.jsonl"
    path.write_text(path.read_text().replace("animal 0", "animal 9"))
    with pytest.raises(InputError, match=r"questions\.jsonl"):
        collect(run.root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [], "no questions"),
        (lambda rows: rows[:-1], "49 questions, but results.json says 50"),
        (lambda rows: [rows[0], *rows[:-1]], "question_id 0 appears more than once"),
        (lambda rows: [{**rows[0], "logprobs": {"cat": float("nan")}}], "not a log-probability"),
        (lambda rows: [{**rows[0], "logprobs": {"cat": 0.5}}], "not a log-probability"),
        (lambda rows: [{**rows[0], "logprobs": {}}], "no candidate"),
        (lambda rows: [*rows[:-1], {**rows[-1], "logprobs": {"cat": -1.0}}], "other candidates"),
    ],
)
def test_questions_that_do_not_fit(
    run: SyntheticRun, change: Callable[[Any], Any], message: str
) -> None:
    folder = run.probe(None, "none")
    rewrite(folder, "questions.jsonl", change)
    with pytest.raises(InputError, match=rf"questions\.jsonl.*{message}"):
        collect(run.root)


def test_garbled_line_is_named(run: SyntheticRun) -> None:
    folder = run.probe(None, "none")
    path = folder / "questions.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:40]
    path.write_text("\n".join(lines))
    rehash(folder, "questions.jsonl")
    with pytest.raises(InputError, match=r"questions\.jsonl:3"):
        collect(run.root)


def test_student_without_receipt(run: SyntheticRun) -> None:
    run.student(run.dataset("animals/cat"), "animals/cat", 8, receipt=False)
    with pytest.raises(InputError, match=r"sublim_receipt\.json"):
        collect(run.root)


def test_receipt_changed_after_the_manifest(run: SyntheticRun) -> None:
    run.student(run.dataset("animals/cat"), "animals/cat", 8)
    (path,) = run.root.glob("cells/student-*/model/sublim_receipt.json")
    path.write_text(path.read_text().replace('"steps": 30', '"steps": 31'))
    with pytest.raises(InputError, match=r"sublim_receipt\.json"):
        collect(run.root)


def test_student_trained_on_other_rows(run: SyntheticRun) -> None:
    run.student(run.dataset("animals/cat"), "animals/cat", 8)
    (folder,) = run.root.glob("cells/student-*")

    def swap(receipt: Any) -> Any:
        receipt["dataset"]["sha256"] = "f" * 64
        return receipt

    rewrite(folder, "model/sublim_receipt.json", swap)
    with pytest.raises(InputError, match="not the rows file"):
        collect(run.root)


def test_student_of_another_trait_than_its_dataset(run: SyntheticRun) -> None:
    run.student(run.dataset("animals/cat"), "animals/owl", 8)
    with pytest.raises(InputError, match="trait is 'animals/owl'"):
        collect(run.root)


def test_last_lines_of_a_failure(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("\n".join(f"line {i}" for i in range(40)))
    text = error_text(CellRef(folder=tmp_path, state="failed"))
    assert text.splitlines()[-1] == "line 39"
    assert len(text.splitlines()) == 12
    told = CellRef(folder=tmp_path, state="failed", error="out of disk")
    assert error_text(told) == "out of disk"
    assert error_text(CellRef(folder=tmp_path / "never", state="missing")) == ""


def test_replies_are_limited(run: SyntheticRun) -> None:
    folder = run.probe(None, "none", replies=["a", "b", "c"])
    assert read_replies(folder, 2) == [("q", "a"), ("q", "b")]
    assert read_replies(run.root, 2) == []
