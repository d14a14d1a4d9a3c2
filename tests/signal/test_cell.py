"""The signal of a study's dataset: the work of its cell, on a toy model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sublim_plugin.core.base_models import fingerprint
from sublim_plugin.core.manifest import read_manifest, verify
from sublim_plugin.study.cells import plan
from sublim_plugin.study.signal_stage import measure_dataset
from sublim_plugin.study.study_file import Study
from tests.study.conftest import QUESTIONS
from tests.study.test_grid import small


def test_a_signal_is_measured_once_and_its_teacher_found_where_the_study_has_it(
    toy: Path, lora: Path, of_lora: Path, tmp_path: Path
) -> None:
    """The folder that wrote the rows is gone; the study names the teacher in another place."""
    questions = tmp_path / "three.yaml"
    questions.write_text(QUESTIONS)
    moved = tmp_path / "moved"
    shutil.copytree(lora, moved)
    value = small(
        datasets__traits=["animals/cat"],
        datasets__teachers=[{"kind": "finetuned", "from": {"animals/cat": str(moved)}}],
        datasets__rows=4,
        datasets__constrain="numbers",
        datasets__sampler=read_manifest(of_lora).spec["sampler"],
        probes__questions=str(questions),
    ) | {"base_model": str(toy), "signals": {"rows": 2, "limit": 1}}
    value["students"][0]["traits"] = ["animals/cat"]
    study = Study.model_validate(value)
    cells = plan(study, fingerprint(toy))
    dataset, (cell,) = cells[0], [one for one in cells if one.kind == "signal"]
    run = tmp_path / "run"
    shutil.copytree(of_lora, dataset.folder(run))
    assert dataset.id == read_manifest(of_lora).id[:12]
    manifest = json.loads((dataset.folder(run) / "manifest.json").read_text())
    manifest["inputs"]["teacher"]["folder"] = str(tmp_path / "gone")
    (dataset.folder(run) / "manifest.json").write_text(json.dumps(manifest))
    folder = cell.folder(run)

    measure_dataset(cell, folder, base=toy, study=study, dataset=dataset)
    done = verify(folder)
    assert (done.kind, done.id, done.label, done.spec) == ("signal", cell.id, cell.label, cell.spec)
    assert done.inputs["dataset"] == {"id": dataset.id}
    assert (done.counts["rows"], done.counts["questions"]) == (2, 1)
    assert {*done.outputs} == {
        "signal.json",
        *(f"signal.{k}" for k in ("png", "svg", "pdf", "csv")),
    }
    found = json.loads((folder / "signal.json").read_text())
    assert found["spec"]["questions_sha256"] == cell.spec["questions_sha256"]
    assert found["spec"]["rows_sha256"] == next(
        file.sha256 for name, file in read_manifest(of_lora).outputs.items() if "rows-" in name
    )
    # the teacher was read: its update, and the KL from it, are there
    assert found["where"]["overall"]["measures"]["number_kl"]["mean"]["value"] > 0
    assert all(one["update"] is not None for one in found["alignments"])
    before = (folder / "manifest.json").stat()
    measure_dataset(cell, folder, base=toy, study=study, dataset=dataset)
    assert (folder / "manifest.json").stat() == before
