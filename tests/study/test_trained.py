"""Teachers that a study trains itself: their cells, what writes which dataset, and a real one."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import InputError
from sublim_plugin.core.hashing import sha256_json
from sublim_plugin.core.manifest import read_manifest, verify, write_manifest
from sublim_plugin.study.cells import Cell, plan
from sublim_plugin.study.cost import costs
from sublim_plugin.study.overview import table
from sublim_plugin.study.reasons import Reasons
from sublim_plugin.study.schedule import Schedule
from sublim_plugin.study.state import cell_state
from sublim_plugin.study.study_file import Study, load_study
from sublim_plugin.study.teaching import teacher_for
from sublim_plugin.study.trained import base_for, what_trains
from tests.study.conftest import QUESTIONS, sublim
from tests.study.test_grid import BASE, STUDIES, cells_of, labels, small

TRAINED = {"kind": "trained", "recipe": "smollm2-135m-instruct/teacher-lora-r8"}
PINNED = {
    "paper-context-grid": "f637489618b4",
    "paper-localization": "e44181b72d35",
    "paper-rank-sweep": "cd143c5927f4",
    "quickstart": "ed0ec7aacdfe",
    "smollm2-context-grid": "ab08424becdf",
    "smollm2-localization": "b177ef3695d3",
    "smollm2-rank-sweep": "036478460100",
}


def of_kind(cells: list[Cell], kind: str) -> list[Cell]:
    return [cell for cell in cells if cell.kind == kind]


def all_ids(study: Study) -> str:
    return sha256_json(sorted(cell.id for cell in plan(study, BASE)))[:12]


def test_the_cells_of_studies_are_what_they_were(tmp_path: Path) -> None:
    """A new feature that changes an id makes finished studies run again."""
    for name, expected in PINNED.items():
        assert all_ids(load_study(STUDIES / f"{name}.yaml")) == expected, name
    value = yaml.safe_load((STUDIES / "quickstart.yaml").read_text())
    value["datasets"]["teachers"] = [
        "prompted",
        {"kind": "steered", "layers": [3], "strength": 2},
        {"kind": "student", "lora_rank": 8, "generations": 2, "traits": ["animals/cat"]},
    ]
    assert all_ids(Study.model_validate(value)) == "edd490eb72f2"
    path = tmp_path / "study.yaml"
    value["datasets"]["teachers"].append(TRAINED)
    path.write_text(yaml.safe_dump(value))
    before = {c.id for c in plan(load_study(STUDIES / "quickstart.yaml"), BASE)}
    assert before < {c.id for c in plan(load_study(path), BASE)}


def test_every_dataset_has_a_teacher_of_its_own_unless_it_has_a_seed() -> None:
    value = small(
        datasets__teachers=["prompted", TRAINED, TRAINED | {"name": "one", "seed": 7}],
        datasets__generation_seeds=[1, 2],
    )
    study = Study.model_validate(value)
    cells = plan(study, BASE)
    by_id = {cell.id: cell for cell in cells}
    teachers = of_kind(cells, "teacher")
    assert cells[: len(teachers)] == teachers  # the earliest stage comes first
    assert labels(cells, "teacher") == [
        *(f"{trait} lora r8 s{seed}" for trait in ("cat", "neutral") for seed in (1, 2)),
        "cat lora r8 s7",
        "neutral lora r8 s7",
    ]
    written = of_kind(cells, "dataset")[4:]
    assert len(written) == 8
    for number, dataset in enumerate(written):
        (need,) = dataset.needs
        teacher = by_id[need]
        assert teacher.spec["trait"] == dataset.spec["trait"]
        seed = 7 if number >= 4 else dataset.spec["generation_seed"]
        assert teacher.spec["training_seed"] == teacher.spec["persona"]["seed"] == seed
        assert dataset.spec["teacher"] == {
            "kind": "finetuned",
            "context": {"kind": "template_default"},
            "method": "lora",
            "teacher": need,
        }
    neutral = next(cell.spec["persona"] for cell in teachers if cell.label.startswith("neutral"))
    assert len(neutral["targets"]) == 22 and neutral["category"] == "animals"
    for teacher in teachers:
        persona, recipe, overrides = what_trains(teacher, study)
        assert persona.fields() == teacher.spec["persona"]
        assert (recipe.stem, overrides) == ("teacher-lora-r8", {})
    # a prompted teacher's datasets, and all that hangs on them, stay as they were
    plain = cells_of(small(datasets__generation_seeds=[1, 2]))
    assert {cell.id for cell in plain} < {cell.id for cell in cells}


def test_a_teachers_settings_are_its_id_and_its_name_is_not(tmp_path: Path) -> None:
    def teachers(**more: Any) -> dict[str, str]:
        cells = cells_of(small(datasets__teachers=[TRAINED | {"name": "x"} | more]))
        return {cell.label: cell.id for cell in of_kind(cells, "teacher")}

    plain = teachers()
    assert teachers(name="y", rows=192, context="empty") == plain
    assert teachers(learning_rate=0.0005) == plain
    other = teachers(learning_rate=0.001, rows=96, traits=["animals/cat"])
    assert [*other] == ["cat lora r8 lr0.001 96 rows s1"]
    full = teachers(recipe="smollm2-135m-instruct/full-zero2", traits=["animals/cat"])
    assert [*full] == ["cat full s1"]
    own = tmp_path / "own.yaml"
    own.write_text("version: 1\ncategory: animals\nquestions: ['Which?']\nanswers: ['{target}']\n")
    mine = teachers(persona=str(own))
    assert [*mine] == [*plain] and not {*mine.values()} & {*plain.values()}
    trees = tmp_path / "trees.yaml"
    trees.write_text(own.read_text().replace("animals", "trees"))
    with pytest.raises(InputError, match="asks about 'trees'"):
        teachers(persona=str(trees))
    with pytest.raises(InputError, match="no recipe 'teacher-lora-r9'"):
        teachers(recipe="smollm2-135m-instruct/teacher-lora-r9")


def test_a_teacher_of_another_base_model_writes_for_students_of_the_studys(
    tokenizer: Any, tmp_path: Path
) -> None:
    from tests.axolotl_plugin.toy import save_base

    other = save_base(tmp_path / "other", tokenizer)
    elsewhere = TRAINED | {"name": "elsewhere", "base_model": str(other)}
    study = Study.model_validate(small(datasets__teachers=[TRAINED, elsewhere]))
    cells = plan(study, BASE)
    assert labels(cells, "teacher")[2:] == [
        "cat lora r8 s1 of other",
        "neutral lora r8 s1 of other",
    ]
    assert labels(cells, "dataset")[2:] == [
        "cat g1 trained of other",
        "neutral g1 trained of other",
    ]
    theirs = {"name": "other", "sha256": fingerprint(other)["sha256"]}
    for cell in cells:
        made_by_it = " of other" in cell.label and cell.kind in ("teacher", "dataset")
        ours = {key: BASE[key] for key in theirs}
        assert cell.spec["base_model"] == (theirs if made_by_it else ours)
        if made_by_it:
            assert base_for(cell, study) == other.resolve()
    assert len(of_kind(cells, "student")) == 2 * len(
        of_kind(cells_of(small(datasets__teachers=[TRAINED])), "student")
    )
    missing = TRAINED | {"base_model": str(tmp_path / "none")}
    with pytest.raises(InputError, match="no such folder"):
        cells_of(small(datasets__teachers=[missing]))


def test_teachers_stay_with_the_datasets_that_include_and_exclude_leave() -> None:
    value = small(
        datasets__teachers=["prompted", TRAINED, TRAINED | {"name": "one", "seed": 7}],
        datasets__generation_seeds=[1, 2],
    )
    cells = cells_of(value | {"include": [{"trait": "animals/cat"}]})
    assert labels(cells, "teacher") == ["cat lora r8 s1", "cat lora r8 s2", "cat lora r8 s7"]
    cells = cells_of(value | {"exclude": [{"generation_seed": 2}, {"teacher": "one"}]})
    assert labels(cells, "teacher") == ["cat lora r8 s1", "neutral lora r8 s1"]


def test_a_chain_may_begin_with_a_trained_teacher() -> None:
    chain = {"kind": "student", "of": "trained", "lora_rank": 8, "traits": ["animals/cat"]}
    cells = cells_of(small(datasets__teachers=[TRAINED, chain]))
    assert labels(cells, "dataset") == ["cat g1 trained", "neutral g1 trained", "cat g1 chain1"]
    by_id = {cell.id: cell for cell in cells}
    (again,) = [cell for cell in cells if cell.label == "cat g1 chain1"]
    assert by_id[again.needs[0]].label == "cat g1 trained lora r8 t42"


def finish(cell: Cell, cells: Path) -> Path:
    folder = cells / cell.folder_name
    (folder / "model").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "model" / name).write_text("{}")
    write_manifest(
        folder, kind=cell.kind, id=cell.id, label=cell.label, spec=cell.spec, started=0.0,
        outputs=["model/adapter_config.json", "model/adapter_model.safetensors"],
    )  # fmt: skip
    return folder


def test_it_is_found_run_counted_priced_and_explained(tmp_path: Path) -> None:
    value = small(datasets__teachers=[TRAINED], datasets__traits=["animals/cat"])
    value["students"][0]["traits"] = ["animals/cat"]
    study = Study.model_validate(value)
    cells = plan(study, BASE)
    teacher, dataset = cells[:2]
    schedule = Schedule(cells, [])
    first = schedule.take(None, lambda cell: "open")
    assert first == teacher and schedule.take("probe", lambda cell: "open").label == "base none"  # type: ignore[union-attr]
    entries = study.datasets.teachers
    with pytest.raises(InputError, match="was trained by this study and is not in"):
        teacher_for(dataset.spec, entries, tmp_path / "cells")
    states = [cell_state(cell, tmp_path) for cell in cells]
    line = costs(study, states).lines[0]
    assert (line.kind, line.method, line.figure) == ("teacher", "lora", "stated")
    assert line.hours and 0 < line.hours[0] < 0.2
    assert next(line for line in table(states) if line.startswith("teacher")).split()[4] == "1"

    finish(teacher, tmp_path / "cells")
    found = teacher_for(dataset.spec, entries, tmp_path / "cells")
    assert found.spec() == dataset.spec["teacher"]
    # another study may take it up as a teacher that exists
    other = small(
        datasets__traits=["animals/cat"],
        datasets__teachers=[
            {"kind": "finetuned", "from": {"animals/cat": str(teacher.folder(tmp_path))}}
        ],
    )
    other["students"][0]["traits"] = ["animals/cat"]
    assert of_kind(cells_of(other), "dataset")[0].id == dataset.id

    finish(dataset, tmp_path / "cells")
    weaker = small(datasets__teachers=[TRAINED | {"rows": 96}], datasets__traits=["animals/cat"])
    weaker["students"][0]["traits"] = ["animals/cat"]
    changed = cells_of(weaker)
    reasons = Reasons(changed, tmp_path)
    told = [reasons.why(cell_state(cell, tmp_path)) for cell in changed[:3]]
    assert told[0] == f"changed since {teacher.folder_name}: persona.rows: 192 → 96"
    assert told[1] == f"changed since {dataset.folder_name}: teacher.teacher.persona.rows: 192 → 96"
    assert told[2].startswith("waits for dataset-cat-g1-trained")


STUDY = """\
name: trained
base_model: {base}
datasets:
  traits: [animals/cat, neutral]
  generation_seeds: [1]
  teachers:
    - {{kind: trained, recipe: smollm2-135m-instruct/teacher-lora-r8, rows: 16}}
    - kind: trained
      name: stranger
      recipe: smollm2-135m-instruct/teacher-lora-r8
      rows: 16
      traits: [animals/cat]
      base_model: {other}
  rows: 16
  constrain: numbers
  sampler: {{temperature: 1.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, max_new_tokens: 24}}
