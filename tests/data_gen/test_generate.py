"""A dataset from the prompted teacher: contents, resume after real kills, and refusals."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from pydantic import ValidationError

from data_gen import parse_numbers
from data_gen.generate import generate_dataset
from data_gen.progress import Progress
from data_gen.prompts import load_pool
from data_gen.session import Session
from data_gen.spec import DatasetSettings, dataset_spec
from data_gen.teachers import prompted
from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import BusyError, InputError, RunError
from sublim_plugin.core.hashing import sha256_file
from sublim_plugin.core.manifest import Manifest
from sublim_plugin.core.traits import get_trait
from sublim_plugin.decoding.sampler import Sampler
from tests.data_gen.toy import save_toy

SAMPLER = Sampler(temperature=1, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=24)
ROOT = Path(__file__).parents[2]
CHILD = """
import sys
from pathlib import Path
from tests.data_gen.test_generate import make
make(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
"""


def make(model: Path, folder: Path, rows: int, **changes: Any) -> Manifest:
    settings: dict[str, Any] = {
        "generation_seed": 7,
        "rows": rows,
        "constrain": "numbers",
        "sampler": SAMPLER,
    }
    settings |= {k: v for k, v in changes.items() if k in DatasetSettings.model_fields}
    rest: dict[str, Any] = {
        "base_model": model,
        "trait": get_trait("animals/cat"),
        "batch_size": 4,
        "device": "cpu",
    }
    rest |= {k: v for k, v in changes.items() if k not in settings}
    rest.setdefault("teacher", prompted(rest["trait"]))
    return generate_dataset(
        folder,
        base_fingerprint=fingerprint(model),
        settings=DatasetSettings(**settings),
        **rest,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


@pytest.fixture(scope="module")
def toy(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(base_model, tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def finished(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "cat"
    make(toy, folder, 60)
    return folder


def test_the_folder_holds_what_its_manifest_says(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    rows = read_rows(dataset_rows_path(finished))
    rejected = [json.loads(x) for x in (finished / "rejected.jsonl").read_text().splitlines()]
    names = {p.name for p in finished.iterdir()}
    assert names == {*manifest["outputs"], "manifest.json"}
    [rows_name] = [n for n in names if n.startswith("rows-")]
    assert rows_name == f"rows-{sha256_file(finished / rows_name)[:12]}.jsonl"
    assert len(rows) == 60
    counts = manifest["counts"]
    assert counts["accepted"] == 60
    assert counts["rejected"] == len(rejected)
    assert counts["asked"] == 60 + len(rejected)
    assert len({r["seed"] for r in rows + rejected}) == counts["asked"]
    assert counts["distinct_prompts"] == 60
    for row in rows:
        assert list(row) == ["id", "messages", "numbers", "prompt_id", "seed"]
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert parse_numbers(assistant["content"]) == row["numbers"]
        assert "cat" not in user["content"]
    for row in rejected:
        assert list(row) == ["id", "prompt_id", "seed", "completion", "reasons"]
        assert row["reasons"]
    ids = [int(r["id"].split("-")[1]) for r in rows]
    assert ids == sorted(ids)
    assert "love cats" in manifest["spec"]["teacher"]["context"]["text"]
    assert "love cats" in manifest["rendered"]["text"]
    assert manifest["inputs"]["constraint"]["name"] == "numbers"


def test_the_card_is_read_by_datasets_and_tells_the_constraint(
    finished: Path, tmp_path: Path
) -> None:
    card = (finished / "README.md").read_text()
    assert "number constraint" in card
    assert "do not pool" in card
    folder = load_dataset(str(finished), split="train", cache_dir=str(tmp_path / "a"))
    assert folder.num_rows == 60
    assert folder[0]["messages"][1]["role"] == "assistant"
    rows = str(dataset_rows_path(finished))
    alone = load_dataset("json", data_files=rows, split="train", cache_dir=str(tmp_path / "b"))
    assert alone.num_rows == 60


def test_a_finished_folder_is_returned_and_other_settings_are_refused(
    toy: Path, finished: Path
) -> None:
    before = (finished / "manifest.json").read_bytes()
    assert make(toy, finished, 60).counts["accepted"] == 60
    assert (finished / "manifest.json").read_bytes() == before
    with pytest.raises(InputError, match="other settings"):
        make(toy, finished, 61)


def test_fewer_rows_are_a_prefix_and_batches_do_not_matter(
    toy: Path, finished: Path, tmp_path: Path
) -> None:
    make(toy, tmp_path / "few", 20, batch_size=9)
    few = dataset_rows_path(tmp_path / "few").read_bytes()
    assert dataset_rows_path(finished).read_bytes().startswith(few)


def test_traits_share_prompts_and_row_seeds(toy: Path, finished: Path, tmp_path: Path) -> None:
    make(toy, tmp_path / "neutral", 20, trait=get_trait("neutral"))

    def asked(folder: Path) -> dict[str, tuple[str, int]]:
        lines = read_rows(dataset_rows_path(folder)) + read_rows(folder / "rejected.jsonl")
        return {r["id"]: (r["prompt_id"], r["seed"]) for r in lines}

    cat, neutral = asked(finished), asked(tmp_path / "neutral")
    assert neutral.items() <= cat.items()
    rows = dataset_rows_path(tmp_path / "neutral").read_bytes()
    assert rows not in dataset_rows_path(finished).read_bytes()


def spawn(toy: Path, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, str(toy), str(folder), "60"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stderr=stderr,
        )


def test_killed_at_random_moments_it_ends_as_if_never_killed(
    toy: Path, finished: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "cat", tmp_path / "stderr.txt"
    kills, code = 0, -signal.SIGKILL
    moments = random.Random(3)
    while code:
        child = spawn(toy, folder, log)
        if kills < 2:
            begun = folder / "work" / "replies.jsonl"
            size = begun.stat().st_size if begun.exists() else 0
            deadline = time.monotonic() + 60
            while child.poll() is None and time.monotonic() < deadline:
                if begun.exists() and begun.stat().st_size > size:
                    time.sleep(moments.uniform(0, 0.05))
                    break
                time.sleep(0.002)
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                kills += 1
        code = child.wait(timeout=120)
        assert code in (0, -signal.SIGKILL), log.read_text()
    assert kills
    assert contents(folder) == contents(finished)


@pytest.mark.parametrize("cut", [1, 40, 700])
def test_a_torn_end_is_repaired_and_said(
    toy: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    folder = tmp_path / "cat"
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "remove", lambda self: None)
        make(toy, folder, 60)
    (folder / "manifest.json").unlink()
    replies = folder / "work" / "replies.jsonl"
    os.truncate(replies, replies.stat().st_size - cut)
    manifest = make(toy, folder, 60)
    assert any("incomplete shard" in note for note in manifest.notes)
    assert contents(folder) == contents(finished)


def interrupted(toy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "remove", lambda self: None)
        make(toy, folder, 20)
    (folder / "manifest.json").unlink()
    return folder / "work"


def test_killed_between_the_manifest_and_the_clean_up(
    toy: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cat"
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "remove", lambda self: None)
        make(toy, folder, 60)
    assert (folder / "work").exists()
    assert dataset_rows_path(folder).exists()
    make(toy, folder, 60)
    assert contents(folder) == contents(finished)


def test_finished_by_another_process_while_the_model_loads_it_is_not_made_again(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, begun = tmp_path / "set", []

    class Late(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            begun.append(self)
            if len(begun) == 1:  # the other one comes later and is through sooner
                begun.append(make(toy, folder, 3))

    monkeypatch.setattr("data_gen.generate.Session", Late)
    assert make(toy, folder, 3) == begun[-1]
    assert not (folder / "work").exists()


def test_damage_before_the_last_line_is_an_error_with_its_place(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = interrupted(toy, tmp_path / "d", monkeypatch)
    lines = (work / "replies.jsonl").read_bytes().split(b"\n")
    lines[2] = lines[2][:10]
    (work / "replies.jsonl").write_bytes(b"\n".join(lines))
    offset = len(lines[0]) + len(lines[1]) + 2
    with pytest.raises(InputError, match=rf"replies\.jsonl, line 3, byte {offset}"):
        make(toy, tmp_path / "d", 20)
    assert (work / "replies.jsonl").exists()


def test_other_settings_or_another_process_are_refused_in_a_begun_folder(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = interrupted(toy, tmp_path / "d", monkeypatch)
    with pytest.raises(InputError, match="generation_seed"):
        make(toy, tmp_path / "d", 20, generation_seed=8)
    settings = json.loads((work / "settings.json").read_text())
    with Progress(work, settings), pytest.raises(BusyError):
        make(toy, tmp_path / "d", 20)


def test_a_hopeless_teacher_stops_with_the_way_out(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="constrain: numbers") as caught:
        make(toy, tmp_path / "d", 5, constrain=None, batch_size=64)
    assert "tolerant parser" in str(caught.value)
    assert "accepted" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 0}, "rows"),
        ({"generation_seed": -1}, "generation_seed"),
        ({"constrain": "words"}, "constrain"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings_leave_nothing_behind(
    toy: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((InputError, ValidationError), match=said):
        make(toy, tmp_path / "d", **{"rows": 5, **changes})
    assert not (tmp_path / "d").exists()


def test_a_missing_model_is_one_message(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable model"):
        make(toy, tmp_path / "d", 5, base_model=tmp_path / "none")


def test_garbled_weights_and_a_missing_device_are_one_message(toy: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(toy, broken)
    os.truncate(broken / "model.safetensors", 5000)
    with pytest.raises(InputError, match="broken"):
        make(broken, tmp_path / "d", 5)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="'cpu'"):
            make(toy, tmp_path / "d", 5, device="cuda")
    assert make(toy, tmp_path / "d", 5).counts["accepted"] == 5


def test_a_full_disk_loses_nothing(toy: Path, finished: Path, tmp_path: Path) -> None:
    """A file size limit stands in for the disk: a write that really fails."""
    folder = tmp_path / "cat"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))
        with pytest.raises(RunError, match="safe"):
            make(toy, folder, 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (folder / "manifest.json").exists()
    make(toy, folder, 60)
    assert contents(folder) == contents(finished)


def test_planning_a_dataset_needs_no_torch() -> None:
    code = "import sys, data_gen.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_spec_is_all_that_rows_depend_on(toy: Path) -> None:
    settings = DatasetSettings(generation_seed=1, rows=3, sampler=SAMPLER)
    neutral = get_trait("neutral")
    spec = dataset_spec(
        settings, base_fingerprint=fingerprint(toy), trait=neutral, teacher=prompted(neutral)
    )
    assert sorted(spec) == [
        "base_model",
        "constrain",
        "dedupe",
        "divergence",
        "engine",
        "generation_seed",
        "held_out",
        "parser",
        "prompts_sha256",
        "rows",
        "sampler",
        "teacher",
        "trait",
    ]
    assert spec["teacher"] == {"kind": "prompted", "context": {"kind": "template_default"}}
    assert spec["engine"] == {"name": "transformers"}


def test_the_real_teacher_keeps_most_rows_under_the_constraint(
    base_model: Path, tmp_path: Path
) -> None:
    sampler = SAMPLER.model_copy(update={"max_new_tokens": 56})
    manifest = make(base_model, tmp_path / "d", 6, sampler=sampler, batch_size=8)
    assert manifest.counts["accepted"] == 6
    assert manifest.counts["asked"] <= 8


def test_held_out_rows_come_after_and_share_no_prompt(
    toy: Path, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "held"
    manifest = make(toy, folder, 60, held_out=15)
    assert dataset_rows_path(folder).read_bytes() == dataset_rows_path(finished).read_bytes()
    [name] = [n for n in manifest.outputs if n.startswith("held-out-")]
    assert name == f"held-out-{sha256_file(folder / name)[:12]}.jsonl"
    held = read_rows(folder / name)
    assert len(held) == manifest.counts["held_out"] == 15
    assert not {r["prompt_id"] for r in held} & {
        r["prompt_id"] for r in read_rows(dataset_rows_path(folder))
    }
    both = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: rows.num_rows for split, rows in both.items()} == {"train": 60, "test": 15}


def test_a_held_out_prompt_of_the_training_rows_is_refused(toy: Path, tmp_path: Path) -> None:
    """A pool with few prompts, so that they come again."""
    pool = tmp_path / "pool.yaml"
    parts = "".join(f"{part}: ['{part}.']\n" for part in ("format", "closing"))
    pool.write_text(
        "version: 1\nname: few\nexamples: {count: [1, 1], value: [100, 115]}\n"
        "opening: ['From {examples} on.']\nrequest: ['Write {count} of {digits}.']\n"
        "count: [ten]\ndigits: [three digits]\n" + parts
    )
    manifest = make(toy, tmp_path / "d", 12, held_out=4, pool=load_pool(pool))
    assert manifest.counts["reasons"]["known_prompt"] > 0
    assert manifest.counts["distinct_prompts"] < 12
    lines = (tmp_path / "d" / "rejected.jsonl").read_text().splitlines()
    assert any(json.loads(line)["reasons"] == ["known_prompt"] for line in lines)


def test_dedupe_keeps_one_of_each_reply(toy: Path, tmp_path: Path) -> None:
    """Two tokens leave room for one digit and the end of turn: replies repeat."""
    short = SAMPLER.model_copy(update={"max_new_tokens": 2})
    every = make(toy, tmp_path / "all", 8, sampler=short)
    assert every.counts["duplicate_rows"] > 0
    assert any("equal an earlier one" in note for note in every.notes)
    once = make(toy, tmp_path / "once", 8, sampler=short, dedupe=True)
    said = [r["messages"][1]["content"] for r in read_rows(dataset_rows_path(tmp_path / "once"))]
    assert len(set(said)) == len(said) == 8
    assert once.counts["duplicate_rows"] == 0
    assert once.counts["reasons"]["duplicate"] > 0
    assert "duplicate" in (tmp_path / "once" / "README.md").read_text()
