"""`sublim tasks validate`."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from sublim_plugin.cli import main as sublim
from sublim_plugin.lm_eval_hook import tasks_folder

TASK = (Path(tasks_folder()) / "animals" / "subliminal_cat.yaml").read_text()
CLASS = (Path(tasks_folder()) / "animals" / "task.py").read_text()


def validate(*folder: Path):
    return CliRunner().invoke(sublim, ["tasks", "validate", *map(str, folder)])


def folder_of(tmp_path: Path, text: str = TASK) -> Path:
    (tmp_path / "task.py").write_text(CLASS)
    (tmp_path / "mine.yaml").write_text(text)
    return tmp_path


def test_ours_are_valid():
    done = validate()
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("468 tasks in ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: [subliminal_x\n", "mine.yaml: not valid YAML"),
        (TASK.replace("task: subliminal_cat\n", ""), "mine.yaml: a class without a task name"),
        (TASK.replace("animals/cat", "animals/cta"), "mine.yaml: InputError: unknown trait"),
        (TASK.replace("context: template_default", "context: vacuum"), "'vacuum' is not a context"),
        (TASK.replace("task.SubliminalTask", "task.Missing"), "mine.yaml: AttributeError"),
        (TASK + "colour: red\n", "mine.yaml: TypeError"),
        ("- a\n", "mine.yaml: expected a mapping"),
        ("category: fruits\n", "holds no task"),
    ],
)
def test_the_file_that_is_wrong_is_named(tmp_path, text, said):
    done = validate(folder_of(tmp_path, text))
    assert done.exit_code == 2
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_name_that_two_files_have(tmp_path):
    (folder_of(tmp_path) / "other.yaml").write_text(TASK)
    done = validate(tmp_path)
    assert done.exit_code == 2
    assert "other.yaml: task: 'subliminal_cat' is also the name in" in done.stderr


def test_a_file_that_everybody_may_write(tmp_path):
    (folder_of(tmp_path) / "task.py").chmod(0o666)
    done = validate(tmp_path)
    assert done.exit_code == 2 and "task.py: everybody may write here" in done.stderr
    (tmp_path / "task.py").chmod(0o644)
    assert validate(tmp_path).stdout == f"1 tasks in {tmp_path} are valid\n"


def test_no_folder(tmp_path):
    done = validate(tmp_path / "nowhere")
    assert done.exit_code == 2 and "nowhere: no such folder" in done.stderr
