"""The start-up hook, each time in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import sublim_plugin.lm_eval_hook as hook

ROOT = str(Path(hook.__file__).parents[1])


PACKAGES = [path for path in sys.path if path.endswith("site-packages")]


def python(code: str, *options: str, **environment: str) -> str:
    """Run without start-up hooks (`-S` skips .pth files), so that only the code imports ours."""
    result = subprocess.run(
        [sys.executable, *(options or ("-S",)), "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([ROOT, *PACKAGES]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


FIND = """
import sys
{first}
from lm_eval.tasks import TaskManager
{second}
manager = TaskManager({arguments})
print("subliminal_cat" in manager.all_tasks, "subliminal" in manager.all_tags)
"""
IMPORT = "import sublim_plugin.lm_eval_hook as hook"


def found(first: str = "", second: str = "", arguments: str = "", **environment: str) -> bool:
    code = FIND.format(first=first, second=second, arguments=arguments)
    return python(code, **environment).split()[-2:] == ["True", "True"]


def test_tasks_are_found_whenever_the_hook_was_imported():
    assert found(first=IMPORT)
    assert found(second=IMPORT)
    assert not found(first=IMPORT, arguments="include_defaults=False")
    assert not found(first=IMPORT, SUBLIM_NO_LM_EVAL_HOOK="1")


def test_the_installed_hook_needs_no_import():
    code = FIND.format(first="", second="", arguments="")
    assert python(code, "-I").split()[-2:] == ["True", "True"]
    off = python(code, "-W", "ignore", SUBLIM_NO_LM_EVAL_HOOK="1")
    assert off.split()[-2:] == ["False", "False"]


def test_users_paths_are_kept_after_ours():
    ours = hook.tasks_folder()
    assert hook._with_ours(None) == [ours]
    assert hook._with_ours("mine") == [ours, "mine"]
    assert hook._with_ours(["mine", "yours"]) == [ours, "mine", "yours"]
    assert hook._with_ours([ours]) == [ours]


def test_it_leaves_when_done_and_touches_nothing_else():
    code = f"""
import os, sys
before = list(sys.meta_path)
modules = set(sys.modules)
{IMPORT}
print(sorted(set(sys.modules) - modules))
print([f for f in sys.meta_path if f not in before])
import lm_eval.tasks
print(sys.meta_path[:len(before)] == before or hook._Finder not in sys.meta_path)
"""
    lines = python(code).splitlines()
    assert lines[0] == "['sublim_plugin', 'sublim_plugin.lm_eval_hook']"
    assert "_Finder" in lines[1]
    assert lines[2] == "True"


def test_errors_are_silent_and_the_host_works():
    code = f"""
{IMPORT}
hook.tasks_folder = lambda: 1 / 0
import lm_eval.tasks
print(lm_eval.tasks.TaskManager(include_defaults=False).all_tasks)
"""
    assert python(code).splitlines()[-1] == "[]"


def test_a_task_manager_of_another_shape_is_called_as_it_was():
    code = f"""
{IMPORT}
import types
class TaskManager:
    def __init__(self, index): self.index = index
module = types.ModuleType("lm_eval.tasks")
module.TaskManager = TaskManager
hook.patch(module)
print(TaskManager("x").index, TaskManager(index="y").index)
"""
    assert python(code).split()[-2:] == ["x", "y"]


def test_void_once_lm_eval_knows_entry_points():
    code = f"""
{IMPORT}
import types
class TaskManager:
    def __init__(self, verbosity=None, include_path=None): self.path = include_path
module = types.ModuleType("lm_eval.tasks")
module.TaskManager, module.load_entry_points = TaskManager, None
hook.patch(module)
print(TaskManager().path)
"""
    assert python(code).split()[-1] == "None"


def test_start_costs_less_than_a_millisecond(tmp_path):
    code = f"""
import os, time
start = time.perf_counter()
{IMPORT}
print(time.perf_counter() - start)
"""
    # pip compiles what it installs; a checkout may be told not to.
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    assert min(float(python(code, **compiled)) for _ in range(10)) < 1e-3


def test_the_pth_file_is_one_import():
    lines = (Path(__file__).parents[2] / "sublim.pth").read_text().splitlines()
    assert lines == ["import sublim_plugin.lm_eval_hook"]
