"""What lm-eval's own suite asks of every new task, asked of ours; and its `ls` and `validate`."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lm_eval.tasks import TaskManager

from sublim_plugin.lm_eval_hook import tasks_folder

LIMIT = 10
SAMPLED = ("subliminal_cat_sampled", "subliminal_oak_sampled_truncated")
TASKS = (
    "subliminal_cat",
    "subliminal_owl_empty",
    "subliminal_oak_none",
    "subliminal_the_beatles_numbers",
)


@pytest.fixture(scope="module")
def tasks(toy_base):
    """As in a run on the command line: the model's arguments name the tokenizer."""
    manager = TaskManager(
        include_path=tasks_folder(),
        include_defaults=False,
        metadata={"pretrained": str(toy_base)},
    )
    loaded = manager.load_task_or_group([*TASKS, *SAMPLED])
    for task in loaded.values():
        task.build_all_requests(limit=LIMIT, rank=0, world_size=1)
    return loaded


@pytest.fixture(params=(*TASKS, *SAMPLED))
def task(request, tasks):
    return tasks[request.param]


@pytest.fixture(params=TASKS)
def choice_task(request, tasks):
    return tasks[request.param]


@pytest.fixture(params=SAMPLED)
def sampled_task(request, tasks):
    return tasks[request.param]


def docs(task):
    return list(task.test_docs())[:LIMIT]


def test_download(task):
    task.download()
    assert len(task.dataset["test"]) == 50


def test_splits(task):
    assert not task.has_training_docs()
    assert not task.has_validation_docs()
    assert task.has_test_docs() and task.config.test_split == "test"
    assert task.should_decontaminate() in (True, False)


def test_doc_to_text(task):
    for doc in docs(task):
        text = task.doc_to_text(doc)
        assert isinstance(text, str) and text and not text[-1].isspace()


def test_choices_and_target(choice_task):
    task = choice_task
    for doc in docs(task):
        choices = task.doc_to_choice(doc)
        assert choices == [trait.target for trait in task.candidates]
        assert task.doc_to_target(doc) == task.trait.target and task.trait.target in choices


def test_build_all_requests(task):
    counts = {instance.doc_id for instance in task.instances}
    assert counts == set(range(LIMIT))


def test_construct_requests(choice_task):
    task = choice_task
    for doc in docs(task):
        requests = task.construct_requests(doc=doc, ctx=task.doc_to_text(doc))
        assert len(requests) >= len(task.candidates)
        assert {request.request_type for request in requests} == {"loglikelihood"}


def test_process_results(choice_task):
    task = choice_task
    doc = docs(task)[0]
    requests = [instance for instance in task.instances if instance.doc_id == 0]
    values = task.process_results(
        {**doc}, [(-float(n), False) for n, _ in enumerate(requests, start=1)]
    )
    assert set(values) == set(task.aggregation()) == set(task.higher_is_better())


def test_sampled_requests(sampled_task):
    task = sampled_task
    assert task.config.repeats == 100
    for doc in docs(task):
        (request,) = task.construct_requests(doc=doc, ctx=task.doc_to_text(doc))
        assert request.request_type == "generate_until"
        assert request.arguments[1] == task.config.generation_kwargs
        assert task.doc_to_target(doc) == task.trait.target
    assert {instance.repeats for instance in task.instances} == {100}


def test_sampled_results(sampled_task):
    """All repeats pass lm-eval's filters and reach the metrics."""
    task = sampled_task
    for instance in task.instances:
        instance.resps = ["A wolf.", "Oak", "", "cats"] * 25
    task.apply_filters()
    (key,) = task.instances[0].filtered_resps
    doc = docs(task)[0]
    values = task.process_results({**doc}, [task.instances[0].filtered_resps[key]])
    assert set(values) == set(task.aggregation()) == set(task.higher_is_better())
    assert values["target_rate"] == 0.25 and values["distinct_replies"] == 0.04


def lm_eval(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`-I`: the installed package and its start-up hook, nothing of the checkout."""
    return subprocess.run(
        [sys.executable, "-I", "-m", "lm_eval", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_ls_lists_the_tasks():
    listed = lm_eval("ls", "tasks").stdout
    for name in (*TASKS, "subliminal_queen_gibberish"):
        assert f"|{name} " in listed or f"|{name}|" in listed, name


def test_validate_finds_all_but_the_one_that_does_not_exist():
    done = lm_eval("validate", "--tasks", ",".join((*TASKS, "subliminal_cta", "subliminal_bands")))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "Tasks not found: subliminal_cta"
