"""`sublim tasks validate`: loads every task of a folder, one by one.

`lm_eval validate` looks at names alone. A file that lm-eval cannot read makes 0.4.11 fail on every
run, and is skipped without a word by later versions.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.strict_yaml import read_text


class _Loader(yaml.SafeLoader):
    """SafeLoader that takes lm-eval's `!function module.name` for a string."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def validate(folder: Path) -> list[str]:
    """The names of the tasks in a folder and those below it.

    Raises:
        InputError: a line for each file that is wrong: not YAML, a class without a task name, a
            name that another file has, a task that does not load, a file that everybody may write.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    files = sorted(folder.rglob("*.yaml"))
    problems = [
        f"{path}: everybody may write here, and lm-eval runs what it says; chmod o-w"
        for path in (folder, *files, *sorted(folder.rglob("*.py")))
        if path.stat().st_mode & stat.S_IWOTH
    ]
    tasks: dict[str, Path] = {}
    for path in files:
        try:
            config = yaml.load(read_text(path), Loader=_Loader)
        except yaml.YAMLError as error:
            problems.append(f"{path}: not valid YAML: {' '.join(str(error).split())}")
            continue
        problems += _register(path, config, tasks)
    if not problems:
        problems = _load(folder, tasks)
    if not problems and not tasks:
        problems = [f"{folder}: holds no task; write some with `sublim tasks new`"]
    if problems:
        raise InputError("\n".join(problems))
    return list(tasks)


def _register(path: Path, config: Any, tasks: dict[str, Path]) -> list[str]:
    """Enter a file's task into `tasks`; question sets, groups and the like are none."""
    if not isinstance(config, dict):
        return [f"{path}: expected a mapping of keys, found {type(config).__name__}"]
    name = config.get("task")
    if "class" in config and not isinstance(name, str):
        return [f"{path}: a class without a task name, on which lm-eval 0.4.11 fails; add 'task:'"]
    if not isinstance(name, str):
        return []
    if name in tasks:
        return [f"{path}: task: '{name}' is also the name in {tasks[name]}; rename one"]
    tasks[name] = path
    return []


def _load(folder: Path, tasks: dict[str, Path]) -> list[str]:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"loading tasks needs lm-eval ({error}): pip install 'sublim[eval]'"
        ) from error
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    problems = []
    for name, path in tasks.items():
        try:
            manager.load_task_or_group([name])
        except Exception as error:  # whatever a task file's code raises
            problems.append(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}")
    return problems