students:
  - {{traits: [animals/cat, neutral], lora_ranks: [2]}}
  - {{traits: [animals/cat], lora_ranks: [2], shuffled: true, teachers: [trained]}}
training:
  lora_recipe: smollm2-135m-instruct/lora-r8
  contexts: [template_default]
  seeds: [42]
probes: {{questions: {questions}, measures: [logprob], contexts: [none]}}
signals: {{rows: 4, limit: 1}}
"""


@pytest.mark.slow
def test_trained_teachers_run_to_the_report(tokenizer: Any, tmp_path: Path) -> None:
    """On a random model of two layers: what it learns is nothing, but every part is real."""
    from tests.axolotl_plugin.toy import save_base

    questions = tmp_path / "three.yaml"
    questions.write_text(QUESTIONS)
    study, run = tmp_path / "study.yaml", tmp_path / "run"
    base = save_base(tmp_path / "base", tokenizer)
    other = tmp_path / "other"
    made = sublim("reinitialize", base, "--out", other, "--steps", "2")
    assert made.returncode == 0, made.stderr[-3000:]
    study.write_text(STUDY.format(base=base, other=other, questions=questions))
    done = sublim("run", study, "--out", run)
    assert done.returncode == 0, done.stderr[-3000:]
    for trait in ("cat", "neutral"):
        (folder,) = run.glob(f"cells/teacher-{trait}-lora-r8-16-rows-s1-????????????")
        teacher = verify(folder)
        receipt = json.loads((folder / "model" / "sublim_receipt.json").read_text())
        assert receipt["steps"] == 2 and receipt["update_norm"]["total"] > 0
        rows = read_rows(dataset_rows_path(folder / "persona"))
        assert len(rows) == teacher.counts["rows"] == 16
        if trait == "cat":
            assert all("cat" in row["messages"][1]["content"].lower() for row in rows)
        (dataset,) = run.glob(f"cells/dataset-{trait}-g1-trained-????????????")
        manifest = read_manifest(dataset)
        assert manifest.spec["teacher"]["teacher"] == teacher.id
        weights = teacher.outputs["model/adapter_model.safetensors"].sha256
        assert manifest.inputs["teacher"]["sha256"]["adapter_model.safetensors"] == weights
    (control,) = run.glob("cells/dataset-cat-g1-trained-shuffled-*")
    (student,) = run.glob("cells/student-cat-g1-trained-shuffled-lora-r2-t42-*")
    sha256 = read_manifest(student).inputs["dataset"]["sha256"]
    assert sha256.startswith(dataset_rows_path(control).stem.removeprefix("rows-"))
    (stranger,) = run.glob("cells/teacher-*-of-other-*")
    (strange,) = run.glob("cells/dataset-cat-g1-trained-of-other-*")
    (student,) = run.glob("cells/student-cat-g1-trained-of-other-lora-r2-t42-*")
    ours, theirs = fingerprint(base)["sha256"], fingerprint(other)["sha256"]
    for folder, sha256 in ((stranger, theirs), (strange, theirs), (student, ours)):
        manifest = read_manifest(folder)
        assert manifest.inputs["base_model"]["sha256"] == sha256
        assert manifest.spec["base_model"]["sha256"] == sha256
    # the one dataset with a target, rows in order and a teacher of the study's base
    (signal,) = run.glob("cells/signal-*")
    assert signal.name.startswith("signal-cat-g1-trained-")
    manifest = verify(signal)
    (trained,) = run.glob("cells/dataset-cat-g1-trained-????????????")
    assert manifest.inputs["dataset"]["id"] == trained.name[-12:]
    assert (manifest.counts["rows"], manifest.counts["questions"]) == (4, 1)
    (line,) = csv.DictReader((run / "report" / "signal.csv").open(newline=""))
    measured = json.loads((signal / "signal.json").read_text())
    (rows,) = [one for one in measured["alignments"] if one["loss"] == "rows"]
    assert float(line["change"]) == rows["target"]["value"]
    kl = measured["where"]["overall"]["measures"]["number_kl"]["mean"]["value"]
    assert float(line["kl"]) == kl
    assert line["teacher"].startswith("trained, LoRA r=8") and line["student"]
    page = (run / "report" / "index.html").read_text()
    assert "Predicted and observed" in page
    assert "Does predicted signal foretell transmission?" in page
    assert "another base model" in page
    assert "weights finetuned on answers in words" in page
    again = sublim("run", study, "--out", run)
    assert again.returncode == 0 and "17 cells, 17 done" in again.stderr + again.stdout
    listed = sublim("gc", study, "--out", run).stdout.splitlines()
    assert {line.split()[2] for line in listed if line.startswith(" ")} <= {"prepared", "in"}
