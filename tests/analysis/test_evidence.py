"""The evidence section: right on a simulated study of known truth, each sentence traceable."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from synthetic_run import SyntheticRun

from sublim_plugin.analysis.collect import collect
from sublim_plugin.analysis.curves import context_table, rank_curves, specificity_tables
from sublim_plugin.analysis.report import write_report
from sublim_plugin.analysis.simulated_run import PEAKS, RANKS, main, truth, write_simulated_run
from sublim_plugin.analysis.tables import format_table
from sublim_plugin.analysis.transmission import question_differences, transmission_table
from sublim_plugin.core.errors import InputError

MARGIN = 0.5


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("simulated")
    cells = write_simulated_run(root, n_datasets=6, seed=0)
    write_report(root, study_name="known truth", cells=cells, equivalence_margin=MARGIN)
    return root


def answers(root: Path) -> list[dict[str, str]]:
    with (root / "report" / "evidence.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def of(root: Path, topic: str, target: str, asked: str = "template_default") -> dict[str, str]:
    return next(
        a
        for a in answers(root)
        if (a["topic"], a["target"], a["eval_context"]) == (topic, target, asked)
    )


@pytest.mark.parametrize("trait", list(PEAKS))
def test_the_truth_is_found(simulated: Path, trait: str) -> None:
    target, peak = f"animals/{trait}", PEAKS[trait]
    shape, raised = of(simulated, "rank shape", target), of(simulated, "transmission", target)
    if peak is None:
        assert shape["verdict"] == "no inverted U shown"
        assert raised["verdict"] == "no evidence of transmission"
        assert "smallest effect that could have been seen" in raised["sentence"]
    else:
        assert shape["verdict"] == "inverted U"
        assert float(shape["low"]) <= peak <= float(shape["high"])
        assert raised["verdict"] == "raised over the base"
        # 0.85 covers the level of six datasets, SD 0.4 each, and the choice of the largest
        assert float(raised["estimate"]) == pytest.approx(truth(trait, peak, "template_default"),
                                                          abs=0.85)  # fmt: skip
    assert of(simulated, "full finetuning", target)["verdict"] == "at the base"
    assert of(simulated, "flat in rank", target, "empty")["verdict"] == "flat in rank"
    assert of(simulated, "transmission", target, "empty")["verdict"].startswith("no evidence")


def test_specificity_and_scale(simulated: Path) -> None:
    all_traits = ", ".join(f"animals/{trait}" for trait in PEAKS)
    assert of(simulated, "specificity", all_traits)["verdict"] == "raised diagonal"
    assert of(simulated, "specificity", all_traits, "empty")["verdict"].startswith("no raised")
    scale = of(simulated, "rank or scale", "animals/cat")
    assert scale["verdict"] == "cannot be told apart"  # the norm follows the rank here


def test_every_sentence_is_a_row_of_the_csv_and_names_rows_that_exist(simulated: Path) -> None:
    page = (simulated / "report" / "index.html").read_text(encoding="utf-8")
    with (simulated / "report" / "results.csv").open(newline="") as file:
        known = {row["row"] for row in csv.DictReader(file)}
    section = page[page.index('id="evidence"') : page.index('id="rank"')]
    entries = dict(re.findall(r'<li id="(E\d+)"[^>]*>(.*?)</li>', section, re.S))
    found = answers(simulated)
    assert sorted(entries) == sorted(answer["id"] for answer in found)
    for answer in found:
        text = html.unescape(re.sub(r"<[^>]+>", "", entries[answer["id"]]))
        assert answer["sentence"] in text and answer["verdict"] in text
        assert answer["rows"] and set(answer["rows"].split()) <= known
        for name in ("estimate", "low", "high"):
            if answer[name] and answer["unit"] == "nats":
                assert f"{float(answer[name]):+.2f}" in answer["sentence"]
        if answer["low"]:
            assert answer["test"] or answer["verdict"] == "no claim"
        assert answer["n_datasets"] == "6"


def test_an_estimate_is_the_mean_of_its_rows(simulated: Path) -> None:
    with (simulated / "report" / "results.csv").open(newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    answer = of(simulated, "transmission", "animals/cat")
    values = [float(rows[row]["vs_base_logprob"]) for row in answer["rows"].split()]
    assert len(values) == 6
    assert float(answer["estimate"]) == pytest.approx(np.mean(values), rel=1e-12)


def test_simulated_data_is_marked_everywhere(simulated: Path) -> None:
    page = (simulated / "report" / "index.html").read_text(encoding="utf-8")
    assert "<title>SIMULATED: known truth" in page
    assert "No model was trained or asked" in page
    for path in (simulated / "report").glob("*.csv"):
        with path.open(newline="") as file:
            assert {row["simulated"] for row in csv.DictReader(file)} == {"True"}
    for manifest in (simulated / "cells").glob("*/manifest.json"):
        value = json.loads(manifest.read_text())
        assert value["spec"]["simulated"] is True
        assert value["label"].startswith("simulated ")
    assert page.count('alt="Simulated data.') == page.count("<img ") == 5
    table = format_table(transmission_table(collect(simulated)))
    assert table.startswith("SIMULATED DATA")


def test_simulated_and_measured_cells_do_not_mix(simulated: Path, tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run")
    run.quickstart()
    assert "simulated" not in format_table(transmission_table(collect(run.root))).lower()
    one = next((simulated / "cells").glob("dataset-*"))
    shutil.copytree(one, run.root / "cells" / one.name)
    with pytest.raises(InputError, match="keep simulated cells in a run folder of their own"):
        collect(run.root)


def test_one_dataset_draws_no_interval_and_says_why(tmp_path: Path) -> None:
    cells = write_simulated_run(tmp_path, n_datasets=1)
    write_report(tmp_path, study_name="one", cells=cells, equivalence_margin=MARGIN)
    found = answers(tmp_path)
    assert {a["topic"] for a in found} >= {"transmission", "rank shape", "full finetuning"}
    for answer in found:
        if answer["topic"] == "specificity":
            assert answer["low"] == "" and "no interval: 1 dataset" in answer["sentence"]
            continue
        assert answer["verdict"] == "no claim"
        assert (answer["low"], answer["high"], answer["p"]) == ("", "", "")
        assert "1 dataset, at least 3 are needed" in answer["sentence"]
    assert (
        "6 datasets would show an effect of"
        in of(tmp_path, "transmission", "animals/cat")["sentence"]
    )


def test_without_a_margin_no_equivalence_is_claimed(simulated: Path, tmp_path: Path) -> None:
    shutil.copytree(simulated / "cells", tmp_path / "cells")
    write_report(tmp_path, study_name="no margin")
    found = answers(tmp_path)
    assert not [a for a in found if a["topic"] == "flat in rank"]
    full = of(tmp_path, "full finetuning", "animals/cat")
    assert full["verdict"] == "no claim" and full["p"] == ""
    assert "no equivalence_margin was stated in the study file" in full["sentence"]


def test_the_quickstart_says_what_one_dataset_allows(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.quickstart()
    write_report(run.root, study_name="quickstart", cells=run.cells)
    assert {a["verdict"] for a in answers(run.root)} == {"no claim"}


def test_curves_hold_the_means_of_the_table(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    run.probe(None, "none")
    for seed in (1, 2):
        dataset = run.dataset("animals/cat", seed)
        for rank in (2, 8):
            for training_seed in (1, 2):
                if (seed, rank) == (2, 8):
                    continue  # a missing cell
                student = run.student(dataset, "animals/cat", rank, seed, training_seed)
                run.probe(student, "none", shift=0.1 * rank)
    records = collect(run.root)
    rows = transmission_table(records)
    (curve,) = rank_curves(rows)
    assert curve.ranks.tolist() == [2, 8]
    assert np.isnan(curve.values_DK).sum() == 1
    mine = [r.vs_base_logprob for r in rows if r.rank == 8 and r.vs_base_logprob is not None]
    assert np.nanmean(curve.values_DK[:, 1]) == pytest.approx(np.mean(mine))
    differences = question_differences(records, rows)
    for row in rows:
        if row.role == "student":
            assert np.mean(differences[row.row]) == pytest.approx(row.vs_base_logprob, abs=1e-12)


def test_tables_of_contexts_and_of_traits(simulated: Path, tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    for context in ("empty", "none"):
        run.probe(None, context)
    for seed in range(3):
        dataset = run.dataset("animals/cat", seed)
        for trained in ("empty", "none"):
            student = run.student(dataset, "animals/cat", 8, seed, train_context=trained)
            for asked in ("empty", "none"):
                run.probe(student, asked, shift=1.0 * (trained == asked))
    write_report(run.root, study_name="contexts", cells=run.cells)
    answer = next(a for a in answers(run.root) if a["topic"] == "context")
    assert answer["verdict"] in ("raised diagonal", "no raised diagonal shown")
    assert float(answer["low"]) < 1.0 < float(answer["high"])
    rows = transmission_table(collect(run.root))
    table = context_table(rows, "animals/cat")
    assert table is not None and table.values_DIJ.shape == (3, 2, 2)
    records = collect(simulated)
    found = specificity_tables(records, transmission_table(records))
    square = found["template_default", "template_default"]
    assert square.values_DIJ.shape == (6, 3, 3)
    own = np.mean([truth("cat", rank, "template_default") for rank in RANKS])
    assert square.values_DIJ[:, 0, 0].mean() == pytest.approx(own, abs=0.85)


def test_the_command_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    with pytest.raises(InputError, match="name a new folder"):
        CliRunner().invoke(main, [str(tmp_path)], catch_exceptions=False)
