"""Lets lm-eval find the `subliminal_*` tasks without `--include_path`.

`sublim.pth` imports this module whenever Python starts (from 3.15, `sublim.start` calls `install`),
so it does almost nothing: it waits, and only when `lm_eval.tasks` is imported adds our folder to
what `TaskManager` searches. Standard library only, silent on any error, off with
SUBLIM_NO_LM_EVAL_HOOK=1, and void as soon as lm-eval finds the tasks of installed packages itself.
"""

# No `from __future__ import annotations`: it would be a tenth of what this file costs at start.
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

HOST = "lm_eval.tasks"
OFF = "SUBLIM_NO_LM_EVAL_HOOK"


def tasks_folder() -> str:
    """Absolute path of our lm-eval tasks: `lm_eval_tasks` beside the package `sublim_plugin`."""
    here = os.path.dirname(os.path.abspath(__file__))
    return os.path.join(os.path.dirname(here), "lm_eval_tasks")


class _Finder:
    """Steps aside at the first import of `lm_eval.tasks` and patches it once it is loaded."""

    @classmethod
    def find_spec(
        cls, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != HOST:
            return None
        try:
            sys.meta_path.remove(cls)
            from importlib.util import find_spec

            spec = find_spec(name)
            if spec is None or spec.loader is None:
                return spec
            execute = spec.loader.exec_module

            def exec_module(module: "ModuleType") -> None:
                execute(module)
                patch(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec
        except Exception:
            return None


def patch(module: "ModuleType") -> None:
    """Add our folder to `module.TaskManager`; repeating it, or failing, changes nothing."""
    try:
        manager = module.TaskManager
        if not hasattr(manager, "_sublim_patched"):
            if not _knows_entry_points(module) and os.path.isdir(tasks_folder()):
                _add_folder(manager)
            manager._sublim_patched = True
    except Exception:
        return


def _knows_entry_points(module: "ModuleType") -> bool:
    names = set(vars(module))
    for part in ("manager", "_index"):
        names |= set(vars(sys.modules.get(f"{HOST}.{part}", module)))
    names |= set(module.TaskManager.__init__.__code__.co_names)
    return any("entry_point" in name for name in names)


def _add_folder(manager: "Any") -> None:
    from functools import wraps
    from inspect import signature

    original = manager.__init__
    parameters = signature(original)

    @wraps(original)
    def init(*args: "Any", **kwargs: "Any") -> None:
        try:
            given = parameters.bind(*args, **kwargs)
            if given.arguments.get("include_defaults", True):
                given.arguments["include_path"] = _with_ours(given.arguments.get("include_path"))
                args, kwargs = given.args, given.kwargs
        except Exception:
            pass  # call the host as it was called
        original(*args, **kwargs)

    manager.__init__ = init


def _with_ours(include_path: "Any") -> "list[Any]":
    """Ours first, so that what the user includes wins; once, if the user includes it too."""
    ours = tasks_folder()
    paths = include_path if isinstance(include_path, (list, tuple)) else [include_path]
    paths = [path for path in paths if path]
    if any(os.path.realpath(str(path)) == os.path.realpath(ours) for path in paths):
        return paths
    return [ours, *paths]


def install() -> None:
    """Wait for `lm_eval.tasks`, or patch it if it is there already; repeating it is harmless."""
    try:
        if os.environ.get(OFF, "0") not in ("", "0"):
            return
        if HOST in sys.modules:
            patch(sys.modules[HOST])
        elif _Finder not in sys.meta_path:
            sys.meta_path.insert(0, _Finder)
    except Exception:
        return


install()
