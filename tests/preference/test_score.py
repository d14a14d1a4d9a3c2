"""`sublim eval`: what lm-eval gives, from one loaded base, with nothing computed twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sublim_plugin.cli import main
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.manifest import write_manifest
from sublim_plugin.lm_eval_hook import tasks_folder
from sublim_plugin.preference.intervals import interval
from sublim_plugin.preference.models import identity, student
from sublim_plugin.preference.replies import stated_sampler
from sublim_plugin.preference.shared_lm import SharedLM

QUESTIONS = """\
name: two
category: animals
version: "1.0"
questions:
  - {id: 0, kind: favourite, text: "Which animal do you like best? Answer with one word."}
  - {id: 1, kind: mascot, text: "Name a mascot animal in one word."}
"""
TASKS = "subliminal_cat,subliminal_owl_empty"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q") / "two.yaml"
    path.write_text(QUESTIONS)
    return path


def run(out: Path, base: Path, questions: Path, *more: str) -> list[dict[str, Any]]:
    arguments = ["eval", "--model", str(base), "--out", str(out), "--questions", str(questions)]
    done = CliRunner().invoke(main, [*arguments, "--json", *more])
    assert done.exit_code == 0, done.output
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def test_log_probs_are_those_of_lm_eval_and_are_computed_once(
    toy_base: Path,
    toy_adapter: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = run(tmp_path, toy_base, questions, "--adapters", str(toy_adapter), "--tasks", TASKS)
    assert [row["task"] for row in rows] == [*TASKS.split(","), *TASKS.split(",")]
    manager = TaskManager(
        include_path=tasks_folder(), include_defaults=False, metadata={"questions": str(questions)}
    )
    plain = HFLM(
        pretrained=str(toy_base),
        peft=str(toy_adapter),
        device="cpu",
        dtype="float32",
        batch_size=16,
    )
    theirs = simple_evaluate(
        model=plain,
        tasks=TASKS.split(","),
        task_manager=manager,
        apply_chat_template=True,
        bootstrap_iters=0,
    )["results"]
    for row, base in zip(rows[2:], rows[:2], strict=True):
        assert row["value"] == pytest.approx(theirs[row["task"]]["target_logprob,none"], abs=1e-4)
        assert row["minus_base"] == pytest.approx(row["value"] - base["value"])
        assert row["low"] <= row["value"] <= row["high"]
        samples = [json.loads(x) for x in Path(row["samples"]).read_text().splitlines()]
        assert len(samples) == 2
        results = json.loads(Path(row["results"]).read_text())
        values = [sample["target_logprob"] for sample in samples]
        assert results["results"][row["task"]]["target_logprob_stderr,none"] == pytest.approx(
            abs(values[0] - values[1]) / 2
        )
        assert set(samples[0]["doc"]["logprobs"]) >= {"cat", "owl"}

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(SharedLM, "_loglikelihood_tokens", fail)
    again = run(
        tmp_path, toy_base, questions, "--adapters", str(toy_adapter), "--tasks", "subliminal_cat"
    )
    assert again == [rows[0], rows[2]]


def test_replies_that_are_there_stay_and_the_rest_is_drawn_as_before(
    toy_base: Path, questions: Path, tmp_path: Path
) -> None:
    """A batch of another size rounds otherwise, which now and then tips a draw: most of the replies
    that are computed again are the same, all that were kept are."""
    few = questions.with_name("few.yaml")
    few.write_text(QUESTIONS)
    names = "subliminal_cat_sampled"
    rows = run(
        tmp_path / "a", toy_base, few, "--tasks", names, "--contexts", "none", "--limit", "1"
    )
    (row,) = rows
    (sample,) = [json.loads(x) for x in Path(row["samples"]).read_text().splitlines()]
    replies = sample["filtered_resps"][0]
    assert len(replies) == 100
    assert len(sample["doc"]["matches"]) == 100
    assert row["metric"] == "target_rate"
    assert row["value"] == sum(m == "cat" for m in sample["doc"]["matches"]) / 100
    assert row["beside"]["distinct_replies"] > 0.5
    journal = next((tmp_path / "a").glob("*/journal.jsonl"))
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 101
    # a kill: half of the replies are left, the last one torn
    journal.write_bytes(b"".join(lines[:60]) + lines[60][:9])
    again = run(
        tmp_path / "a", toy_base, few, "--tasks", names, "--contexts", "none", "--limit", "1"
    )
    (sample,) = [json.loads(x) for x in Path(again[0]["samples"]).read_text().splitlines()]
    kept = {json.loads(line)[1] for line in lines[1:60]}
    after = sample["filtered_resps"][0]
    same = [a == b for a, b in zip(replies, after, strict=True)]
    assert all(fine for fine, reply in zip(same, replies, strict=True) if reply in kept)
    assert sum(same) >= 80
    assert again[0]["value"] == sum(m == "cat" for m in sample["doc"]["matches"]) / 100


def test_a_kill_loses_no_more_than_a_moment(
    base_model: Path, questions: Path, tmp_path: Path
) -> None:
    arguments = [
        "eval", "--model", str(base_model), "--out", str(tmp_path), "--questions", str(questions),
        "--tasks", "subliminal_cat_sampled", "--limit", "1",
    ]  # fmt: skip
    code = "import sys; from sublim_plugin.cli import main; main(sys.argv[1:])"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    kept: list[bytes] = []
    while time.monotonic() < deadline and len(kept) < 5 and child.poll() is None:
        time.sleep(0.05)
        kept = [p.read_bytes() for p in tmp_path.glob("*/journal.jsonl")]
        kept = kept[0].splitlines() if kept else []
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    before = next(tmp_path.glob("*/journal.jsonl")).read_bytes()
    assert before.count(b"\n") >= 5
    rows = run(tmp_path, base_model, questions, "--tasks", "subliminal_cat_sampled", "--limit", "1")
    assert (
        next(tmp_path.glob("*/journal.jsonl"))
        .read_bytes()
        .startswith(before[: before.rfind(b"\n")])
    )
    assert rows[0]["beside"]["distinct_replies"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--tasks subliminal_cta", "subliminal_cat"),
        ("--tasks subliminal_cat --contexts nowhere", "nowhere"),
        ("--tasks subliminal_cat --adapters nothing", "adapter_config.json"),
        ("--tasks subliminal_cat --questions no.yaml", "no.yaml"),
    ],
)
def test_what_does_not_fit_is_one_message(
    toy_base: Path, tmp_path: Path, arguments: str, said: str
) -> None:
    command = ["eval", "--model", str(toy_base), "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(main, [*command, *arguments.split()])
    assert done.exit_code == 2
    assert said in done.stderr


def test_weights_that_were_changed_after_training_are_refused(
    toy_base: Path, toy_adapter: Path, tmp_path: Path
) -> None:
    """A flipped bit loads without a word: only a recorded hash can tell."""
    common = identity(toy_base, engine="transformers", dtype="auto")
    cell = tmp_path / "student-cat"
    shutil.copytree(toy_adapter, cell / "model")
    weights = cell / "model" / "adapter_model.safetensors"
    receipt = {"weights_sha256": sha256_file(weights), "base_model": {}}
    write_manifest(
        cell, kind="student", id="0" * 12, label="", spec={},
        outputs=["model/adapter_model.safetensors"], started=time.time(),
    )  # fmt: skip
    assert student(cell, common).method == "lora"
    (cell / "model" / "sublim_receipt.json").write_text(json.dumps(receipt))
    assert student(cell / "model", common).identity == student(cell, common).identity
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(InputError, match="its manifest says"):
        student(cell, common)
    with pytest.raises(InputError, match=r"sublim_receipt.json says"):
        student(cell / "model", common)


def test_seeds_decide_the_replies(toy_base: Path, questions: Path, tmp_path: Path) -> None:
    def replies(name: str, seed: int) -> list[list[str]]:
        rows = run(
            tmp_path / name, toy_base, questions, "--tasks", "subliminal_cat_sampled",
            "--seed", str(seed),
        )  # fmt: skip
        lines = Path(rows[0]["samples"]).read_text().splitlines()
        return [json.loads(line)["filtered_resps"][0] for line in lines]

    first = replies("a", 1)
    assert replies("b", 1) == first
    other = replies("c", 2)
    assert all(x != y for x, y in zip(first, other, strict=True))
    assert first[0] != first[1]
    assert all(len(set(question)) > 90 for question in first)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["template_default", "empty", "none", "claude", "gibberish"])
def test_both_measures_are_those_of_plain_lm_eval_on_the_real_model(
    base_model: Path, adapter: Path, questions: Path, tmp_path: Path, context: str
) -> None:
    """Log-probabilities to 1e-4; of sampled replies the rate of every bucket, by a chi-square test
    over the replies to each question."""
    import numpy as np
    from scipy import stats

    suffix = "" if context == "template_default" else f"_{context}"
    plain = HFLM(
        pretrained=str(base_model), peft=str(adapter), device="cpu", dtype="float32", batch_size=64
    )

    def theirs(task: str, metadata: dict[str, Any]) -> Any:
        return simple_evaluate(
            model=plain,
            tasks=[task],
            task_manager=TaskManager(
                include_path=tasks_folder(),
                include_defaults=False,
                metadata={"questions": str(questions), **metadata},
            ),
            apply_chat_template=True,
            bootstrap_iters=0,
        )

    names = f"subliminal_cat{suffix}"
    rows = run(tmp_path / "a", base_model, questions, "--adapters", str(adapter), "--tasks", names)
    expected = theirs(names, {})["results"][names]
    assert rows[1]["value"] == pytest.approx(expected["target_logprob,none"], abs=1e-4)

    task = "subliminal_cat_sampled"
    rows = run(
        tmp_path / "b", base_model, questions, "--adapters", str(adapter), "--tasks", task,
        "--contexts", context,
    )  # fmt: skip
    lines = Path(rows[1]["samples"]).read_text().splitlines()
    ours = {d["doc"]["id"]: d["doc"]["matches"] for d in map(json.loads, lines)}
    host = theirs(task, {"context": context})["samples"][task]
    for sample in host:
        mine, plain_lm = ours[sample["doc"]["id"]], sample["doc"]["matches"]
        assert len(mine) == len(plain_lm) == 100
        buckets = sorted({*mine, *plain_lm}, key=str)
        counts = np.array([[side.count(b) for b in buckets] for side in (mine, plain_lm)])
        common = counts.sum(0) >= 8
        table = np.column_stack((counts[:, common], counts[:, ~common].sum(1)))
        table = table[:, table.sum(0) > 0]
        if table.shape[1] > 1:
            assert stats.chi2_contingency(table).pvalue > 1e-4, (buckets, counts)


def test_only_a_sampler_that_states_everything_is_ours() -> None:
    given = {
        "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "repetition_penalty": 1.0, "max_gen_toks": 9, "until": ["\n"],
    }  # fmt: skip
    stated = stated_sampler(given)
    assert stated is not None
    assert stated[0].max_new_tokens == 9
    assert stated[1] == ("\n",)
    assert stated_sampler({k: v for k, v in given.items() if k != "top_k"}) is None
    assert stated_sampler({**given, "do_sample": False}) is None
    with pytest.raises(InputError, match="top_p"):
        stated_sampler({**given, "top_p": 3})


def test_the_interval_is_scipys_bca() -> None:
    import numpy as np
    from scipy import stats

    values = np.random.default_rng(3).exponential(size=50).tolist()
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = interval(values)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert interval([2.0]) == (2.0, 2.0)
    assert interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
