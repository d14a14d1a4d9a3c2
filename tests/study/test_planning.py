"""Study files and the grid: strict, hashed by meaning, planned without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sublim_plugin.core.errors import InputError
from sublim_plugin.core.manifest import write_manifest
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.reasons import Reasons, differences
from sublim_plugin.study.state import cell_state
from sublim_plugin.study.study_file import load_study

QUICKSTART = Path(__file__).parents[2] / "studies" / "quickstart.yaml"
BASE = {"name": "base", "sha256": "0" * 64, "template_sha256": "1" * 64}


def edited(tmp_path: Path, **changes: Any) -> list[Cell]:
    """The quickstart's cells after changes given as `section__key=value`."""
    settings = yaml.safe_load(QUICKSTART.read_text())
    for key, value in changes.items():
        place = settings
        *path, last = key.split("__")
        for part in path:
            place = place[part]
        place[last] = value
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(settings))
    return plan(load_study(path), BASE)


def ids(cells: list[Cell], kind: str | None = None) -> set[str]:
    return {cell.id for cell in cells if kind in (None, cell.kind)}


def test_the_quickstart_has_the_cells_it_promises() -> None:
    cells = plan(load_study(QUICKSTART), BASE)
    kinds = [cell.kind for cell in cells]
    assert {kind: kinds.count(kind) for kind in kinds} == {"dataset": 2, "student": 5, "probe": 18}
    students = [cell.spec for cell in cells if cell.kind == "student"]
    assert [(s["trait"], s["method"].get("rank", "full")) for s in students] == [
        ("animals/cat", 2), ("animals/cat", 8), ("animals/cat", 64), ("animals/cat", "full"),
        ("neutral", 8),
    ]  # fmt: skip
    assert all(s["method"].get("alpha") == s["method"].get("rank") for s in students)
    assert len({cell.folder_name for cell in cells}) == len(cells)


def test_a_label_changes_no_id_and_an_explicit_default_neither(tmp_path: Path) -> None:
    same = ids(edited(tmp_path))
    assert ids(edited(tmp_path, name="another-name")) == same
    # how many rows are decoded side by side changes no row
    assert ids(edited(tmp_path, datasets__batch_size=8)) == same
    full = {"kind": "template_default", "text": None, "user_prefix": None}
    assert ids(edited(tmp_path, training__contexts=[full])) == same


def test_an_input_changes_what_depends_on_it_and_no_more(tmp_path: Path) -> None:
    before = edited(tmp_path)
    seeds = edited(tmp_path, training__seeds=[7])
    assert ids(seeds, "dataset") == ids(before, "dataset")
    assert not ids(seeds, "student") & ids(before, "student")
    # the three probes of the base are shared
    assert len(ids(seeds, "probe") & ids(before, "probe")) == 3
    more = edited(tmp_path, probes__contexts=["template_default", "empty", "none", {"text": "Hi."}])
    assert ids(before) < ids(more) and len(ids(more) - ids(before)) == 6
    rank = edited(
        tmp_path,
        students=[
            {"traits": ["animals/cat"], "lora_ranks": [2, 4, 8, 64], "full": True},
            {"traits": ["neutral"], "lora_ranks": [8]},
        ],
    )
    assert len(ids(rank) - ids(before)) == 1 + 3


def test_soft_targets_make_other_datasets_and_students_and_leave_old_ids(tmp_path: Path) -> None:
    before = edited(tmp_path)
    # as planned before there were soft targets
    assert [before[0].id, before[2].id] == ["1397923ebdd0", "2f9fc9112a3f"]
    assert ids(edited(tmp_path, datasets__soft_targets=None)) == ids(before)
    numbers = edited(tmp_path, datasets__soft_targets="numbers")
    whole = edited(tmp_path, datasets__soft_targets="vocabulary")
    for kind in ("dataset", "student"):
        assert len(ids(before, kind) | ids(numbers, kind) | ids(whole, kind)) == 3 * len(
            ids(before, kind)
        )
    assert [len(numbers), len(whole)] == [len(before)] * 2
    with pytest.raises(InputError, match="soft_targets need the transformers engine; vllm does"):
        edited(tmp_path, datasets__soft_targets="numbers", datasets__engine={"name": "vllm"})


def test_localizations_are_cells_of_the_students_they_name(tmp_path: Path) -> None:
    from sublim_plugin.localize.sweep import KINDS
    from sublim_plugin.study.study_file import PARTS

    assert PARTS == KINDS
    before = edited(tmp_path)
    asked = {"lora_ranks": [8], "full": True, "contexts": ["template_default", "none"]}
    more = edited(tmp_path, localizations=asked)
    places = [cell for cell in more if cell.kind == "localization"]
    assert ids(before) == ids(more) - ids(places)
    assert [cell.label for cell in places] == [
        "cat g1 lora r8 t42 template_default", "cat g1 lora r8 t42 none",
        "cat g1 full t42 template_default", "cat g1 full t42 none",
    ]  # fmt: skip
    for wrong, message in [
        ({"lora_ranks": [3]}, "no student has rank 3 .there are 2, 8, 64"),
        ({"lora_ranks": [8], "traits": ["neutral"]}, "'neutral' is no trait with a target"),
        ({}, "expected lora_ranks, full: true, or both"),
    ]:
        with pytest.raises(InputError, match=message):
            edited(tmp_path, localizations={"contexts": ["none"]} | wrong)


