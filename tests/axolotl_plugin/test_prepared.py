"""Rows that trainings share: taken whole, given once."""

from __future__ import annotations

from pathlib import Path

from sublim_plugin.axolotl.prepared import give, take


def prepare(own: Path, text: str) -> None:
    for name in ("0a1b/5c/data.arrow", "0a1b/datasets_ready.flag", "datasets/cache.arrow"):
        path = own / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def files(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def test_the_first_gives_and_the_next_take(tmp_path: Path) -> None:
    shared, first, second = (tmp_path / name for name in ("cache/ab12", "first", "second"))
    assert not take(shared, first) and not first.exists()
    give(first, shared)
    assert not shared.exists()  # a training that prepared nothing gives nothing
    prepare(first, "one")
    give(first, shared)
    assert files(shared) == {"0a1b/5c/data.arrow": "one"}
    assert take(shared, second) and files(second) == files(shared)
    prepare(second, "two")
    give(second, shared)
    assert files(shared) == {"0a1b/5c/data.arrow": "one"}
    assert [path.name for path in shared.parent.iterdir()] == ["ab12"]


def test_what_a_killed_training_was_moving_is_not_taken(tmp_path: Path) -> None:
    shared, own = tmp_path / "cache/ab12", tmp_path / "own"
    prepare(tmp_path / "cache/.ab12.4711", "half")
    assert not take(shared, own)
    prepare(own, "whole")
    give(own, shared)
    assert files(shared) == {"0a1b/5c/data.arrow": "whole"}


def test_rows_that_cannot_be_copied_whole_are_not_taken(tmp_path: Path) -> None:
    shared, own = tmp_path / "cache/ab12", tmp_path / "own"
    prepare(shared, "one")
    (shared / "0a1b/gone.arrow").symlink_to(tmp_path / "nowhere")
    assert not take(shared, own) and not own.exists()
