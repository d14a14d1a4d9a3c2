"""The cache of a run folder's numbers: the same table, and no old number after any change."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from synthetic_run import SyntheticRun

from sublim_plugin.analysis import collect as collecting
from sublim_plugin.analysis import seen
from sublim_plugin.analysis import transmission as tabling
from sublim_plugin.analysis.collect import collect
from sublim_plugin.analysis.transmission import TransmissionRow, transmission_table
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SyntheticRun:
    """The quickstart's grid, in a world in which small and fresh folders are cached too."""
    monkeypatch.setattr(seen, "WORTH_IT", 1)
    monkeypatch.setattr(seen, "_SETTLED_NS", -1)
    made = SyntheticRun(tmp_path, n_questions=5)
    made.quickstart()
    return made


def table(run: SyntheticRun) -> tuple[TransmissionRow, ...]:
    return transmission_table(collect(run.root))


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def never(*_: object) -> None:
        raise AssertionError("read again")

    for name in names:
        monkeypatch.setattr(collecting if hasattr(collecting, name) else tabling, name, never)


def test_the_second_time_nothing_large_is_read(
    run: SyntheticRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = table(run)
    (run.root / seen.FOLDER / seen.TABLE).unlink()
    with monkeypatch.context() as patch:
        forbid(patch, "parse_questions", "_read_receipt", "_read")
        second = table(run)
    with monkeypatch.context() as patch:
        forbid(patch, "parse_questions", "_read_receipt", "_read", "_Table")
        third = table(run)
    assert first == second == third and len(first) == 18
    assert [row.model_dump() for row in first] == [row.model_dump() for row in third]
    assert [*third[0].model_dump()] == [*TransmissionRow.model_fields]
    # what the report shows is still there
    records = collect(run.root)
    assert records.students[0].receipt.losses and records.probes[0].results.targets
    lines = (records.probes[0].folder / "questions.jsonl").read_text().splitlines()
    assert [q.model_dump() for q in records.probes[0].questions] == [*map(json.loads, lines)]


def test_a_change_of_one_digit_with_its_times_put_back_is_found(run: SyntheticRun) -> None:
    table(run), table(run)
    for pattern, message in (
        ("probe-*/questions.jsonl", r"questions\.jsonl.*sha256"),
        ("probe-*/results.json", r"results\.json.*sha256"),
        ("student-*/model/sublim_receipt.json", r"receipt\.json.*sha256"),
        ("dataset-*/rows-*.jsonl", r"rows-.*sha256"),
    ):
        path = sorted(run.root.glob(f"cells/{pattern}"))[0]
        data, times = path.read_bytes(), path.stat()
        at = max(data.rfind(digit) for digit in b"123")
        path.write_bytes(data[:at] + b"4" + data[at + 1 :])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert path.stat().st_size == len(data)
        with pytest.raises(InputError, match=message):
            table(run)
        path.write_bytes(data)
        table(run)


def test_a_cell_made_again_with_other_numbers_changes_the_table(run: SyntheticRun) -> None:
    before = table(run), table(run)
    folder = next(iter(sorted(run.root.glob("cells/student-animals-cat-r8*"))))
    path = folder / "model" / "sublim_receipt.json"
    receipt = json.loads(path.read_text())
    receipt["update_norm"]["total"] = 123.0
    path.write_text(json.dumps(receipt))
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    manifest["outputs"]["model/sublim_receipt.json"] = listed
    (folder / "manifest.json").write_text(json.dumps(manifest))
    after = table(run)
    changed = [row for row in after if row.update_norm == 123.0]
    assert {row.method for row in changed} == {"LoRA r=8"} and len(changed) == 3
    assert [r for r in after if r.update_norm != 123.0] == [
        r for r in before[1] if r.student != changed[0].student
    ]


def test_part_of_the_records_is_not_taken_for_the_whole(run: SyntheticRun) -> None:
    whole = table(run)
    table(run)
    records = collect(run.root)
    assert records.table_key is not None
    part = records.model_copy(update={"probes": records.probes[:4]})
    assert part.table_key is None
    assert len(transmission_table(part)) == 4 < len(whole)


def test_a_cell_that_is_gone_is_gone_from_the_table(run: SyntheticRun) -> None:
    table(run), table(run)
    cells = collect(run.root).cells
    fewer = [cell for cell in cells if not cell.folder.name.startswith("probe-base-none")]
    assert len(fewer) < len(cells)
    rows = transmission_table(collect(run.root, fewer))
    assert {row.role for row in rows if row.eval_context == "none"} == {"student", "control"}
    assert all(row.vs_base_logprob is None for row in rows if row.eval_context == "none")


def test_a_damaged_cache_is_no_source(run: SyntheticRun) -> None:
    first = table(run)
    folder = run.root / seen.FOLDER
    (numbers,) = folder.glob("*.f8")
    data = numbers.read_bytes()
    numbers.write_bytes(b"\0" * 8 + data[8:])
    (folder / seen.TABLE).unlink()
    with pytest.raises(InputError, match=r"\.cache|cache is damaged"):
        table(run)
    numbers.write_bytes(data[:-8])
    assert table(run) == first  # read again and written again
    (numbers,) = folder.glob("*.f8")
    numbers.unlink()
    assert table(run) == first
    (folder / seen.INDEX).write_text("{")
    assert table(run) == first
    for text in ('"no key"\n[[1]]', ""):
        (folder / seen.TABLE).write_text(text)
        assert table(run) == first


def test_small_and_fresh_folders_get_no_cache(tmp_path: Path) -> None:
    small = SyntheticRun(tmp_path, n_questions=5)
    small.quickstart()
    table(small)
    assert not (tmp_path / seen.FOLDER).exists()


def test_a_file_changed_just_now_gets_no_seal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "WORTH_IT", 1)
    fresh = SyntheticRun(tmp_path, n_questions=5)
    fresh.quickstart()
    table(fresh)
    assert not (tmp_path / seen.FOLDER).exists()


def test_without_rights_to_write_it_works(
    run: SyntheticRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.root / seen.FOLDER).write_text("in the way")
    assert table(run) == table(run)