def test_train_contexts_are_cells_of_their_own(tmp_path: Path) -> None:
    before = edited(tmp_path)
    more = edited(tmp_path, training__contexts=["template_default", "empty", {"text": "Hi."}])
    assert ids(before) < ids(more) and len(ids(more, "student")) == 3 * len(ids(before, "student"))
    students = [cell for cell in more if cell.kind == "student"]
    assert len({cell.folder_name for cell in students}) == len(students)
    contexts = {cell.label: cell.spec["recipe"]["sublim"]["context"] for cell in students}
    assert contexts["cat g1 lora r2 t42"] == "template_default"
    assert contexts["cat g1 lora r2 in empty t42"] == {"kind": "empty"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: 96", r":1:1: unknown key 'rows'"),
        ("nmae: x", r":1:1: unknown key 'nmae'; did you mean 'name'"),
    ],
)
def test_a_misspelt_top_key_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text + "\n" + QUICKSTART.read_text())
    with pytest.raises(InputError, match=message):
        load_study(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lora_ranks: [2, 8, 64]", "lora_rnaks: [2]", r"lora_rnaks'; did you mean 'lora_ranks'"),
        ("lora_ranks: [2, 8, 64]", "lora_ranks: [0]", r"greater than or equal to 1 \(got 0\)"),
        ("[animals/cat, neutral]", "[animals/cta, neutral]", r"did you mean 'animals/cat'"),
        ("- traits: [neutral]", "- traits: [animals/owl]", r"datasets.traits does not list"),
        ("[template_default, empty, none]", "[template_default, null]", r"contexts.1"),
        ("contexts: [template_default]", "contexts: [emtpy]", r"training.contexts.0"),
        ("temperature: 1.0", "temperature: -1", r"temperature: .*greater than or equal to 0"),
        ("    top_k: 0\n", "", r"key 'datasets.sampler.top_k' is missing"),
        ("rows: 64", "rows: 64\n  rows: 65", r"key 'rows' stands twice"),
        ("name: quickstart", "name: ../x", r"name '../x'"),
        ("questions: animals", "questions: beasts", r"beasts"),
        ("/lora-r8", "/lora-r9", r"lora-r9"),
        ("embedded:smollm2", "embedded:smollm3", r"smollm3"),
    ],
)
def test_bad_values_are_told_with_their_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    from sublim_plugin.study.run import planned

    text = QUICKSTART.read_text()
    assert old in text
    path = tmp_path / "s.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        planned(path)


def test_planning_and_status_import_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from sublim_plugin.study.run import states_of\n"
        "states, _ = states_of(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'axolotl', 'matplotlib'} & set(sys.modules)\n"
        "print(len(states), sorted(heavy))\n"
    )
    command = [sys.executable, "-c", script, str(QUICKSTART), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "25 []\n"


def finish(cell: Cell, run_dir: Path) -> None:
    folder = cell.folder(run_dir)
    folder.mkdir(parents=True)
    (folder / "file.txt").write_text("x")
    write_manifest(
        folder, kind=cell.kind, id=cell.id, label=cell.label, spec=cell.spec,
        outputs=["file.txt"], started=0.0,
    )  # fmt: skip


def test_states_and_reasons(tmp_path: Path) -> None:
    before = edited(tmp_path)
    dataset = before[0]
    finish(dataset, tmp_path)
    assert cell_state(dataset, tmp_path).state == "done"
    student = next(cell for cell in before if cell.kind == "student")
    assert cell_state(student, tmp_path).state == "missing"
    (student.folder(tmp_path)).mkdir(parents=True)
    (student.folder(tmp_path) / "error.txt").write_text("axolotl exited with 1\nmore\n")
    failed = cell_state(student, tmp_path)
    assert failed.state == "failed"
    assert Reasons(before, tmp_path).why(failed) == "failed: axolotl exited with 1"

    after = edited(tmp_path, datasets__sampler__temperature=0.7)
    changed = cell_state(after[0], tmp_path)
    assert Reasons(after, tmp_path).why(changed) == (
        f"changed since {dataset.folder_name}: sampler.temperature: 1.0 → 0.7"
    )
    waiting = cell_state(next(c for c in after if c.kind == "student"), tmp_path)
    assert Reasons(after, tmp_path).why(waiting).startswith("waits for dataset-cat")
    untouched = cell_state(next(c for c in after if c.label == "base none"), tmp_path)
    assert Reasons(after, tmp_path).why(untouched) == "not made yet"


def test_a_manifest_of_other_inputs_stops(tmp_path: Path) -> None:
    first, second = edited(tmp_path)[:2]
    finish(first, tmp_path)
    first.folder(tmp_path).rename(second.folder(tmp_path))
    with pytest.raises(InputError, match="not those of this cell"):
        cell_state(second, tmp_path)


def test_differences_are_leaf_by_leaf() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    new = {"a": {"b": 2, "c": [1, 2]}, "e": "x" * 100}
    shown = "x" * 57 + "..."
    assert list(differences(old, new)) == ["a.b: 1 → 2", f"e: (absent) → {shown}"]
