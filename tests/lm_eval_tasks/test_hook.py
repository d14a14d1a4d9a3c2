"""The start-up hook, each time in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import sublim_plugin.lm_eval_hook as hook

ROOT = str(Path(hook.__file__).parents[1])
ROOT_OF_TESTS = Path(__file__).parents[2]


PTH = (ROOT_OF_TESTS / "sublim.pth").read_text()


PACKAGES = [path for path in sys.path if path.endswith("site-packages")]


def python(code: str, *options: str, **environment: str) -> str:
    """Run without start-up hooks (`-S` skips .pth files), so that only the code imports ours."""
    result = subprocess.run(
        [sys.executable, *(options or ("-S",)), *(("-c", code) if code else ())],
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


def test_the_runs_metadata_reaches_the_tasks_without_the_hook():
    code = """
from lm_eval.tasks import TaskManager
import sys
manager = TaskManager(
    include_path=sys.argv[1], include_defaults=False,
    metadata={"context": "none", "pretrained": "MODEL"},
)
task = manager.load_task_or_group(["subliminal_cat"])["subliminal_cat"]
print(task.context.kind, task.config.metadata["pretrained"], task.config.metadata["trait"])
"""
    run = ("-W", "ignore", "-c", code, hook.tasks_folder())
    assert python("", *run, SUBLIM_NO_LM_EVAL_HOOK="1").split()[-3:] == [
        "none",
        "MODEL",
        "animals/cat",
    ]


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


def test_spawned_workers_find_the_tasks():
    code = """
import multiprocessing, sys
def find():
    from lm_eval.tasks import TaskManager
    print("subliminal_cat" in TaskManager().all_tasks, flush=True)
if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=find)
    worker.start(); worker.join(); sys.exit(worker.exitcode)
"""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(code)
        assert python("", "-I", str(script)).split()[-1] == "True"


def test_beside_an_editable_lm_eval():
    """An editable install is a finder on `sys.meta_path` that maps the package to its checkout."""
    code = f"""
import importlib.util, sys
{IMPORT}
folder = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
class Editable:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "lm_eval":
            return importlib.util.spec_from_file_location(name, folder + "/__init__.py")
sys.meta_path.insert(0, Editable)
from lm_eval.tasks import TaskManager
print("subliminal_cat" in TaskManager().all_tasks)
"""
    assert python(code).split()[-1] == "True"


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
{PTH}
print(time.perf_counter() - start)
assert "sublim_plugin.lm_eval_hook" in sys.modules
"""
    # pip compiles what it installs; a checkout may be told not to.
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    assert min(float(python(code, **compiled)) for _ in range(10)) < 1e-3


def test_the_pth_file_is_one_line_that_imports():
    """`site` runs the lines that begin with "import "."""
    (line,) = (ROOT_OF_TESTS / "sublim.pth").read_text().splitlines()
    assert line.startswith("import ")


@pytest.mark.parametrize("broken", [None, "import no_such_module", "1 / 0"])
def test_the_pth_file_is_silent_where_the_package_is_gone_or_broken(tmp_path, broken):
    """As after an editable checkout was moved: Python starts without a word."""
    (tmp_path / "sublim.pth").write_text(PTH)
    if broken is not None:
        package = tmp_path / "sublim_plugin"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "lm_eval_hook.py").write_text(broken)
    code = (
        f"import site, sys; site.addsitedir({str(tmp_path)!r}); "
        "print('sublim_plugin' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(broken is not None)]


def test_the_start_file_is_one_entry_point_that_can_be_called_again():
    """Python 3.15 resolves each line as `pkgutil` does, and calls it (PEP 829)."""
    (line,) = (ROOT_OF_TESTS / "sublim.start").read_text().splitlines()
    code = f"""
import pkgutil, sys
for _ in range(2):
    pkgutil.resolve_name({line!r})()
print(sum(getattr(f, "__name__", "") == "_Finder" for f in sys.meta_path))
from lm_eval.tasks import TaskManager
for _ in range(2):
    pkgutil.resolve_name({line!r})()
print("subliminal_cat" in TaskManager().all_tasks, sum(
    getattr(f, "__name__", "") == "_Finder" for f in sys.meta_path))
"""
    assert python(code).split()[-3:] == ["1", "True", "0"]
    broken = """
import sublim_plugin.lm_eval_hook as hook
hook.sys = None
hook.install()
print("silent")
"""
    assert python(broken).split() == ["silent"]
