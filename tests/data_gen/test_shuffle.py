"""Shuffled numbers: what a control keeps, and what it loses."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen.parse import parse_numbers
from data_gen.shuffle import shuffled, shuffled_targets, write_shuffled
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_text
from sublim_plugin.core.manifest import read_manifest, write_manifest
from sublim_plugin.logprob.target_file import SoftTargets

FORMS = ["{}", "[{}]", "({})", "{}.", "[{}]."]
GAPS = [", ", ",", "; ", " ", "\n"]


@st.composite
def datasets(draw: st.DrawFn) -> list[dict[str, Any]]:
    rows = []
    for index in range(draw(st.integers(1, 12))):
        numbers = draw(st.lists(st.integers(0, 999), min_size=1, max_size=10))
        spelled = [f"{n:03d}" if draw(st.booleans()) else str(n) for n in numbers]
        form, gap = draw(st.sampled_from(FORMS)), draw(st.sampled_from(GAPS))
        reply = form.format(gap.join(spelled))
        turns = [
            {"role": "user", "content": f"Continue 1, 2, {index}"},
            {"role": "assistant", "content": reply},
        ]
        rows.append({"id": index, "messages": turns, "numbers": numbers, "prompt_id": "x"})
    return rows


@settings(max_examples=60, deadline=None)
@given(datasets(), st.integers(0, 5))
def test_prompts_formats_and_numbers_stay_and_places_go(
    rows: list[dict[str, Any]], seed: int
) -> None:
    before = json.dumps(rows)
    found = shuffled(rows, seed)
    assert json.dumps(rows) == before and shuffled(rows, seed) == found
    for old, new in zip(rows, found, strict=True):
        assert {**old, "messages": 0, "numbers": 0} == {**new, "messages": 0, "numbers": 0}
        assert old["messages"][0] == new["messages"][0]
        frame = [re.sub("[0-9]+", "#", row["messages"][1]["content"]) for row in (old, new)]
        assert frame[0] == frame[1]
        assert parse_numbers(new["messages"][1]["content"]) == new["numbers"]
    spelled = [
        Counter(n for row in side for n in re.findall("[0-9]+", row["messages"][1]["content"]))
        for side in (rows, found)
    ]
    assert spelled[0] == spelled[1]


def test_numbers_leave_their_rows_without_a_trace_of_where_they_were() -> None:
    rows = [{"id": i, "messages": [{"content": "?"}, {"content": f"{i}, {i}"}]} for i in range(400)]
    found = shuffled(rows, 1)
    moved = [new["numbers"] for new in found]
    assert sum(i in own for i, own in enumerate(moved)) < 12  # two are expected
    assert found != shuffled(rows, 2)
    # a number's place says nothing of the new one
    middle = sum(own[0] < 200 for own in moved[:200])
    assert 70 < middle < 130


def write_dataset(folder: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    name = f"rows-{sha256_text(text)[:12]}.jsonl"
    (folder / name).write_text(text)
    spec = {"trait": "animals/cat", "generation_seed": 3, "parser": "strict"} | more
    write_manifest(
        folder, kind="dataset", id="a" * 64, label="x", spec=spec, outputs=[name], started=0.0,
        inputs={"base_model": {"name": "b"}}, seeds={"generation": 3},
        counts={"asked": 9, "accepted": 2, "held_out": 1, "duplicate_rows": 0},
    )  # fmt: skip
    return spec


def test_a_folder_is_a_dataset_that_names_its_original(tmp_path: Path) -> None:
    rows = [{"id": i, "messages": [{"content": "?"}, {"content": f"{i}; {i + 1}"}]} for i in (1, 8)]
    spec = write_dataset(tmp_path / "a", rows) | {"shuffled": True}
    made = write_shuffled(
        tmp_path / "b", tmp_path / "a", base=tmp_path, spec=spec, id="b" * 12, label="cat s"
    )
    source = read_manifest(tmp_path / "a")
    assert read_rows(dataset_rows_path(tmp_path / "b")) == shuffled(rows, 3)
    (name,) = [name for name in source.outputs if name.startswith("rows-")]
    original = {"id": "a" * 12, "sha256": source.outputs[name].sha256}
    assert made.inputs == {"base_model": {"name": "b"}, "dataset": original}
    assert (made.kind, made.spec) == ("dataset", spec)
    assert made.seeds == {"generation": 3, "shuffle": 3} and made.counts["held_out"] == 0
    assert (
        write_shuffled(tmp_path / "b", tmp_path / "a", base=tmp_path, spec=spec, id="b", label="")
        == made
    )
    (tmp_path / "a" / name).write_text("{}\n")
    with pytest.raises(InputError, match="the rows were changed after they were made"):
        write_shuffled(tmp_path / "c", tmp_path / "a", base=tmp_path, spec=spec, id="c", label="")


def test_soft_targets_move_among_positions_of_one_kind() -> None:
    torch = pytest.importorskip("torch")
    texts, offsets = [], [0]
    for index in range(60):
        texts += [*f"{index % 9}{index % 7}, {index % 8}", "<end>"]
        offsets.append(len(texts))
    n = len(texts)
    logprobs = torch.arange(n, dtype=torch.float16)[:, None].repeat(1, 3)
    targets = SoftTargets(
        "numbers", "rows", "0", {}, torch.tensor(offsets), torch.zeros(n), torch.zeros(3), logprobs
    )
    found = shuffled_targets(targets, texts, seed=1)
    source = found.logprobs[:, 0].long()
    assert sorted(source.tolist()) == list(range(n))
    # all rows are laid out alike; a first and a third number's first digit are written alike too
    kind = torch.tensor([0, 1, 2, 3, 4, 1])
    assert (kind[source % 6] == kind[torch.arange(n) % 6]).all()
    assert (source == torch.arange(n)).float().mean() < 0.1
    assert torch.equal(found.offsets, targets.offsets)
    assert torch.equal(shuffled_targets(targets, texts, 1).logprobs, found.logprobs)
