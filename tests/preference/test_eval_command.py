"""`sublim eval` as a lab runs it: many students, settings and processes into one folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from lm_eval import utils as host
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sublim_plugin.cli import main
from sublim_plugin.core.contexts import Context
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.lock import cell_lock
from sublim_plugin.preference.asked import label
from sublim_plugin.preference.kept import Scored, model_folder
from sublim_plugin.preference.models import Student, identity, named, student, the_base
from sublim_plugin.preference.score import MERGED, Unfinished, score_students
from sublim_plugin.preference.shared_lm import SharedLM

QUESTIONS = """\
name: {name}
category: {category}
version: "1.0"
questions:
  - {{id: 0, kind: favourite, text: "Which {one} do you like best? Answer with one word."}}
  - {{id: 1, kind: mascot, text: "Name a mascot {one} in one word."}}
"""
FRUITS = """\
category: fruits
teacher_system_prompt: "You love {target}s."
targets:
  mango: [mango, mangoes]
  pear: [pear, pears]
"""


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q") / "two.yaml"
    path.write_text(QUESTIONS.format(name="two", category="animals", one="animal"))
    return path


def change(adapter: Path, to: Path, **values: Any) -> Path:
    """A copy of an adapter with its first tensor scaled or replaced."""
    shutil.copytree(adapter, to)
    weights = to / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = sorted(tensors)[0]
    tensors[key] = tensors[key] * values.get("scale", 1.0) + values.get("plus", 0.0)
    save_file(tensors, weights)
    return to


def run(base: Path, out: Path, *more: Any) -> Result:
    command = ["eval", "--model", str(base), "--out", str(out), "--device", "cpu"]
    return CliRunner().invoke(main, [*command, *map(str, more)])


def rows_of(done: Result, code: int = 0) -> list[dict[str, Any]]:
    assert done.exit_code == code, done.output
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_are_kept_apart_by_all_that_determines_them_and_written_once(
    toy_base: Path,
    toy_adapter: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text('text: "You are Rex."\n')
    adapters = [
        change(toy_adapter, tmp_path / name / "model", scale=scale)
        for name, scale in (("a", 1.0), ("b", 1.5))
    ]
    out = tmp_path / "scores"
    command = [
        "--adapters", *adapters, "--tasks", "subliminal_cat", "--contexts", f"claude,{mine}",
        "--questions", questions,
    ]  # fmt: skip
    bars = os.environ.get("TQDM_DISABLE")
    rows = rows_of(run(toy_base, out, *command, "--json"))
    assert os.environ.get("TQDM_DISABLE") == bars
    assert [(row["model"], row["context"]) for row in rows] == [
        (model, context) for model in ("base", "a", "b") for context in ("claude", "mine")
    ]
    assert len({row["value"] for row in rows}) == 6
    assert sorted(path.name.rpartition("-")[0] for path in out.iterdir()) == ["a", "b", "base"]

    row = rows[3]
    results = json.loads(Path(row["results"]).read_text())
    block = Scored.model_validate(results["sublim"])
    assert block.model == "a"
    assert block.identity["student"]["adapter_model.safetensors"] == sha256_file(
        adapters[0] / "adapter_model.safetensors"
    )
    assert block.context == {"kind": "text", "text": "You are Rex."}
    assert "You are Rex." in block.rendered_example["text"]
    assert (block.seed, block.limit, block.engine, block.merged) == (None, None, "transformers", 0)
    assert block.dtype == "float32"
    assert block.questions["asked"] == 2
    assert results["config"]["model_args"]["peft"] == str(adapters[0])
    first = json.loads(Path(row["samples"]).read_text().splitlines()[0])
    assert block.rendered_example["sha256"] == first["doc"]["prompt_sha256"]

    # lm-eval's own tools find and parse what is there
    names = [str(path) for path in out.rglob("*") if path.is_file()]
    assert len(host.get_results_filenames(names)) == len(rows)
    samples = host.get_sample_results_filenames(names)
    assert {host.get_file_task_name(Path(name).name) for name in samples} == {"subliminal_cat"}
    assert {host.get_file_datetime(Path(name).name) for name in samples} == {
        host.get_file_datetime(Path(row["results"]).stem) for row in rows
    }
    assert f"{row['value']:.4f}" in host.make_table(results)

    before = files(out)
    loads = SharedLM.__init__

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(SharedLM, "__init__", fail)
    assert rows_of(run(toy_base, out, *command, "--json")) == rows
    assert files(out) == before
    monkeypatch.setattr(SharedLM, "__init__", loads)

    # another setting lies beside it, and a single question has no interval
    done = run(toy_base, out, *command[3:], "--limit", "1")
    assert done.exit_code == 0, done.output
    assert "  none  " in done.stdout
    assert "one question: no interval" in done.stdout
    assert "coverage is below" in done.stdout
    after = files(out)
    assert all(
        after[path] == content for path, content in before.items() if "journal" not in str(path)
    )
    assert len(host.get_results_filenames([str(path) for path in after])) == len(rows) + 2

    # what was changed afterwards is not read
    changed = Path(row["samples"])
    changed.write_text(changed.read_text().replace("animal", "tree"))
    done = run(toy_base, out, *command)
    assert done.exit_code == 2
    assert changed.name in done.stderr


def test_a_labs_own_sampled_tasks_do_not_depend_on_each_other(
    toy_base: Path, toy_adapter: Path, tmp_path: Path
) -> None:
    """Tasks of `sublim tasks new`, end to end; two sampled tasks share their replies."""
    (tmp_path / "fruits.yaml").write_text(FRUITS)
    (tmp_path / "q.yaml").write_text(QUESTIONS.format(name="fruit", category="fruits", one="fruit"))
    own = tmp_path / "own"
    done = CliRunner().invoke(
        main,
        ["tasks", "new", str(tmp_path / "fruits.yaml"), "--questions", str(tmp_path / "q.yaml"),
         "--out", str(own)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for path in own.glob("*_sampled.yaml"):
        fewer = path.read_text().replace("repeats: 100", "repeats: 5")
        path.write_text(fewer.replace('"max_gen_toks": 50', '"max_gen_toks": 8'))
    names = ["subliminal_fruits_pear_sampled", "subliminal_fruits_mango_sampled"]

    def replies(out: Path, *tasks: str) -> list[list[list[str]]]:
        rows = rows_of(
            run(
                toy_base, out, "--include-path", own, "--adapters", toy_adapter, "--json",
                "--tasks", ",".join(tasks),
            )
        )  # fmt: skip
        assert [row["task"] for row in rows] == [*tasks, *tasks]
        lines = [Path(row["samples"]).read_text().splitlines() for row in rows]
        return [[json.loads(x)["filtered_resps"][0] for x in each] for each in lines]

    pear, mango, *_ = both = replies(tmp_path / "both", *names)
    assert pear == mango
    assert pear[0] != both[2][0]
    alone = replies(tmp_path / "alone", names[1])
    assert alone == [both[1], both[3]]
    journal = next((tmp_path / "both").glob("adapter-*/journal.jsonl"))
    assert len(journal.read_text().splitlines()) == 1 + 2 * 5

    own.chmod(0o777)
    done = run(toy_base, tmp_path / "no", "--include-path", own, "--tasks", names[0])
    assert done.exit_code == 2
    assert "everybody may write" in done.stderr
    assert not (tmp_path / "no").exists()


def test_a_student_that_fails_under_way_is_named_and_the_others_are_scored(
    toy_base: Path, toy_adapter: Path, questions: Path, tmp_path: Path
) -> None:
    """Finite weights whose products overflow: no check of files can see it."""
    full = tmp_path / "full"
    model = AutoModelForCausalLM.from_pretrained(toy_base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(full)
    overflow = change(toy_adapter, tmp_path / "overflow", scale=0.0, plus=3e38)
    command = ["--adapters", overflow, toy_adapter, full, "--tasks", "subliminal_cat"]
    done = run(toy_base, tmp_path / "o", *command, "--questions", questions, "--json")
    rows = rows_of(done, 1)
    assert [row["model"] for row in rows] == ["base", "adapter", "full"]
    assert len({row["value"] for row in rows}) == 3
    assert "overflow: " in done.stderr
    assert "is nan; the model's weights or its dtype overflow" in done.stderr
    assert not list((tmp_path / "o").glob("overflow-*/*/results_*"))
    with pytest.raises(Unfinished, match="overflow: ") as raised:
        score_students(
            base=toy_base, adapters=[overflow, full], tasks=["subliminal_cat"],
            questions=questions, out=tmp_path / "o", device="cpu",
        )  # fmt: skip
    assert [row.model for row in raised.value.rows] == ["base", "full"]
    assert raised.value.rows[1].value == rows[2]["value"]


def test_two_processes_share_the_base_and_wait_for_it(
    toy_base: Path, toy_adapter: Path, questions: Path, tmp_path: Path
) -> None:
    """As in an array of jobs with an adapter each: this process has the base, the other its own
    student, and then it waits."""
    out = tmp_path / "scores"
    common = identity(toy_base, engine="transformers", dtype="auto")
    base = model_folder(out, the_base(toy_base, common))
    arguments = [
        "eval", "--model", toy_base, "--out", out, "--adapters", toy_adapter, "--json",
        "--tasks", "subliminal_cat", "--questions", questions, "--device", "cpu",
    ]  # fmt: skip
    code = "import sys; from sublim_plugin.cli import main; main(sys.argv[1:])"
    with cell_lock(base):
        job = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 240
        while not list(out.glob("adapter-*/*/results_*.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.5)
        assert job.poll() is None
        assert not list(base.glob("*/results_*.json"))
    stdout, stderr = job.communicate(timeout=240)
    assert job.returncode == 0, stderr
    assert "here it comes last, and waits" in stderr
    rows = json.loads(stdout.splitlines()[-1])
    assert [row["model"] for row in rows] == ["base", "adapter"]
    assert rows[1]["minus_base"] == rows[1]["value"] - rows[0]["value"]
    assert len(list(base.glob("*/results_*.json"))) == 1


def test_a_student_in_other_hands_is_busy_and_the_rest_is_scored(
    toy_base: Path, toy_adapter: Path, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores"
    one = student(toy_adapter, identity(toy_base, engine="transformers", dtype="auto"))
    left = model_folder(out, one) / f"{MERGED}x"
    gone = out / "other-0123456789ab" / f"{MERGED}y"
    for folder in (left, gone):
        folder.mkdir(parents=True)
    with cell_lock(left.parent):
        done = run(
            toy_base, out, "--adapters", toy_adapter, "--tasks", "subliminal_cat", "--questions",
            questions, "--json",
        )  # fmt: skip
    assert [row["model"] for row in rows_of(done, 75)] == ["base"]
    assert left.exists()  # of a run under way
    assert not gone.exists()  # of a killed one


@pytest.mark.parametrize(
    ("students", "more", "said"),
    [
        (["good", "nan", "pickle"], "", ["pickle"]),
        (["good", "nan", "renamed"], "", ["not finite", "1 missing"]),
        ([], "--tasks subliminal_cat_claude --contexts empty", ["'claude', not 'empty'"]),
        ([], "--engine vllm", ["pip install vllm"]),
        ([], "--tasks ,", ["no task is named"]),
        ([], "--include-path nowhere", ["nowhere"]),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(
    toy_base: Path,
    toy_adapter: Path,
    tmp_path: Path,
    students: list[str],
    more: str,
    said: list[str],
) -> None:
    folders = {"good": toy_adapter}
    if students:
        folders["nan"] = change(toy_adapter, tmp_path / "nan", plus=float("nan"))
        folders["renamed"] = change(toy_adapter, tmp_path / "renamed")
        weights = folders["renamed"] / "adapter_model.safetensors"
        tensors = load_file(weights)
        tensors["other"] = tensors.pop(sorted(tensors)[0])
        save_file(tensors, weights)
        folders["pickle"] = tmp_path / "pickle"
        shutil.copytree(toy_adapter, folders["pickle"])
        (folders["pickle"] / "adapter_model.safetensors").unlink()
        (folders["pickle"] / "adapter_model.bin").write_bytes(b"\x80\x02.")
    out = tmp_path / "out"
    adapters = ["--adapters", *(folders[name] for name in students)] if students else []
    given = [*adapters, "--tasks", "subliminal_cat", *more.split()]
    command = ["eval", "--model", str(toy_base), "--out", str(out), *map(str, given)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2, done.output
    for words in said:
        assert words in done.stderr
    assert not out.exists()


def test_every_student_has_a_name_of_its_own(
    toy_base: Path, toy_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = "models--lab--cat-lora/snapshots/0a1b"
    places = ["x/model", "a/checkpoint-2", "b/checkpoint-2", hub, "base", "y", "y/model"]
    for place in places:
        shutil.copytree(toy_adapter, tmp_path / place, dirs_exist_ok=True)
    common = identity(toy_base, engine="transformers", dtype="auto")
    base = the_base(toy_base, common)
    monkeypatch.chdir(tmp_path / "x" / "model")
    given = [Path("."), *(tmp_path / place for place in places)]
    names = [one.name for one in named(base, [student(folder, common) for folder in given])]
    y = str(tmp_path / "y")
    assert names == [
        "x", "a/checkpoint-2", "b/checkpoint-2", "lab/cat-lora", f"{tmp_path.name}/base", y,
        f"{y}/model",
    ]  # fmt: skip
    one = Student(name="lab/cat lora", folder=None, method=None, identity={})
    assert model_folder(tmp_path, one).name == f"lab__cat__lora-{one.id}"


def test_the_ends_of_a_reply_are_part_of_what_a_model_is(toy_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "base"
    shutil.copytree(toy_base, other)
    path = other / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [7, 5]}))
    mine, theirs = (identity(x, engine="transformers", dtype="auto") for x in (toy_base, other))
    assert theirs["end_ids"] == [5, 7] != mine["end_ids"]
    assert {**mine, "end_ids": 0} == {**theirs, "end_ids": 0}
    path.write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json cannot be read"):
        identity(other, engine="transformers", dtype="auto")


def test_contexts_that_are_the_same_prompts_say_so(
    toy_base: Path, questions: Path, tmp_path: Path, tokenizer: Any
) -> None:
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert own in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    contexts = ["template_default", {"text": own}, "empty"]
    rows = score_students(
        base=toy_base, tasks=["subliminal_cat"], contexts=contexts, questions=questions,
        out=tmp_path / "o", device="cpu",
    )  # fmt: skip
    assert rows[0].value == rows[1].value != rows[2].value
    said = [any("are the same prompts to this model" in note for note in r.notes) for r in rows]
    assert said == [True, True, False]


def test_contexts_are_called_as_they_were_asked_for(tmp_path: Path) -> None:
    claude = Context.parse("claude")
    assert label("claude", claude) == label(None, claude) == "claude"
    with_prefix = claude.model_copy(update={"user_prefix": "Hm"})
    assert label(None, with_prefix).startswith("claude-prefix-")
    assert label("own/x.yaml", claude) == "x"
    assert label(None, Context(kind="text", text="Hi")).startswith("text-")
