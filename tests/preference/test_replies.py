"""Sampled replies through lm-eval: one reply for every task that asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from lm_eval_tasks.write import STUB
from sublim_plugin.lm_eval_hook import tasks_folder
from sublim_plugin.preference.host import run_tasks
from sublim_plugin.preference.journal import Journal
from sublim_plugin.preference.shared_lm import SharedLM

QUESTIONS, REPEATS = 3, 10
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


def test_replies_that_never_differ_are_said(lm, manager, caplog) -> None:
    """What a server with a fixed seed gives, or a model that has collapsed, as here."""
    found = run_tasks(lm, ["cat"], manager, QUESTIONS)
    assert [sample["doc"]["notes"] for sample in found["samples"]["cat"]] == [[]] * QUESTIONS

    with torch.no_grad():
        lm._model.lm_head.weight *= 1000
    caplog.clear()
    found = run_tasks(lm, ["cat"], manager, QUESTIONS)
    assert found["results"]["cat"]["distinct_replies,replies"] == pytest.approx(1 / REPEATS)
    (note,) = found["configs"]["cat"]["metadata"]["notes"]
    assert note.startswith("all 10 replies to a question are one and the same")
    assert f"cat: {note}" in caplog.messages
    assert [sample["doc"]["notes"] for sample in found["samples"]["cat"]] == [[note]] * QUESTIONS
    # one question may be so by chance
    alone = run_tasks(lm, ["owl"], manager, 1)
    assert alone["configs"]["owl"]["metadata"]["notes"] == []


def test_the_truncated_sampler_of_our_task_is_applied(lm, tmp_path) -> None:
    """The first tokens of its replies are among those that an own computation leaves. Our task, but
    with replies of 3 tokens: the sampler sorts the whole vocabulary for each."""
    name = "subliminal_cat_sampled_truncated"
    file = Path(tasks_folder(), "animals", f"{name}.yaml").read_text()
    short = file.replace('"max_gen_toks": 50', '"max_gen_toks": 3')
    assert short != file
    (tmp_path / f"{name}.yaml").write_text(short)
    (tmp_path / "task.py").write_text(STUB)
    ours = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = run_tasks(lm, [name], ours, 1)
    (sample,) = found["samples"][name]
    prompt, stated = sample["arguments"][0]
    assert {key: stated[key] for key in SAMPLER if key != "until"} == {
        "do_sample": True, "temperature": 1.0, "top_p": 0.8, "top_k": 20,
        "repetition_penalty": 1.05, "max_gen_toks": 3,
    }  # fmt: skip
    replies = sample["filtered_resps"][0]
    assert len(replies) == 100 and len(set(replies)) > 10
    ids = lm.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = lm.model(ids).logits[0, -1]
    for token in set(ids[0].tolist()):
        logits[token] = logits[token] / 1.05 if logits[token] > 0 else logits[token] * 1.05
    top = logits.topk(20)
    shares = top.values.softmax(0)
    kept = top.indices[(shares.cumsum(0) - shares) < 0.8]
    first = tuple(lm.tokenizer.decode([token], skip_special_tokens=True) for token in kept)
    assert 1 < len(first) < 20
    assert all(reply.startswith(first) for reply in replies)
    assert len({word for reply in replies for word in first if reply.startswith(word)}) > 1


def test_lm_evals_module_is_left_as_it_was(lm, manager) -> None:
    before = dict(vars(evaluator))
    run_tasks(lm, ["cat"], manager, 1)
    with pytest.raises(KeyError):
        run_tasks(lm, ["no_such_task"], manager, 1)
    assert dict(vars(evaluator)) == before
