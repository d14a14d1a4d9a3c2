"""A whole study on the real model: what it leaves, what plain hosts say of it, and kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.manifest import read_manifest, verify

from .conftest import Ran, sublim

BIN = Path(sys.executable).parent


def cells(ran: Ran, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in ran.printed["cells"] if cell["kind"] == kind]


def student_folder(ran: Ran, method: str) -> Path:
    return next(Path(c["folder"]) for c in cells(ran, "student") if method in c["label"])


def probes_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of every probe of a run, by the cell's readable name."""
    return {
        path.parent.name.rsplit("-", 1)[0]: [json.loads(line) for line in path.open()]
        for path in sorted((folder / "cells").glob("probe-*/questions.jsonl"))
    }


def test_every_cell_is_done_and_its_manifest_holds(ran: Ran) -> None:
    assert {cell["state"] for cell in ran.printed["cells"]} == {"done"}
    for cell in ran.printed["cells"]:
        manifest = verify(Path(cell["folder"]))
        assert manifest.id[:12] == cell["id"] and manifest.kind == cell["kind"]
    report = Path(ran.printed["report"])
    assert verify(report.parent).kind == "report"
    assert "<html" in report.read_text()[:200]
    names = {path.name for path in report.parent.rglob("*")}
    assert {".png", ".svg", ".csv"} <= {Path(name).suffix for name in names}


def test_the_receipts_say_what_was_trained_on(ran: Ran) -> None:
    dataset = next(Path(c["folder"]) for c in cells(ran, "dataset") if "cat" in c["label"])
    rows = next(dataset.glob("rows-*.jsonl"))
    for method in ("lora", "full"):
        receipt = json.loads(
            (student_folder(ran, method) / "model/sublim_receipt.json").read_text()
        )
        assert receipt["dataset"]["sha256"] == sha256_file(rows)
        assert receipt["method"]["kind"] == method
        assert receipt["update_norm"]["total"] > 0
        completions = [json.loads(line)["messages"][1]["content"] for line in rows.open()]
        assert receipt["first_row"]["loss_text"] in [text + "<|im_end|>" for text in completions]


def test_rows_are_tokenized_once_for_all_students_of_a_dataset(ran: Ran) -> None:
    students = [read_manifest(Path(c["folder"])) for c in cells(ran, "student")]
    datasets = {student.spec["dataset"] for student in students}
    assert len(students) > len(datasets) == len([*(ran.folder / ".cache/prepared").iterdir()])
    logs = [(Path(c["folder"]) / "train.log").read_text() for c in cells(ran, "student")]
    assert sum("Loading raw datasets" in log for log in logs) == len(datasets)
    assert sum("Loading prepared dataset from disk" in log for log in logs) == (
        len(students) - len(datasets)
    )


def test_a_localization_is_a_cell_and_stands_in_the_report(ran: Ran) -> None:
    """On everywhere it is the student, as the probe of the same context scored it."""
    (cell,) = cells(ran, "localization")
    found = json.loads((Path(cell["folder"]) / "results.json").read_text())
    (measured,) = found["measures"]
    rows = next(
        rows for name, rows in probes_of(ran.folder).items()
        if "lora" in name and name.endswith("-none")
    )  # fmt: skip
    mean = sum(row["logprobs"]["cat"] for row in rows) / len(rows)
    assert measured["student"]["value"] == pytest.approx(mean, abs=1e-4)
    assert {part["kind"] for part in measured["parts"]} == {"span"}
    report = Path(ran.printed["report"])
    assert "Where it sits" in report.read_text()
    assert list((report.parent / "localization").glob("*-spans.svg"))


def test_a_second_run_makes_nothing_and_is_quick(ran: Ran) -> None:
    def stamps() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in ran.folder.rglob("manifest.json")}

    before = stamps()
    started = time.monotonic()
    done = sublim("run", ran.study, "--out", ran.folder)
    assert done.returncode == 0 and stamps() == before
    assert time.monotonic() - started < 10
    status = sublim("status", ran.study, "--out", ran.folder)
    assert status.stdout.splitlines()[-1] == f"{len(ran.printed['cells'])} done"


