"""Sampled replies through lm-eval: one reply for every task that asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from lm_eval_tasks.write import STUB
from sublim_plugin.preference.host import run_tasks
from sublim_plugin.preference.journal import Journal
from sublim_plugin.preference.shared_lm import SharedLM

QUESTIONS, REPEATS = 3, 4
SAMPLER = {
    "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
    "repetition_penalty": 1.0, "max_gen_toks": 5, "until": [],
}  # fmt: skip


class Counting(SharedLM):
    """Counts what is really decoded."""

    decoded = 0

    def _decode(self, asked: Any, sampler: Any, keep: Any) -> None:
        self.decoded += len(asked)
        super()._decode(asked, sampler, keep)


@pytest.fixture
def lm(toy_base: Path) -> Counting:
    return Counting(pretrained=str(toy_base), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Tasks like ours with few replies: one a target, and one with another sampler."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "task.py").write_text(STUB)
    for name, target, more in (
        ("cat", "cat", {}), ("owl", "owl", {}), ("ox", "ox", {}), ("cut", "cat", {"top_k": 5}),
    ):  # fmt: skip
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\nclass: !function task.SampledTask\noutput_type: generate_until\n"
            f"repeats: {REPEATS}\ngeneration_kwargs: {json.dumps(SAMPLER | more)}\n"
            f"metadata: {{trait: animals/{target}, context: none, questions: animals}}\n"
        )
    return TaskManager(include_path=str(folder), include_defaults=False)


def replies(lm: Counting, manager: TaskManager, *tasks: str) -> dict[str, list[list[str]]]:
    lm.decoded = 0
    found = run_tasks(lm, tasks, manager, QUESTIONS)["samples"]
    return {name: [one["filtered_resps"][0] for one in found[name]] for name in tasks}


def test_tasks_that_ask_the_same_share_their_replies(lm, manager, tmp_path) -> None:
    alone = replies(lm, manager, "cat")["cat"]
    assert lm.decoded == QUESTIONS * REPEATS
    assert [len(question) for question in alone] == [REPEATS] * QUESTIONS
    assert all(len(set(question)) > 1 for question in alone)

    lm.journal = Journal(tmp_path / "journal.jsonl", {"model": "toy"})
    together = replies(lm, manager, "owl", "cat")
    assert together == {"owl": alone, "cat": alone}
    assert lm.decoded == len(lm.journal.answers) == QUESTIONS * REPEATS

    assert replies(lm, manager, "ox", "owl")["ox"] == alone
    assert lm.decoded == 0


def test_another_sampler_draws_its_own(lm, manager) -> None:
    found = replies(lm, manager, "cat", "cut")
    assert lm.decoded == 2 * QUESTIONS * REPEATS
    assert found["cat"] != found["cut"]
