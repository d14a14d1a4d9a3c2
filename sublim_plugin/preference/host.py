"""lm-eval's `simple_evaluate`, without what it runs on the side after every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


def run_tasks(lm: Any, tasks: Sequence[Any], manager: Any, limit: int | None) -> dict[str, Any]:
    """What `simple_evaluate` returns for a loaded model, samples and all.

    It starts pip, git and others to describe the machine, 0.8 seconds each time on two cores, and
    git complains on the terminal where there is no repository: the description is made once, and
    without the repository that the user happens to stand in.
    """
    from lm_eval import evaluator

    before = evaluator.get_git_commit_hash, evaluator.add_env_info
    evaluator.get_git_commit_hash = lambda: None
    evaluator.add_env_info = lambda storage: storage.update(_environment())
    try:
        results: dict[str, Any] = evaluator.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            task_manager=manager,
            apply_chat_template=True,
            limit=limit,
            # of our metrics' standard errors none is bootstrapped, but 0 would leave them all out
            bootstrap_iters=1,
            verbosity="ERROR",
        )
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info = before
    return results


@cache
def _environment() -> dict[str, Any]:
    from lm_eval.loggers.utils import add_env_info

    found: dict[str, Any] = {}
    add_env_info(found)
    return found