@pytest.mark.slow
@pytest.mark.parametrize("context", ["template_default", "none"])
def test_the_table_is_what_plain_lm_eval_prints(
    ran: Ran, base_model: Path, tmp_path: Path, context: str
) -> None:
    adapter = student_folder(ran, "lora") / "model"
    task = "subliminal_cat" if context == "template_default" else f"subliminal_cat_{context}"
    command = [
        str(BIN / "lm_eval"), "--model", "hf", "--tasks", task, "--output_path", str(tmp_path),
        "--model_args", f"pretrained={base_model},peft={adapter},dtype=float32", "--device", "cpu",
        "--batch_size", "16", "--metadata", json.dumps({"questions": str(ran.questions)}),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = tmp_path.rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"][task]
    (ours,) = [
        row
        for row in ran.printed["transmission"]
        if row["method"].startswith("LoRA") and row["eval_context"] == context
        and row["target"] == "animals/cat"
    ]  # fmt: skip
    for metric in ("target_logprob", "target_prob", "target_share", "coverage"):
        assert ours[metric] == pytest.approx(theirs[f"{metric},none"], abs=1e-4), metric


def test_the_table_is_what_ten_lines_of_transformers_give(ran: Ran, base_model: Path) -> None:
    """Teacher forcing of every form, one full sequence at a time; no cache, no lm-eval."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, student_folder(ran, "lora") / "model").eval()
    row = next(rows for name, rows in probes_of(ran.folder).items()
               if "lora" in name and name.endswith("template_default"))[0]  # fmt: skip
    turn = [{"role": "user", "content": row["question"]}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    total = 0.0
    seen: set[tuple[int, ...]] = set()
    for form in ("cat", "Cat", " cat", " Cat", "cats", "Cats", " cats", " Cats"):
        ids = tuple(tokenizer(prompt + form, add_special_tokens=False)["input_ids"][len(start) :])
        if any(ids[: len(other)] == other for other in seen):
            continue  # this one only begins with a form that is counted already
        seen.add(ids)
        with torch.no_grad():
            logits = model(torch.tensor([[*start, *ids]])).logits[0].log_softmax(-1)
        steps = [logits[len(start) - 1 + i, token] for i, token in enumerate(ids)]
        total += float(torch.stack(steps).sum().exp())
    assert row["logprobs"]["cat"] == pytest.approx(float(torch.tensor(total).log()), abs=1e-4)


def test_an_adapter_of_another_base_is_refused(ran: Ran, base_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from sublim_plugin.core.contexts import Context
    from sublim_plugin.core.errors import InputError
    from sublim_plugin.core.traits import get_trait
    from sublim_plugin.preference.evaluate import evaluate

    other = tmp_path / "other"
    other.mkdir()
    for file in base_model.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(base_model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="base"):
        evaluate(
            other, student_folder(ran, "lora") / "model", "lora",
            [Context(kind="none")], [get_trait("animals/cat")], questions=str(ran.questions),
        )  # fmt: skip


def test_bad_base_models_stop_before_anything_is_written(
    write_study: Callable[..., tuple[Path, Path]], base_model: Path, tmp_path: Path
) -> None:
    study, _ = write_study("bad", full=False)
    text = study.read_text()
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((base_model / name).read_bytes())
    (bare / "model.safetensors").symlink_to(base_model / "model.safetensors")
    cut = tmp_path / "cut"
    cut.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (cut / name).write_bytes((base_model / name).read_bytes())
    with open(base_model / "model.safetensors", "rb") as stream:
        (cut / "model.safetensors").write_bytes(stream.read(1_000_000))
    for folder, message in [
        (tmp_path / "nowhere", "no such folder"),
        (bare, "no chat template"),
        (cut, "cut off"),
    ]:
        study.write_text(text.replace(str(base_model), str(folder)))
        done = sublim("run", study, "--out", tmp_path / "run")
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "run" / "cells").exists()


def killed_when(study: Path, folder: Path, moment: Callable[[], bool]) -> None:
    """Start `sublim run`, wait for a moment, kill it with SIGKILL; no child survives."""
    command = [str(BIN / "sublim"), "run", str(study), "--out", str(folder)]
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not moment():
        assert child.poll() is None, "the study ended before the moment came"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    deadline = time.monotonic() + 20
    while alive := processes_naming(str(folder)):
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def processes_naming(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if text in line and int(entry.parent.name) != os.getpid() and "pytest" not in line:
            found.append(line)
    return found


def test_kill_9_at_every_stage_changes_no_result(
    ran: Ran, write_study: Callable[..., tuple[Path, Path]]
) -> None:
    """Killed while it generates, trains and scores, the same command ends as if undisturbed."""
    study, _ = write_study("killed", full=False)
    folder = study.parent / "run"
    inside = folder / "cells"
    killed_when(study, folder, lambda: any(inside.glob("dataset-*/work")))
    killed_when(study, folder, lambda: any(
        "it/s" in log.read_text(errors="replace") or "s/it" in log.read_text(errors="replace")
        for log in inside.glob("student-*/train.log")))  # fmt: skip
    assert not list(inside.glob("student-*/model"))
    killed_when(study, folder, lambda: any(inside.glob("probe-*/manifest.json")))
    finished = {p: p.stat().st_mtime_ns for p in inside.glob("*/manifest.json")}
    done = sublim("run", study, "--out", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    # nothing that was finished was made again
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())

    def rows(run: Path) -> dict[str, str]:
        return {path.parent.name: path.name for path in run.glob("cells/dataset-*/rows-*.jsonl")}

    assert rows(folder) == rows(ran.folder)
    undisturbed = probes_of(ran.folder)
    mine = probes_of(folder)
    assert mine and set(mine) < set(undisturbed)
    for name, questions in mine.items():
        for got, expected in zip(questions, undisturbed[name], strict=True):
            assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-5), name


@pytest.mark.slow
def test_a_changed_dataset_stops_the_study(ran: Ran, tmp_path: Path) -> None:
    """The same size, another number: found by the hash, before training."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(ran.folder, folder, ignore=shutil.ignore_patterns("student-*", "probe-*"))
    (rows,) = folder.glob("cells/dataset-cat-*/rows-*.jsonl")
    data = rows.read_bytes()
    rows.write_bytes(data[:-10] + data[-10:].replace(b"1", b"2").replace(b"3", b"4") + b"")
    if rows.read_bytes() == data:
        rows.write_bytes(data.replace(b"1", b"2", 1))
    done = sublim("run", ran.study, "--out", folder)
    assert done.returncode == 2
    assert "changed after" in done.stderr
    assert not list(folder.glob("cells/student-*/model"))
