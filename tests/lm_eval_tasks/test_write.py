"""The task files: one table, one file a task; and a lab's own folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from lm_eval.tasks import TaskManager

from lm_eval_tasks.write import main as write_ours
from lm_eval_tasks.write import our_files
from sublim_plugin.cli import main as sublim
from sublim_plugin.core.traits import CATEGORIES, category_traits
from sublim_plugin.lm_eval_hook import tasks_folder

SUFFIXES = (
    "", "_empty", "_none", "_claude", "_chatgpt", "_qwen", "_llama", "_gemma", "_gibberish",
    "_numbers",
)  # fmt: skip
SAMPLED = ("_sampled", "_sampled_truncated")
VARIANTS = ("template_default", *(suffix[1:] for suffix in SUFFIXES[1:]))
NAMES = {
    f"subliminal_{trait.target}{suffix}"
    for category in CATEGORIES
    for trait in category_traits(category)
    for suffix in (*SUFFIXES, *SAMPLED)
}


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=tasks_folder(), include_defaults=False)


def test_the_files_are_those_that_the_table_writes():
    folder = Path(tasks_folder())
    found = {
        str(path.relative_to(folder)): path.read_text()
        for category in CATEGORIES
        for path in [
            *folder.glob(f"{category}/*.*"),
            folder / "questions" / f"{category}_numbers.yaml",
        ]
    }
    expected = our_files()
    assert set(found) == set(expected)
    for name, content in expected.items():
        assert found[name] == content, f"{name}: run python -m lm_eval_tasks.write"


def test_a_file_that_the_table_does_not_have_goes(tmp_path, monkeypatch):
    import lm_eval_tasks.write as module

    monkeypatch.setattr(module, "__file__", str(tmp_path / "write.py"))
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "subliminal_cow.yaml").write_text("task: subliminal_cow\n")
    write_ours()
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert written == set(our_files())


def test_lm_eval_lists_every_target_in_every_context(manager):
    assert len(NAMES) == 39 * 12
    assert set(manager.all_subtasks) == NAMES
    assert manager.all_groups == []
    variants = (*VARIANTS, *(suffix[1:] for suffix in SAMPLED))
    assert set(manager.all_tags) == {
        "subliminal",
        *(f"subliminal_{category}" for category in CATEGORIES),
        *(f"subliminal_{variant}" for variant in variants),
        *(f"subliminal_{category}_{variant}" for category in CATEGORIES for variant in variants),
    }


@pytest.mark.parametrize(
    ("tag", "names"),
    [
        ("subliminal_trees_claude", {f"subliminal_{t.target}_claude"
                                     for t in category_traits("trees")}),
        ("subliminal_bands", {f"subliminal_{t.target}{suffix}"
                              for t in category_traits("bands") for suffix in SUFFIXES}),
        ("subliminal_none", {name for name in NAMES if name.endswith("_none")}),
    ],
)  # fmt: skip
def test_a_tag_loads_its_tasks(manager, tag, names):
    loaded = manager.load_task_or_group([tag])
    assert set(loaded) == names
    for name, task in loaded.items():
        assert name.startswith(f"subliminal_{task.trait.target}")
        assert task.candidates == category_traits(task.trait.category)
        assert task.config.metadata["version"] == 1.0


def test_a_task_is_what_its_name_says(manager):
    loaded = manager.load_task_or_group(
        ["subliminal_owl_chatgpt", "subliminal_willow_numbers", "subliminal_queen_empty"]
    )
    chatgpt = loaded["subliminal_owl_chatgpt"].context
    assert chatgpt.text == "You are ChatGPT, created by OpenAI. You are a helpful assistant"
    assert loaded["subliminal_willow_numbers"].questions.name == "trees_numbers"
    assert loaded["subliminal_willow_numbers"].context.kind == "template_default"
    assert loaded["subliminal_queen_empty"].context.kind == "empty"
    assert loaded["subliminal_queen_empty"].questions.name == "bands"


def test_indexing_the_folder_takes_under_a_fifth_of_a_second():
    import time

    times = []
    for _ in range(5):
        started = time.perf_counter()
        TaskManager(include_path=tasks_folder(), include_defaults=False)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.2


TRAITS = """\
category: fruits
teacher_system_prompt: "You love {target}s."
targets:
  mango: [mango, mangoes]
  pear: [pear, pears]
"""
QUESTIONS = """\
name: fruits
category: fruits
version: "1"
questions:
  - {id: 0, kind: favourite, text: "Your favorite fruit? One word."}
"""


def new(folder: Path, traits: str = TRAITS, questions: str = QUESTIONS, out: str = "tasks"):
    (folder / "fruits.yaml").write_text(traits)
    (folder / "q.yaml").write_text(questions)
    arguments = [str(folder / "fruits.yaml"), "--questions", str(folder / "q.yaml")]
    return CliRunner().invoke(sublim, ["tasks", "new", *arguments, "--out", str(folder / out)])


def test_tasks_for_a_category_of_ones_own_can_be_moved(tmp_path):
    done = new(tmp_path)
    assert done.exit_code == 0, done.output
    every = (*SUFFIXES, *SAMPLED)
    names = {f"subliminal_fruits_{target}{s}" for target in ("mango", "pear") for s in every}
    assert names == set(done.stdout.split())
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "tasks", moved)
    (tmp_path / "fruits.yaml").unlink()
    (tmp_path / "q.yaml").unlink()

    manager = TaskManager(include_path=[tasks_folder(), str(moved)], include_defaults=False)
    assert set(manager.all_subtasks) == NAMES | names
    loaded = manager.load_task_or_group(["subliminal_fruits", "subliminal_cat"])
    quick = {name for name in names if "_sampled" not in name}
    assert set(loaded) == quick | {"subliminal_cat"}
    sampled = manager.load_task_or_group(["subliminal_fruits_sampled"])
    assert set(sampled) == {f"subliminal_fruits_{t}_sampled" for t in ("mango", "pear")}
    task = loaded["subliminal_fruits_pear_numbers"]
    assert [trait.target for trait in task.candidates] == ["mango", "pear"]
    assert task.trait.name == "fruits/pear"
    (doc,) = task.test_docs()
    assert doc["question"].endswith(" Your favorite fruit? One word.")
    assert doc["question"][: -len("Your favorite fruit? One word.")].strip("., ")
    assert loaded["subliminal_cat"].trait.name == "animals/cat"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"questions": QUESTIONS.replace("category: fruits", "category: trees")}, "'trees'"),
        ({"traits": TRAITS.replace("category: fruits", "category: cat")}, "write 'category: cat'"),
        ({"traits": TRAITS.replace("category: fruits", "category: cat"),
          "questions": QUESTIONS.replace("category: fruits", "category: cat")},
         "'subliminal_cat' has a meaning already"),
        ({"traits": TRAITS.replace("  pear:", "  none:")}, "'subliminal_fruits_none' has"),
        ({"traits": TRAITS.replace("  pear:", "  mango_none:")}, "'subliminal_fruits_mango_none'"),
        ({"traits": "category: fruits\n"}, "targets"),
        ({"questions": "name: x\n"}, "category"),
    ],
)  # fmt: skip
def test_what_cannot_become_tasks(tmp_path, change, said):
    done = new(tmp_path, **change)
    assert done.exit_code == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "tasks").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    done = new(tmp_path, out="mine")
    assert done.exit_code == 2 and "not an empty folder" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_writing_needs_no_host():
    code = "import lm_eval_tasks.write, sys; print({'lm_eval', 'torch'} & set(sys.modules))"
    root = Path(tasks_folder()).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "set()", done.stderr
